"""Wrong recipes: refused from their text alone, with the path of what is wrong and the word that was meant."""

from __future__ import annotations

from pathlib import Path

import pytest

import sdops
from sdops.card import cards
from sdops.errors import SdopsError, UsageError
from sdops.verbs import _verb_card, recipe
from sdops.verbs._recipe_check import check_recipe
from sdops.verbs._recipe_text import Recipe, parse_recipe, read_value
from tests import tiny

INPUTS = '[inputs]\na = "hf://owner/repo/a.safetensors"\nb = "hf://owner/repo/b.safetensors"\n'
MERGE = '[[steps]]\nverb = "merge"\nmodels = ["a", "b"]\n'
EXTRACT = '[[steps]]\nverb = "extract"\ntuned = "a"\nbase = "b"\n'
APPLY = '[[steps]]\nverb = "apply"\nmodel = "a"\nlora = '
CONVERT = '[[steps]]\nverb = "convert"\nfile = "a"\n'
DEEP = "[" * 30 + "]" * 30


def check(text: str) -> None:
    check_recipe(parse_recipe(text, name="r"))


# What is added to a recipe in order -> the path, words of the message, words of the hint.
WRONG = {
    MERGE + "alpa = 0.3": ("steps.1.alpa", "`merge` has no `alpa`", "`alpha`"),
    MERGE + "jobs = 2": ("steps.1.jobs", "is said when the recipe is built", "sdops build --help"),
    MERGE + "alpha = true": ("steps.1.alpha", "`true` is not a number", ""),
    MERGE + "alpha = inf": ("steps.1.alpha", "`inf` is not a number", ""),
    MERGE + f"alpha = {'9' * 40}": ("steps.1.alpha", "too large a number", "64 bits"),
    MERGE + f"alpha = {DEEP}": ("steps.1.alpha" + ".1" * 18, "nested too deeply", "at most 20"),
    MERGE + 'alpha = "$strenth"': ("steps.1.alpha", "no parameter `$strenth`", "declare it"),
    MERGE + 'method = "add-diference"': ("steps.1.method", "`add-diference`", "sdops methods"),
    MERGE + 'method = "add-difference"': ("steps.1.models", "merges 3 models (a, b, c), 2 given", "explains"),
    MERGE + 'method = "ties"': ("steps.1.base", "needs the models' common ancestor", "base = "),
    MERGE + 'missing = "kep"': ("steps.1.missing", "cannot be `kep`", "`keep`"),
    MERGE.replace('"a"', '"c"'): ("steps.1.models.1", "no input or step `c`", "declare it"),
    MERGE.replace('"a"', '"x/a.ckpt"'): ("steps.1.models.1", "no input or step", 'model = "x/a.ckpt"'),
    MERGE.replace('"a", "b"', '"a", 3'): ("steps.1.models.2", "`3` is not the name", ""),
    MERGE.replace('"merge"', '"merg"'): ("steps.1.verb", "no verb `merg`", "`merge`"),
    MERGE.replace('verb = "merge"', ""): ("steps.1", "has no verb", 'verb = "merge"'),
    MERGE + 'id = "../x"': ("steps.1.id", "is no name", "small letters"),
    MERGE + 'id = "a"': ("steps.1.id", "`a` is an input already", "rename"),
    MERGE + 'id = "x"\n' + MERGE + 'id = "x"': ("steps.2.id", "`x` is `steps.1` already", "rename"),
    MERGE + MERGE: ("steps.1", "nothing uses `step1`", "output"),
    MERGE.replace('"b"', '"step1"'): ("steps.1", "`step1` uses `step1`: a circle", "input"),
    MERGE.replace('"b"', '"step2"') + MERGE.replace('"b"', '"step1"'): ("steps.1", "a circle", "input"),
    EXTRACT + "conv_rnk = 4": ("steps.1.conv_rnk", "`extract` has no `conv_rnk`", "`conv_rank`"),
    EXTRACT + "rank = -3": ("steps.1.rank", "from 1, not -3", "rank = 16"),
    EXTRACT + "rank = 4\nenergy = 0.9": ("steps.1.rank", "exclude each other", "one rule"),
    EXTRACT + "energy = 2.0": ("steps.1.energy", "from 0 to 1, not 2", "energy = 0.9"),
    EXTRACT + 'dtype = "fp17"': ("steps.1.dtype", "cannot be `fp17`", "`fp16`"),
    EXTRACT + 'to = "kohja"': ("steps.1.to", "cannot be `kohja`", "`kohya`"),
    EXTRACT + 'device = "cda"': ("steps.1.device", "cannot be `cda`", "`cuda`"),
    APPLY + '["b:nan"]': ("steps.1.lora", "`nan` is no strength", '"style:0.8"'),
    APPLY + '["b:0.5:te=inf"]': ("steps.1.lora", "`inf` is no strength", '"style:0.8"'),
    APPLY + '[["b", inf]]': ("steps.1.lora", "`inf` is no strength", '"style:0.8"'),
    APPLY + '["b"]\narchitecture = "sd11"': ("steps.1.architecture", "cannot be `sd11`", "did you mean"),
    '[[steps]]\nverb = "embed merge"\nfiles = ["a", "b"]\nmode = "averag"': ("steps.1.mode", "`averag`", "`average`"),
    '[[steps]]\nverb = "embed convert"\nfile = "a"\nto = "a11"': ("steps.1", "`a11`", ""),
    CONVERT + 'to = "saftensors"': ("steps.1.to", "cannot be `saftensors`", "`safetensors`"),
    CONVERT + 'dtype = "fp17"': ("steps.1.dtype", "no dtype `fp17`", "choose one of"),
    CONVERT + 'ema = "plain"': ("steps.1.ema", "cannot be `plain`", "choose one of"),
    '[[steps]]\nverb = "apply"\nmodel = "a"': ("steps.1", "`apply` needs `lora`", '["style:0.8"]'),
    '[[steps]]\nverb = "apply"\nmodel = "a"\nlora = ["c:0.5"]': ("steps.1.lora.1", "no input or step `c`", "declare"),
    '[[steps]]\nverb = "embed make"\nformula = "\'/x.pt\' + $a"': ("steps.1.formula", "names a file", "$name"),
    "[parameters]\ns = { default = 3, range = [0, 1] }\n" + MERGE: ("parameters.s", "is 3", "between 0 and 1"),
    "[parameters]\ns = { defalt = 3 }\n" + MERGE: ("parameters.s.defalt", "is unknown", "`default`"),
    "[parameters]\ns = 2020-01-01\n" + MERGE: ("parameters.s.default", "is a date", "a number"),
    '[parameters]\ns = { default = "x", range = [0, 1] }\n' + MERGE: ("parameters.s.range", "for numbers", "choices"),
    "[parameters]\ns = { default = 0.5, choices = [0.5, 'x'] }\n" + MERGE: ("parameters.s.choices.2", "is a text", ""),
    MERGE + 'id = "x"\noutput = "o.ckpt"\n' + MERGE + 'output = "./o.ckpt"': ("steps.2.output", "by `steps.1`", ""),
    MERGE + 'output = "o\\u001b[31m.ckpt"': ("steps.1.output", "o\\u001b[31m.ckpt", "letters"),
    MERGE + '"a\\nhint: `rm`" = 3': ("steps.1.a", "a\\u000ahint: `rm`", "there are"),
    "[[step]]\n" + MERGE: ("step", "is unknown", "`steps`"),
}  # fmt: skip


