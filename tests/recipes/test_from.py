"""`recipe from` and `build`: the same bytes again, for every merge method and for apply."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import sdops
from fixtures import loras
from sdops.card import Card, Knob, cards
from sdops.errors import FormatError, MismatchError, SdopsError, UsageError
from sdops.verbs import recipe
from sdops.verbs._recipe_text import parse_recipe
from tests import tiny

CARDS = list(cards().values())
STEM = "lora_unet_input_blocks_2_1_transformer_blocks_0_attn2_to_k"
TE = "lora_te_text_model_encoder_layers_0_mlp_fc1"


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models and LoRAs."""
    folder = tmp_path_factory.mktemp("files")
    for seed in range(4):
        tiny.write(folder / f"m{seed}.safetensors", tiny.checkpoint(seed))
        tiny.write(folder / f"u{seed}.safetensors", tiny.checkpoint(seed, vae=False, clip=False))
    for seed in (1, 2):
        rng = np.random.default_rng(seed)
        parts = loras.FAMILIES["lora_alpha"]((320, 768), 2, rng)
        loras.save(folder / f"l{seed}.safetensors", {STEM + suffix: values for suffix, values in parts.items()})
    return folder


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def again(made: Path, files: Path, **options: Any) -> bytes:
    """What the recipe of a file makes."""
    recipe.from_(made, output="again.toml", force=True)
    sdops.build("again.toml", output="again.safetensors", root=[files], force=True, **options)
    return Path("again.safetensors").read_bytes()


def unusual(knob: Knob, many: int) -> Any:
    """A value that is not the default, where one is easily found."""
    if knob.choices:
        return knob.choices[-1]
    if knob.type == "float":
        return f"{knob.default!r}, IN00-IN03=0.25" if knob.allows(0.25) else knob.default
    return {"bool": not knob.default, "floats": tuple(0.5 + i for i in range(many))}.get(knob.type, knob.default)


@pytest.mark.filterwarnings("ignore:var")  # of tensors with one element
@pytest.mark.parametrize("card", CARDS, ids=lambda card: card.name)
def test_every_merge_method_is_made_again_byte_for_byte(card: Card, files: Path) -> None:
    many = 3 if card.inputs == ["*models"] else len(card.inputs)
    models = [files / f"u{number}.safetensors" for number in range(1, 1 + many)]
    floats = [knob.name for knob in card.knobs if knob.type == "float"]
    knobs = {knob.name: unusual(knob, many) for knob in card.knobs if knob.name not in floats[1:]}
    options: dict[str, Any] = {"base": files / "u0.safetensors"} if card.base else {}
    sdops.merge(*models, method=card.name, **options, **knobs, seed=7, output="made.safetensors")
    assert again(Path("made.safetensors"), files) == Path("made.safetensors").read_bytes()


