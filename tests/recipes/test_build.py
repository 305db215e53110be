"""`build`: the same bytes as the commands one after the other, in one pass, from the files that it may read."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import sdops
from sdops.errors import MismatchError, OutputError, SdopsError, UsageError
from tests import tiny

HEAD = """
[inputs]
a = "m1.safetensors"
b = "m2.safetensors"
base = "m0.safetensors"
"""


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Four checkpoints in the folder that one works in."""
    for seed in range(4):
        tiny.write(tmp_path / f"m{seed}.safetensors", tiny.checkpoint(seed))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def recipe(models: Path) -> Callable[[str], Path]:
    def write(text: str, name: str = "r.toml") -> Path:
        (models / name).write_text(text)
        return models / name

    return write


def same_tensors(a: Path, b: Path) -> bool:
    one, two = tiny.load(a), tiny.load(b)
    return one.keys() == two.keys() and all(tiny.same(one[key], two[key]) for key in one)


# Two steps use the first one, in the portions that their classes of methods want.
DIAMOND = (
    HEAD
    + """
c = "m3.safetensors"
[[steps]]
id = "first"
verb = "merge"
models = ["a", "b"]
method = "{0}"
[[steps]]
id = "left"
verb = "merge"
models = ["first", "c", "base"]
method = "add-difference"
alpha = "0.5, IN00-IN05=0.25"
[[steps]]
verb = "merge"
models = ["left", "first"]
method = "{1}"
"""
)


@pytest.mark.parametrize(
    ("inner", "outer"), [("weighted-sum", "slerp"), ("slerp", "weighted-sum"), ("nuslerp-rows", "tensor-sum")]
)
def test_a_build_gives_what_the_commands_give_one_after_the_other(recipe, models, inner, outer):
    sdops.build(recipe(DIAMOND.format(inner, outer)), output="built.safetensors")
    sdops.merge("m1.safetensors", "m2.safetensors", method=inner, output="s1.safetensors")
    sdops.merge("s1.safetensors", "m3.safetensors", "m0.safetensors", method="add-difference",
                alpha="0.5, IN00-IN05=0.25", output="s2.safetensors")  # fmt: skip
    sdops.merge("s2.safetensors", "s1.safetensors", method=outer, output="s3.safetensors")
    assert same_tensors(Path("built.safetensors"), Path("s3.safetensors"))


def test_no_file_but_the_result_appears(recipe, models, monkeypatch):
    made = recipe(DIAMOND.format("weighted-sum", "slerp"))
    before = set(os.listdir())
    sdops.build(made)
    assert set(os.listdir()) - before == {"r.safetensors"}


def test_any_number_of_threads_gives_the_same_bytes(recipe, models):
    made = recipe(
        DIAMOND.format("slerp", "ties").replace('models = ["left", "first"]', 'models = ["left"]\nbase = "a"')
    )
    for jobs in (1, 4):
        sdops.build(made, output=f"{jobs}.safetensors", jobs=jobs)
    assert Path("1.safetensors").read_bytes() == Path("4.safetensors").read_bytes()


def test_a_shared_step_is_computed_once(recipe, models, monkeypatch):
    """Eight steps that each use the one before twice: without a memory the first would be computed 2^8 times."""
    from sdops.core.merged import Merged

    text = HEAD + '[[steps]]\nid = "s0"\nverb = "merge"\nmodels = ["a", "b"]\n'
    for number in range(1, 9):
        text += f'[[steps]]\nid = "s{number}"\nverb = "merge"\nmodels = ["s{number - 1}", "s{number - 1}", "base"]\n'
        text += 'method = "add-difference"\nalpha = 0.1\n'
    reads: list[str] = []
    real = Merged.read_into

    def counted(self: Merged, key: str, start: int, buffer: memoryview) -> None:
        reads.append(key)
        real(self, key, start, buffer)

    monkeypatch.setattr(Merged, "read_into", counted)
    sdops.build(recipe(text), jobs=1)
    assert len(reads) < 20 * len(tiny.checkpoint(1))