@pytest.mark.parametrize("more", WRONG)
def test_a_wrong_recipe_is_refused_with_path_and_hint(more: str) -> None:
    path, message, hint = WRONG[more]
    with pytest.raises(UsageError) as caught:
        check(INPUTS + more)
    assert str(caught.value.data["path"]).startswith(path)
    assert message in caught.value.message
    assert hint in (caught.value.hint or "")


@pytest.mark.parametrize("name", ["../x", "/x", ".x", "a\\\\b", "x\\ny", "x\\u009b31m", "x\\u202ey", ""])
def test_names_cannot_lead_elsewhere(name: str) -> None:
    with pytest.raises(UsageError, match="cannot be part of a file name"):
        check(f'name = "{name}"\n' + INPUTS + MERGE)


@pytest.mark.parametrize(
    ("text", "place"),
    [
        (INPUTS + "[[steps]\n", "line 4"),
        (INPUTS + "[[steps]]\nverb = merge\n", "line 5"),
        (INPUTS + INPUTS, "line 4"),
        (INPUTS + MERGE + f"alpha = {'9' * 5000}", "5000 digits"),
        (INPUTS + MERGE + "alpha = " + "[" * 5000, "recursion"),
    ],
)
def test_what_is_no_toml_is_told_with_its_place(text: str, place: str) -> None:
    with pytest.raises(UsageError, match="is no TOML") as caught:
        check(text)
    assert place in caught.value.message


