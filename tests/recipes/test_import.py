"""Recipes of mergekit, supermerger and the A1111 web UI; and what a wrong recipe is told."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sdops.errors import FormatError, SdopsError, UsageError
from sdops.verbs import recipe
from sdops.verbs._recipe_check import check_recipe
from sdops.verbs._recipe_text import parse_recipe
from tests import tiny

TIES = """
models:
  - model: org/one
    parameters: {weight: 0.5, density: 0.3}
  - model: org/two.safetensors
    parameters: {weight: 3e-1, density: 0.3}
merge_method: ties
base_model: org/base
parameters: {normalize: true, int8_mask: true}
dtype: bfloat16
"""


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_mergekit(tmp_path: Path) -> None:
    Path("m.yaml").write_text(TIES)
    found, _ = recipe.read_any(Path("m.yaml"))
    (step,) = found.steps
    assert step.arguments["method"] == "ties"
    assert step.arguments["models"] == ["one", "two_safetensors"]
    assert step.arguments["base"] == "base"
    assert step.arguments["weights"] == [0.5, 0.3]
    assert step.arguments["density"] == 0.3
    assert step.arguments["dtype"] == "bf16"
    check_recipe(found)


@pytest.mark.parametrize(
    "text", ["a: &x [1]\nb: *x", "!!python/object/apply:os.system ['x']", "[", "- 1", "models: 3", "slices: []", "x: y"]
)
def test_strange_yaml_is_refused(text: str) -> None:
    Path("m.yml").write_text(text)
    with pytest.raises((FormatError, UsageError)):
        recipe.read_any(Path("m.yml"))


def test_web_uis() -> None:
    digest = {name: sign * 64 for name, sign in (("a", "a"), ("b", "b"), ("c", "c"))}
    made = {"type": "webui", "primary_model_hash": digest["a"], "secondary_model_hash": digest["b"],
            "tertiary_model_hash": digest["c"], "interp_method": "Add difference", "multiplier": 0.7,
            "save_as_half": True}  # fmt: skip
    models = {digest["a"]: {"name": "first", "legacy_hash": "x"}}
    metadata = {"sd_merge_recipe": json.dumps(made), "sd_merge_models": json.dumps(models)}
    path = tiny.write(Path("merged.safetensors"), tiny.checkpoint(1), metadata)
    found, warnings = recipe.read_any(path)
    (step,) = found.steps
    assert step.arguments == {"models": ["a", "b", "c"], "method": "add-difference", "alpha": 0.7, "dtype": "fp16"}
    assert found.inputs["a"].sha256 == digest["a"]
    assert found.inputs["a"].about == "first"
    assert warnings
    check_recipe(found)


MERGE = '[inputs]\na = "a.safetensors"\nb = "b.safetensors"\n[[steps]]\nverb = "merge"\nmodels = ["a", "b"]\n'


@pytest.mark.parametrize(
    ("text", "path", "hint"),
    [
        (MERGE + "alhpa = 0.3", "steps.1.alhpa", "alpha"),
        (MERGE.replace('"merge"', '"mrege"'), "steps.1.verb", "merge"),
        (MERGE + 'method = "weighted-smu"', "steps.1.method", ""),
        (MERGE + 'missing = "kepe"', "steps.1.missing", "keep"),
        (MERGE + "prune = 1", "steps.1.prune", ""),
        (MERGE + "jobs = 4", "steps.1.jobs", "build"),
        (MERGE.replace('["a", "b"]', '["a", "bb"]'), "steps.1.models.2", "b"),
        (MERGE.replace('["a", "b"]', '["a"]') + '\nmethod = "slerp"', "steps.1.models", "slerp"),
        (MERGE + 'method = "ties"', "steps.1.base", "base"),
        (MERGE + 'method = "truncate-rank"\nrank = 0.5', "steps.1", ""),
        (MERGE + 'alpha = "$alhpa"\n[parameters]\nalpha = 0.5', "steps.1.alpha", "alpha"),
        (MERGE + 'output = "../x"', "steps.1.output", ""),
        (MERGE + '[[steps]]\nverb = "merge"\nmodels = ["a", "b"]', "steps.1", "output"),
        (MERGE + '[inputz]\na = "x"', "inputz", "inputs"),
        ('[inputs]\nset = "x"\n' + MERGE.partition("\n")[2], "inputs.set", ""),
        (MERGE + "[parameters]\nx = { default = 2, range = [0, 1] }", "parameters.x.default", ""),
    ],
)
def test_wrong_recipes_are_told_where_and_what_was_meant(text: str, path: str, hint: str) -> None:
    with pytest.raises(UsageError) as caught:
        check_recipe(parse_recipe(text, name="r"))
    assert str(caught.value.data["path"]).startswith(path)
    assert hint in f"{caught.value.message} {caught.value.hint}"


def test_circles_and_endless_records_are_refused() -> None:
    circle = '[[steps]]\nid = "x"\nverb = "merge"\nmodels = ["y", "y"]\n'
    circle += '[[steps]]\nid = "y"\nverb = "merge"\nmodels = ["x", "x"]\n'
    with pytest.raises(UsageError, match="a circle"):
        check_recipe(parse_recipe(circle, name="r"))
    deep = '[inputs]\ns0 = "a"\n' + "".join(
        f'[[steps]]\nid = "s{n}"\nverb = "merge"\nmodels = ["s{n - 1}", "s{n - 1}"]\n' for n in range(1, 60)
    )
    with pytest.raises(UsageError, match="times over"):
        check_recipe(parse_recipe(deep, name="r"))


def test_nothing_is_imported_to_check_a_recipe(tmp_path: Path) -> None:
    import subprocess
    import sys

    Path("r.toml").write_text(MERGE + "alhpa = 0.3")
    code = "import sys; from sdops.commands.main import main; main(sys.argv[1:]); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code, "build", "r.toml"], check=True, capture_output=True, text=True)
    assert "steps.1.alhpa" in done.stderr
    assert not {"torch", "numpy", "sdops.verbs.merge"} & set(done.stdout.split())


def test_what_is_no_recipe_is_told() -> None:
    for name, text in (("x.toml", "not toml"), ("y.toml", ""), ("z.toml", "steps = 3")):
        Path(name).write_text(text)
        with pytest.raises(SdopsError):
            recipe.check(name)
    with pytest.raises(SdopsError, match="neither a recipe file nor a preset `inpaintng`") as caught:
        recipe.check("inpaintng")
    assert "inpainting" in str(caught.value.hint)
