"""Recipes of other verbs than merge and apply: conversions that others read, embeddings, training."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest
import torch

import sdops
from sdops.errors import UsageError
from tests import tiny
from tests.embeddings import files

CONVERT = """
[inputs]
a = "m0.safetensors"
b = "m1.safetensors"
c = "m2.safetensors"
[[steps]]
id = "small"
verb = "convert"
file = "b"
to = "safetensors"
dtype = "bf16"
[[steps]]
id = "mixed"
verb = "merge"
models = ["a", "small"]
alpha = 0.3
[[steps]]
id = "wide"
verb = "convert"
file = "mixed"
to = "{}"
dtype = "fp32"
vae = "c"
[[steps]]
verb = "merge"
models = ["wide", "c", "small"]
method = "add-difference"
alpha = 0.5
"""
BLEND = """
[inputs]
base = "m0.safetensors"
one = "m1.safetensors"
two = "m2.safetensors"
[[steps]]
id = "first"
verb = "extract"
tuned = "one"
base = "base"
rank = 2
include = ["*attn2.to_k.weight"]
[[steps]]
id = "second"
verb = "extract"
tuned = "two"
base = "base"
rank = 2
include = ["*attn2.to_k.weight"]
[[steps]]
verb = "merge"
models = ["first", "second"]
method = "concat"
weights = [1.0, -1.0]
"""
EMBED = """
[inputs]
one = "first.pt"
two = "second.pt"
[parameters]
share = 0.25
[[steps]]
verb = "embed make"
formula = "$share * $one + (1 - $share) * $two"
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for seed in range(3):
        tiny.write(tmp_path / f"m{seed}.safetensors", tiny.checkpoint(seed))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_conversions_are_read_by_other_steps_without_a_file(folder):
    Path("r.toml").write_text(CONVERT.format("safetensors"))
    before = set(os.listdir())
    sdops.build("r.toml", output="built.safetensors")
    assert set(os.listdir()) - before == {"built.safetensors"}
    sdops.convert("m1.safetensors", to="safetensors", dtype="bf16", output="s1.safetensors")
    sdops.merge("m0.safetensors", "s1.safetensors", alpha=0.3, output="s2.safetensors")
    sdops.convert("s2.safetensors", to="safetensors", dtype="fp32", vae="m2.safetensors", output="s3.safetensors")
    sdops.merge("s3.safetensors", "m2.safetensors", "s1.safetensors", method="add-difference", alpha=0.5,
                output="s4.safetensors")  # fmt: skip
    built, wanted = tiny.load(Path("built.safetensors")), tiny.load(Path("s4.safetensors"))
    assert built.keys() == wanted.keys()
    assert all(tiny.same(built[key], wanted[key]) for key in built)


def test_a_recipe_out_of_such_a_result_makes_it_again(folder):
    Path("r.toml").write_text(CONVERT.format("safetensors"))
    sdops.build("r.toml", output="built.safetensors")
    sdops.recipe.from_("built.safetensors", output="again.toml")
    sdops.build("again.toml", output="again.safetensors")
    assert Path("again.safetensors").read_bytes() == Path("built.safetensors").read_bytes()


def test_what_is_no_file_of_tensors_cannot_be_read_by_others(folder):
    Path("r.toml").write_text(CONVERT.format("diffusers"))
    with pytest.raises(UsageError) as caught:
        sdops.build("r.toml")
    assert caught.value.message == "`steps.3`: other steps cannot read what is converted to diffusers"


def test_embeddings_are_made_of_inputs(folder):
    for name, number in (("first.pt", 1), ("second.pt", 2)):
        torch.save(files.a1111_dict(files.rows(3, 768, number)), name)
    Path("r.toml").write_text(EMBED)
    sdops.build("r.toml", output="made.safetensors")
    sdops.embed.make("0.25 * 'first.pt' + (1 - 0.25) * 'second.pt'", output="wanted.safetensors", name="made")
    made, wanted = tiny.load(Path("made.safetensors")), tiny.load(Path("wanted.safetensors"))
    assert made.keys() == wanted.keys()
    assert all(tiny.same(made[key], wanted[key]) for key in made)


CHAIN = (
    EMBED.replace("[[steps]]", '[[steps]]\nid = "mixed"')
    + """
dtype = "fp16"
[[steps]]
id = "both"
verb = "embed merge"
files = ["mixed", "one"]
mode = "collect"
to = "diffusers"
[[steps]]
verb = "embed convert"
file = "both"
only = "mixed"
to = "a1111"
"""
)