def test_numbers_of_the_command_line_have_bounds() -> None:
    one = parse_recipe("[parameters]\ns = 1\n" + INPUTS + MERGE, name="r").parameters["s"]
    assert read_value(one, "12") == 12
    with pytest.raises(UsageError, match=r"`parameters\.s`"):
        check_recipe(Recipe("r", {}, {"s": one}, ()), {"s": read_value(one, "9" * 5000)})


@pytest.mark.parametrize("verb", _verb_card.VERBS)
def test_keys_are_the_options_of_the_command(verb: str) -> None:
    """But for those that only say how it is run."""
    from importlib import import_module

    import click

    first, _, second = verb.partition(" ")
    command: click.Command = import_module(f"sdops.commands.{first}").command
    if isinstance(command, click.Group):
        command = command.commands[second]
    running = {*_verb_card.RUNNING, "no_hash", "stream", "json", "quiet", "verbose", "color", "no_progress"}
    assert {one.name for one in command.params} - running == set(_verb_card.verb_card(verb).parameters)


def test_every_merge_method_and_knob_is_known() -> None:
    for card in cards().values():
        models = ["a", "b", "a", "b"][: 2 if card.inputs == ["*models"] else len(card.inputs)]
        knobs = "\n".join(
            f"{knob.name} = {_toml(knob.default)}" for knob in card.knobs if knob.default not in (None, ())
        )
        base = 'base = "a"\n' if card.base else ""
        text = f'[[steps]]\nverb = "merge"\nmethod = "{card.name}"\nmodels = {models}\n{base}{knobs}'
        check(INPUTS + text.replace("'", '"'))


def _toml(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else repr(list(value) if isinstance(value, tuple) else value)


def test_what_a_late_step_refuses_is_refused_before_inputs_are_hashed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The wrong hash would be told if it were looked at first."""
    monkeypatch.chdir(tmp_path)
    for seed in range(2):
        tiny.write(tmp_path / f"m{seed}.safetensors", tiny.checkpoint(seed))
    inputs = f'[inputs]\na = {{ file = "m0.safetensors", sha256 = "{"0" * 64}" }}\nb = "m1.safetensors"\n'
    extract = EXTRACT.replace("[[steps]]", '[[steps]]\nid = "lora"') + "rank = 2\n"
    late = {
        extract + '[[steps]]\nid = "on"\nverb = "apply"\nmodel = "b"\nlora = ["lora"]\n'
        + CONVERT.replace('"a"', '"on"') + 'components = ["unte"]\n': "steps.3",
        extract + 'to = "koya"\n[[steps]]\nverb = "apply"\nmodel = "b"\nlora = ["lora"]\n': "steps.1",
        extract + 'include = ["nothing*"]\n[[steps]]\nverb = "apply"\nmodel = "b"\nlora = ["lora"]\n': "steps.1",
    }  # fmt: skip
    for text, path in late.items():
        Path("r.toml").write_text(inputs + text)
        with pytest.raises(SdopsError, match=f"`{path}") as caught:
            sdops.build("r.toml", output="out.safetensors")
        assert caught.value.data["path"] != "inputs.a"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m0.safetensors", "m1.safetensors", "r.toml"]
    assert recipe.check("r.toml").data["steps"]


def test_no_input_takes_an_option_of_build() -> None:
    from sdops.commands.build import command
    from sdops.verbs._recipe_text import RESERVED

    options = {word for one in command.params for word in one.opts if word.startswith("--")}
    assert {word.removeprefix("--").replace("-", "_") for word in options} <= RESERVED


def test_messages_stay_short() -> None:
    with pytest.raises(UsageError) as caught:
        check(INPUTS + MERGE + f"{'k' * 100_000} = 3")
    assert len(caught.value.message) < 500


def test_no_more_inputs_than_anybody_merges() -> None:
    with pytest.raises(UsageError, match="1,001 inputs are too many"):
        check("[inputs]\n" + "".join(f'i{n} = "f"\n' for n in range(1001)) + MERGE)


@pytest.mark.parametrize(
    "strength", ["", ":0.5", ":-1e-3", ":GRAD_V", ":0.5, IN00=0.1", ":0.3:te=0.2:lbw=ALL", ":1 0 1"]
)
def test_strengths_that_a_model_has_to_settle_pass(strength: str) -> None:
    check(INPUTS + APPLY + f'["b{strength}"]')
