"""Recipes of other verbs than merge and apply: conversions that others read, embeddings, training."""

from __future__ import annotations

import os
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


def test_embeddings_of_steps_and_training_are_refused(folder):
    Path("r.toml").write_text('[inputs]\na = "m0.safetensors"\n[[steps]]\nverb = "train lora"\nmodel = "a"\n')
    with pytest.raises(UsageError, match=r"`steps\.1\.verb`: recipes do not train") as caught:
        sdops.build("r.toml")
    assert "sdops train" in caught.value.hint
    Path("r.toml").write_text(EMBED.replace("[[steps]]", '[[steps]]\nid = "x"\nverb = "embed make"\nformula = "$one"\n'
                                            "[[steps]]").replace("* $two", "* $x"))  # fmt: skip
    with pytest.raises(UsageError, match=r"`embed make` reads files, `x` is a step"):
        sdops.build("r.toml")