def test_outputs_that_steps_ask_for_are_written(recipe, models):
    made = recipe(
        DIAMOND.format("weighted-sum", "slerp").replace('id = "left"', 'id = "left"\noutput = "left.safetensors"')
    )
    report = sdops.build(made)
    assert report.result == ["left.safetensors", "r.safetensors"]
    assert Path("left.safetensors").exists()
    with pytest.raises(SdopsError, match="exists"):
        sdops.build(made, output="other.safetensors")
    assert not Path("other.safetensors").exists()


def test_a_dry_run_writes_nothing(recipe, models):
    made = recipe(DIAMOND.format("weighted-sum", "slerp"))
    before = set(os.listdir())
    report = sdops.build(made, dry_run=True)
    assert report.data["dry_run"]
    assert [step["id"] for step in report.data["steps"]] == ["first", "left", "step3"]
    assert set(os.listdir()) == before


# -------------------------------------------------------------------------------------------------------------- inputs

ONE = """
[inputs]
model = {{ about = "any model" }}
other = {}
[[steps]]
verb = "merge"
models = ["model", "other"]
"""


def test_roles_are_given_and_any_input_can_be_another(recipe, models):
    made = recipe(ONE.format('"m2.safetensors"'))
    with pytest.raises(UsageError, match="has to be given `model`") as caught:
        sdops.build(made)
    assert "--model FILE: any model" in str(caught.value.hint)
    sdops.build(made, inputs={"model": "m1.safetensors"}, output="one.safetensors")
    sdops.build(made, inputs={"model": "m1.safetensors", "other": "m3.safetensors"}, output="two.safetensors")
    assert not same_tensors(Path("one.safetensors"), Path("two.safetensors"))
    with pytest.raises(UsageError, match="has no input `modle`") as caught:
        sdops.build(made, inputs={"modle": "m1.safetensors"})
    assert "--model" in str(caught.value.hint)


@pytest.mark.parametrize(
    "file", ["/etc/passwd", "../m2.safetensors", "x/../../m2.safetensors", "~/m2.safetensors", "C:\\m2", "..\\m2", ""]
)
def test_a_recipe_cannot_name_files_elsewhere(recipe, models, file):
    made = recipe(ONE.format(f"'{file}'"))
    with pytest.raises(UsageError, match=r"leads outside|has to be given `other`"):
        sdops.build(made, inputs={"model": "m1.safetensors"})


def test_links_that_lead_outside_are_refused_unless_given(recipe, models, tmp_path_factory):
    outside = tiny.write(tmp_path_factory.mktemp("outside") / "secret.safetensors", tiny.checkpoint(2))
    Path("link.safetensors").symlink_to(outside)
    made = recipe(ONE.format('"link.safetensors"'))
    with pytest.raises(UsageError, match="leads outside"):
        sdops.build(made, inputs={"model": "m1.safetensors"})
    sdops.build(made, inputs={"model": "m1.safetensors", "other": "link.safetensors"})


@pytest.mark.parametrize("file", ["folder", "m.safetensors.index.json"])
def test_what_an_input_consists_of_cannot_lie_elsewhere(recipe, models, tmp_path_factory, file):
    tensors = tiny.checkpoint(2)
    outside = tiny.write(tmp_path_factory.mktemp("outside") / "secret.safetensors", tensors)
    Path("link.safetensors").symlink_to(outside)
    Path("m.safetensors.index.json").write_text(json.dumps({"weight_map": dict.fromkeys(tensors, "link.safetensors")}))
    Path("folder/unet").mkdir(parents=True)
    Path("folder/unet/diffusion_pytorch_model.safetensors").symlink_to(outside)
    made = recipe(ONE.format(f'"{file}"'))
    with pytest.raises(UsageError, match=r"`inputs.other.file`: `.*` is a link that leads outside"):
        sdops.build(made, inputs={"model": "m1.safetensors"}, dry_run=True)
    if file != "folder":
        sdops.build(made, inputs={"model": "m1.safetensors", "other": file}, dry_run=True)