@pytest.mark.parametrize(
    "options",
    [
        {"alpha": "GRAD_V, vae=0, *attn2*=0.25", "dtype": "bf16"},
        {"alpha": {"": 0.2, "IN00-IN04": 0.7}, "exclude": ["*.bias"], "prune": True},
        {"alpha": 0.3, "vae": "m3.safetensors", "text_encoder": "m2.safetensors", "missing": "keep"},
        {"alpha": 0.3, "lora": ["l1.safetensors:0.8", "l2.safetensors:0.5, IN02=0.1"]},
        {"method": "slerp", "lora": ["l1.safetensors:0.8:te=0.4:lbw=MIDD"], "include": [f"{tiny.UNET}*"]},
        {"alpha": 0.3, "hash_inputs": False},
    ],
    ids="-".join,
)
def test_options_of_merges_are_recorded(options: dict[str, Any], files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = Path("made.safetensors").absolute()
    with monkeypatch.context() as there:
        there.chdir(files)
        sdops.merge("m1.safetensors", "m2.safetensors", **options, output=out)
    assert again(out, files) == out.read_bytes()


@pytest.mark.parametrize(
    "options",
    [
        {"lora": ["l1.safetensors"]},
        {"lora": ["l1.safetensors:-0.3", "l2.safetensors:0.8:te=0.4:unet=0.7:lbw=1,0,0,0,1,1,1,1,1,1,1,1,1,1,1,0,0"]},
        {"lora": ["l1.safetensors:0.8, IN02=0.25"], "rounding": "stochastic", "seed": 5, "touched_dtype": "fp32"},
        {"lora": ["l1.safetensors", "l1.safetensors:0.5"], "dtype": "bf16", "sequential": True},
    ],
    ids=["plain", "options", "dials", "dtypes"],
)
def test_apply_is_made_again_byte_for_byte(
    options: dict[str, Any], files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = Path("made.safetensors").absolute()
    with monkeypatch.context() as there:
        there.chdir(files)
        sdops.apply("m1.safetensors", **options, output=out)
    assert again(out, files) == out.read_bytes()


@pytest.mark.parametrize("family", sorted({*loras.FAMILIES} - {"lora_alpha", "tucker"}))  # above; of convolutions
def test_every_family_of_adapters_is_added_again_byte_for_byte(family: str, files: Path, tmp_path: Path) -> None:
    parts = loras.FAMILIES[family]((320, 768), 2, np.random.default_rng(3))
    parts.pop(".diff_b", None)  # the layer has no bias
    lora = loras.save(tmp_path / "lora.safetensors", {STEM + suffix: values for suffix, values in parts.items()})
    sdops.apply(files / "m1.safetensors", lora=[f"{lora}:0.7"], output="made.safetensors")
    made = Path("made.safetensors")
    assert made.read_bytes() != (files / "m1.safetensors").read_bytes()
    assert again(made, files) == made.read_bytes()


@pytest.mark.parametrize(
    ("verb", "names", "options"),
    [
        ("extract", ["m1", "m0"], {"rank": 2}),
        ("extract", ["m1", "m0"], {"energy": 0.9, "te_rank": 1, "dtype": "bf16"}),
        ("resize", ["l1"], {"rank": 1}),
        ("resize", ["l1"], {"ratio": 0.5, "dtype": "fp32"}),
        ("merge", ["l1", "l2"], {"method": "svd", "rank": 2}),
        ("merge", ["l1", "l2"], {"method": "concat", "weights": [0.5, -0.25]}),
        ("convert", ["m1"], {"dtype": "fp32"}),
        ("convert", ["m1"], {"to": "safetensors", "dtype": "fp8_scaled,vae=keep", "prune": True}),
    ],
    ids=str,
)
def test_loras_and_other_dtypes_are_made_again_byte_for_byte(
    verb: str, names: list[str], options: dict[str, Any], files: Path
) -> None:
    paths = [files / f"{name}.safetensors" for name in names]
    made = Path("made.safetensors")
    if verb == "extract":
        sdops.extract(paths[0], base=paths[1], **options, output=made)
    else:
        getattr(sdops, verb)(*paths, **options, output=made)
    recipe.from_(made, output="made.toml")
    Path("again").mkdir()  # LoRAs have their names inside
    sdops.build("made.toml", output="again/made.safetensors", root=[files])
    assert Path("again/made.safetensors").read_bytes() == made.read_bytes()


def test_what_is_not_recorded_is_told(files: Path) -> None:
    """Another layout or container of the same tensors is led back to its file by turning it round, not by a recipe."""
    sdops.convert(files / "m1.safetensors", to="ckpt", output="made.ckpt")
    with pytest.raises(FormatError, match="does not say how it was made"):
        recipe.from_("made.ckpt")


STEPS = """
[inputs]
a = "m1.safetensors"
b = "m2.safetensors"
style = "l1.safetensors"
[[steps]]
id = "mixed"
verb = "merge"
models = ["a", "b"]
[[steps]]
id = "styled"
verb = "apply"
model = "mixed"
lora = [["style", 0.7]]
[[steps]]
verb = "merge"
models = ["styled", "mixed"]
lora = ["style:0.1"]
"""


def test_a_recipe_of_several_steps_is_recorded_in_its_result(files: Path) -> None:
    (files / "steps.toml").write_text(STEPS)
    sdops.build(files / "steps.toml", output="made.safetensors")
    found, _ = recipe.read_any(Path("made.safetensors"))
    assert [step.verb for step in found.steps] == ["merge", "apply", "merge"]
    assert len(found.inputs) == 3
    assert again(Path("made.safetensors"), files) == Path("made.safetensors").read_bytes()


def test_verify_proves_it(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sdops.merge(files / "m1.safetensors", files / "m2.safetensors", output="made.safetensors")
    report = recipe.from_("made.safetensors", verify=True, root=[files])
    assert report.data["verified"]["same_bytes"]
    assert not report.failed
    broken = bytearray(Path("made.safetensors").read_bytes())
    broken[-1] ^= 1
    Path("other.safetensors").write_bytes(broken)
    report = recipe.from_("other.safetensors", verify=True, root=[files])
    assert report.failed
    assert sorted(path.name for path in Path().iterdir()) == ["made.safetensors", "other.safetensors"]


def test_files_of_other_names_give_the_same_bytes(files: Path) -> None:
    sdops.merge(files / "m1.safetensors", files / "m2.safetensors", output="made.safetensors")
    recipe.from_("made.safetensors", output="r.toml")
    Path("mine.safetensors").write_bytes((files / "m1.safetensors").read_bytes())
    sdops.build("r.toml", inputs={"m1": "mine.safetensors"}, root=[files], output="again.safetensors")
    assert Path("again.safetensors").read_bytes() == Path("made.safetensors").read_bytes()
    with pytest.raises(MismatchError, match=r"`inputs\.m1`"):
        sdops.build("r.toml", inputs={"m1": files / "m3.safetensors"}, root=[files], output="x.safetensors")


def test_hints_of_a_proof_name_its_own_options(files: Path) -> None:
    sdops.merge(files / "m1.safetensors", files / "m2.safetensors", output="made.safetensors")
    with pytest.raises(SdopsError, match=r"`m1\.safetensors` is not in this folder") as missing:
        recipe.from_("made.safetensors", verify=True)
    assert str(missing.value.hint).startswith("`--input m1=FILE` names it, `--root FOLDER`")
    with pytest.raises(MismatchError) as other:
        recipe.from_("made.safetensors", verify=True, root=[files], inputs={"m1": files / "m3.safetensors"})
    assert other.value.hint == "`--input m1=FILE` names another one"
    with pytest.raises(UsageError) as unknown:
        recipe.from_("made.safetensors", verify=True, root=[files], inputs={"x": files / "m3.safetensors"})
    assert unknown.value.hint == "its inputs: --input m1=FILE, --input m2=FILE"


@pytest.mark.parametrize(
    "text",
    [
        "no json",
        "[]",
        "{}",
        '{"verb":"merge"}',
        '{"verb":"merge","inputs":[{"role":"a","file":"/etc/passwd"}],"method":"average"}',
        '{"verb":"os.system","inputs":[{"role":"a","file":"x"}]}',
        '{"verb":"merge","inputs":[{"role":"a","file":"x"}],"method":"average","jobs":4}',
        '{"verb":"merge","inputs":[{"role":"a","file":"x"}],"method":"average","output":"../x"}',
        '{"verb":"apply","rounded":"once","inputs":[{"role":"model","file":"x"}]}',
        "[" * 100_000,
    ],
)
def test_what_a_stranger_wrote_is_refused_or_harmless(text: str) -> None:
    tiny.write(Path("made.safetensors"), tiny.checkpoint(1), {"sdops": text})
    with pytest.raises(SdopsError):
        recipe.from_("made.safetensors", verify=True)


def test_a_file_that_says_nothing_is_told(files: Path) -> None:
    with pytest.raises(FormatError, match="does not say how it was made"):
        recipe.from_(files / "m1.safetensors")


def test_a_recipe_reads_back_as_it_was_written(files: Path) -> None:
    from sdops.verbs._recipe_text import parse_recipe
    from sdops.verbs._recipe_toml import to_toml

    (files / "steps.toml").write_text(STEPS)
    sdops.build(files / "steps.toml", output="made.safetensors")
    found, _ = recipe.read_any(Path("made.safetensors"))
    assert parse_recipe(to_toml(found), name="x") == found
    assert json.loads(json.dumps(recipe.check(found).as_dict()))["verb"] == "recipe check"


def chained(steps: int) -> str:
    """A record of so many merges, one in the other."""
    before, after = '{"verb": "merge", "inputs": [{"recipe": ', '}, {"file": "b.safetensors"}]}'
    merge = '{"verb": "merge", "inputs": [{"file": "a.safetensors"}, {"file": "b.safetensors"}]}'
    return before * (steps - 1) + merge + after * (steps - 1)


def wide(item: str) -> str:
    """A merge of many of the same."""
    return '{"verb": "merge", "inputs": [' + ", ".join(['{"recipe": ' + item + "}"] * 80) + "]}"


def said(text: str) -> Path:
    path = Path("said.safetensors")
    tiny.write(path, tiny.checkpoint(1, vae=False, clip=False), metadata={"sdops": text})
    return path


def test_a_record_of_many_steps_is_read_at_once() -> None:
    begin = time.process_time()
    assert recipe.from_(said(chained(100))).data["steps"] == 100
    assert time.process_time() - begin < 10  # it was a minute


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (chained(101), "more than 100 steps"),
        (chained(300), "nested too deeply"),
        (json.dumps({"verb": "merge", "inputs": [{"file": f"{n}"} for n in range(1001)]}), "more than 1,000 inputs"),
        (json.dumps({"verb": "merge", "inputs": [{"file": "a" * 6_000_000}]}), "not understood"),
        (wide(wide(chained(1))), "times over"),
    ],
    ids=["steps", "depth", "inputs", "size", "again and again"],
)
def test_an_endless_record_is_refused(text: str, problem: str) -> None:
    with pytest.raises(FormatError, match=problem):
        recipe.from_(said(text))


def test_what_a_stranger_wrote_into_a_record_is_shown_as_text() -> None:
    made = {"verb": "merge", "inputs": [{"file": "x\x9b31m\u202e.safetensors"}, {"file": "b.safetensors"}]}
    text = recipe.from_(said(json.dumps(made))).data["toml"]
    assert all(sign.isprintable() or sign == "\n" for sign in text)
    assert parse_recipe(text, name="x").inputs["x_31m"].file == "x\x9b31m\u202e.safetensors"