@pytest.fixture
def vectors(folder: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two embeddings; gives the folder where those that steps make for others wait."""
    for name, number in (("first.pt", 1), ("second.pt", 2)):
        torch.save(files.a1111_dict(files.rows(3, 768, number)), name)
    waiting = tmp_path_factory.mktemp("waiting")
    monkeypatch.setattr(tempfile, "tempdir", str(waiting))
    return waiting


def test_embeddings_are_made_of_those_that_other_steps_make(folder, vectors):
    Path("r.toml").write_text(CHAIN)
    before = set(os.listdir())
    report = sdops.build("r.toml", output="made.pt", dry_run=True)
    assert report.data["result"]["input"] == "both"
    assert set(os.listdir()) == before
    sdops.build("r.toml", output="made.pt")
    assert set(os.listdir()) - before == {"made.pt"}
    assert not list(vectors.iterdir())
    sdops.embed.make("0.25 * 'first.pt' + (1 - 0.25) * 'second.pt'", dtype="fp16", output="mixed.safetensors")
    sdops.embed.merge("mixed.safetensors", "first.pt", mode="collect", to="diffusers", output="both.safetensors")
    sdops.embed.convert("both.safetensors", only="mixed", to="a1111", output="wanted.pt")
    assert Path("made.pt").read_bytes() == Path("wanted.pt").read_bytes()


def test_a_sweep_of_embeddings(folder, vectors):
    Path("r.toml").write_text(CHAIN.replace('to = "a1111"', 'to = "kohya"'))
    sdops.build("r.toml", set_={"share": [0.1, 0.2]}, output="swept")
    assert len({path.read_bytes() for path in Path("swept").iterdir()}) == 2
    assert not list(vectors.iterdir())


def test_what_is_wrong_with_a_made_embedding_is_told_by_its_step(folder, vectors):
    for change, message in (
        (('only = "mixed"', 'only = "nix"'), r"^`steps\.3`: `both` holds no embedding `nix`"),
        (('to = "diffusers"', 'to = "difusers"'), r"^`steps\.2`: there is no layout `difusers`"),
    ):
        Path("r.toml").write_text(CHAIN.replace(*change))
        with pytest.raises(UsageError, match=message):
            sdops.build("r.toml", output="made.pt")
        assert not list(vectors.iterdir())


@pytest.mark.parametrize(
    ("step", "path", "message"),
    [
        ('verb = "merge"\nmodels = ["one", "mixed"]', "steps.2", "`mixed` makes embeddings, which `merge`"),
        ('verb = "apply"\nmodel = "two"\nlora = ["mixed:0.5"]', "steps.2", "which `apply` does not read"),
        ('verb = "embed make"\nformula = "cat"\nmodel = "mixed"', "steps.2.model", "`mixed` makes embeddings"),
        ('verb = "embed make"\nformula = "$mixed + $y"\n[[steps]]\nid = "y"\nverb = "merge"\nmodels = ["one", "two"]',
         "steps.2", "`embed make` reads files and embeddings, `y` makes neither"),
    ],
)  # fmt: skip
def test_steps_read_what_others_can_give(folder, step, path, message):
    Path("r.toml").write_text(EMBED.replace("[[steps]]", '[[steps]]\nid = "mixed"') + f"[[steps]]\n{step}\n")
    with pytest.raises(UsageError, match=message) as caught:
        sdops.recipe.check("r.toml")
    assert caught.value.data["path"] == path


def test_training_is_refused(folder):
    Path("r.toml").write_text('[inputs]\na = "m0.safetensors"\n[[steps]]\nverb = "train lora"\nmodel = "a"\n')
    with pytest.raises(UsageError, match=r"`steps\.1\.verb`: recipes do not train") as caught:
        sdops.build("r.toml")
    assert "sdops train" in caught.value.hint


def test_loras_that_steps_make_are_merged(folder: Path) -> None:
    Path("r.toml").write_text(BLEND)
    assert sdops.build("r.toml", dry_run=True).data["dry_run"]
    sdops.build("r.toml", output="blend.safetensors")
    extracted = {"base": "m0.safetensors", "rank": 2, "include": ["*attn2.to_k.weight"]}
    loras = [sdops.extract(f"m{n}.safetensors", **extracted, output=f"l{n}.safetensors").result[0] for n in (1, 2)]
    sdops.merge(*loras, method="concat", weights=[1.0, -1.0], output="apart.safetensors")
    assert tiny.load(Path("blend.safetensors")).keys() == tiny.load(Path("apart.safetensors")).keys()
    for key, (dtype, values) in tiny.load(Path("apart.safetensors")).items():
        found, there = tiny.load(Path("blend.safetensors"))[key]
        assert found == dtype
        assert values.tobytes() == there.tobytes()