def test_a_name_that_no_file_can_have_is_told(recipe, models):
    with pytest.raises(SdopsError, match=r"`inputs.other`: `x+… .*is not in"):
        sdops.build(recipe(ONE.format(f'"{"x" * 5000}"')), inputs={"model": "m1.safetensors"})


@pytest.mark.parametrize("file", ["https://example.com/x.safetensors", "file:///etc/passwd", "s3://b/x"])
def test_other_addresses_are_refused(recipe, models, file):
    with pytest.raises(UsageError, match="leads outside"):
        sdops.build(recipe(ONE.format(f'"{file}"')), inputs={"model": "m1.safetensors"})


def test_files_lie_beside_the_recipe_here_or_in_a_root(recipe, models, tmp_path_factory, monkeypatch):
    made = recipe(ONE.format('"sub/m9.safetensors"'))
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    monkeypatch.chdir(elsewhere)
    given: dict[str, Any] = {"inputs": {"model": models / "m1.safetensors"}}
    with pytest.raises(SdopsError, match=r"`sub/m9\.safetensors` is neither in") as caught:
        sdops.build(made, **given)
    assert "--other FILE" in str(caught.value.hint)
    root = tmp_path_factory.mktemp("root")
    (root / "sub").mkdir()
    tiny.write(root / "sub" / "m9.safetensors", tiny.checkpoint(2))
    sdops.build(made, **given, root=[root], output=elsewhere / "out.safetensors")


@pytest.mark.parametrize("output", ["../x.safetensors", "/x.safetensors"])
def test_outputs_of_steps_stay_below(recipe, models, output):
    text = DIAMOND.format("weighted-sum", "slerp").replace('id = "left"', f'id = "left"\noutput = "{output}"')
    with pytest.raises(UsageError, match=r"`steps.2.output`: `.*` leads outside"):
        sdops.build(recipe(text))


def test_the_result_does_not_take_the_place_of_a_step_s_output(recipe, models):
    steps = '[[steps]]\nid = "one"\nverb = "merge"\nmodels = ["a", "b"]\noutput = "x.safetensors"\n'
    made = recipe(HEAD + steps + '[[steps]]\nverb = "merge"\nmodels = ["one", "b"]\n')
    with pytest.raises(OutputError, match="written twice"):
        sdops.build(made, output="./x.safetensors", force=True)
    report = sdops.build(made, output="y.safetensors", force=True)
    assert ["wrote", "x.safetensors, step `one`"] in [list(row) for row in report.sections[0].rows]


@pytest.mark.parametrize("last", [True, False])
def test_outputs_of_steps_do_not_follow_links(recipe, models, tmp_path_factory, last):
    outside = tmp_path_factory.mktemp("outside")
    Path("link").symlink_to(outside)
    more = "" if last else '[[steps]]\nverb = "merge"\nmodels = ["one", "b"]\n'
    text = HEAD + '[[steps]]\nid = "one"\nverb = "merge"\nmodels = ["a", "b"]\noutput = "link/x.safetensors"\n' + more
    with pytest.raises(UsageError, match=r"`steps.1.output`: `link/x.safetensors` goes through a link"):
        sdops.build(recipe(text))
    assert not list(outside.iterdir())


def test_an_input_that_hashes_to_something_else_is_refused(recipe, models):
    right = sdops.hash("m2.safetensors").data["files"][0]["sha256"]
    for digest, fits in ((right, True), ("0" * 64, False)):
        made = recipe(ONE.format(f'{{ file = "m2.safetensors", sha256 = "{digest}" }}'))
        options: dict[str, Any] = {"inputs": {"model": "m1.safetensors"}, "force": True}
        if fits:
            sdops.build(made, **options)
            continue
        for more in ({}, {"hash_inputs": False}, {"dry_run": True}):
            Path("r.safetensors").unlink(missing_ok=True)
            with pytest.raises(MismatchError, match=r"`inputs\.other`: `.*m2.safetensors` is not the file"):
                sdops.build(made, **options, **more)
            assert not Path("r.safetensors").exists()
        sdops.build(made, **options, ignore_hashes=True)
