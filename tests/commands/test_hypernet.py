"""`sdops hypernet ...` on the command line."""

from __future__ import annotations

import os

import pytest
import torch
from safetensors.torch import load_file

from tests import tiny
from tests.hypernetworks import files


@pytest.fixture
def model(tmp_path):
    """Enough of an SD1 to be recognised, one attention's layers whole."""
    found = tiny.checkpoint(dtype="F32", clip=False, vae=False)
    name = f"{tiny.UNET}input_blocks.1.1.transformer_blocks.0.attn2"
    generator = torch.Generator().manual_seed(3)
    for part, columns in (("to_k", 768), ("to_v", 768), ("to_out.0", 320)):
        weight = torch.randn(320, columns, generator=generator) / 18
        found[f"{name}.{part}.weight"] = ("F32", weight.numpy())
    found[f"{name}.to_out.0.bias"] = ("F32", torch.zeros(320).numpy())
    return str(tiny.write(tmp_path / "sd1.safetensors", found))


@pytest.fixture
def style(tmp_path):
    """A linear network of few hidden units for texts of SD1."""
    made = files.modules((768,), structure=[1, 0.01, 1])
    return str(files.write(tmp_path / "style.pt", made, layer_structure=[1, 0.01, 1]))


def test_inspect(sdops, style):
    outcome = sdops("hypernet", "inspect", style)
    assert outcome.code == 0
    assert "768-7-768" in outcome.out
    assert "v1-5-pruned [81761151]" in outcome.out
    facts = sdops("hypernet", "inspect", style, "--effect", "--json").json["files"][0]
    assert facts["linear"] is True
    assert facts["widths"] == [768]
    assert 0 < facts["chains"][0]["directions"] <= 7


def test_convert_and_back(sdops, style, tmp_path):
    outcome = sdops("hypernet", "convert", style, "-q")
    assert outcome.out.strip() == str(tmp_path / "style.safetensors")
    assert sdops("hypernet", "convert", "style.safetensors", "-o", "back.pt").code == 0
    first, second = (torch.load(path, weights_only=True) for path in (style, "back.pt"))
    assert list(first) == list(second)
    assert all(torch.equal(first[768][0][key], value) for key, value in second[768][0].items())
    assert sdops("hypernet", "convert", style).code == 1  # it exists
    assert "would write" in sdops("hypernet", "convert", style, "-o", "other.safetensors", "-n").out
    assert not os.path.exists("other.safetensors")


def test_merge(sdops, style):
    assert sdops("hypernet", "merge", style, style, "--weights", "0.25,0.5", "-o", "both.pt").code == 0
    found = torch.load("both.pt", weights_only=True)
    assert found[768][0]["linear.0.weight"].shape == (14, 768)
    same = sdops("hypernet", "merge", f"{style}:0.25", f"{style}:0.5", "-o", "same.pt", "--name", "both")
    assert same.code == 0, same.err
    again = torch.load("same.pt", weights_only=True)
    assert all(torch.equal(found[768][0][key], value) for key, value in again[768][0].items())
    wrong = sdops("hypernet", "merge", style, style, "--weights", "1,x", "-o", "x.pt")
    assert (wrong.code, "no list of numbers" in wrong.err) == (2, True)
    assert sdops("hypernet", "merge", style, style, "--weights", "1", "-o", "x.pt").code == 2
    missing = sdops("hypernet", "merge", style)
    assert (missing.code, "'-o'" in missing.err) == (2, True)


def test_apply_and_to_lora_do_the_same(sdops, model, style):
    report = sdops("hypernet", "apply", model, f"{style}:0.5", "-o", "baked.safetensors", "--json")
    assert report.json["contexts"][0]["exact"] is True
    lora = sdops(
        "hypernet", "to-lora", f"{style}:0.5", "--model", model, "--rank", "8", "--dtype", "fp32", "-o", "l.safetensors"
    )
    assert lora.code == 0
    assert "diff_b" in lora.err  # who reads changes of biases
    assert sdops("apply", model, "--lora", "l.safetensors", "-o", "applied.safetensors").code == 0
    before, baked, applied = (load_file(path) for path in (model, "baked.safetensors", "applied.safetensors"))
    changed = {key for key, value in before.items() if not torch.equal(value, baked[key])}
    assert {key.rsplit("attn2.", 1)[1] for key in changed} == {"to_k.weight", "to_v.weight", "to_out.0.bias"}
    for key, value in baked.items():
        torch.testing.assert_close(applied[key], value, rtol=0, atol=1e-5)


def test_a_dry_run_writes_nothing(sdops, model, style, tmp_path):
    before = sorted(os.listdir(tmp_path))
    assert "nothing was written" in sdops("hypernet", "apply", model, style, "-n").err
    assert "nothing was written" in sdops("hypernet", "to-lora", style, "--model", model, "-n").err
    assert sorted(set(os.listdir(tmp_path)) - {"cache"}) == before


def test_curved_networks_say_how_well_they_fit(sdops, model, tmp_path):
    path = str(files.write(tmp_path / "c.pt", files.modules((768,), activation="relu"), activation_func="relu"))
    refused = sdops("hypernet", "apply", model, path, "-o", "x.safetensors")
    assert (refused.code, "`--fit`" in refused.err) == (1, True)
    without_text = sdops("hypernet", "apply", model, path, "-o", "x.safetensors", "--fit")
    assert (without_text.code, "no text encoder" in without_text.err) == (1, True)
    other = str(
        files.write(
            tmp_path / "n.pt",
            files.modules((768,), activation="relu", norm=True),
            activation_func="relu",
            is_layer_norm=True,
        )
    )
    merged = sdops("hypernet", "merge", path, other, "-o", "x.pt")
    assert (merged.code, "to-lora" in merged.err) == (1, True)
    assert not os.path.exists("x.safetensors")


class Bomb:
    def __reduce__(self):
        return os.system, ("echo pwned > pwned",)


def _wrong(tmp_path):
    """What users and strangers give in place of a hypernetwork, and a word that the error must have."""
    good = files.write(tmp_path / "good.pt", files.modules((768,)))
    half = tmp_path / "half.pt"
    half.write_bytes(good.read_bytes()[: good.stat().st_size // 2])
    torch.save({768: ({"linear.0.weight": Bomb()}, {})}, tmp_path / "bomb.pt")
    made = files.modules((768,))
    made[768][1].linear[0].bias.data[5] = float("nan")
    torch.save({"string_to_param": {"*": torch.zeros(2, 768)}}, tmp_path / "embedding.pt")
    return {
        tmp_path / "absent.pt": "absent.pt",
        half: "half.pt",
        tmp_path / "bomb.pt": "bomb.pt",
        files.write(tmp_path / "nan.pt", made): "NaN",
        tmp_path / "embedding.pt": "holds no hypernetwork",
        files.write(tmp_path / "sdxl.pt", files.modules((2048,), structure=[1, 0.01, 1])): "2048",
    }


def test_wrong_files_are_named_and_nothing_is_run_or_written(sdops, model, tmp_path):
    for path, word in _wrong(tmp_path).items():
        calls = [("apply", model, str(path)), ("to-lora", str(path), "--model", model)]
        if word != "2048":  # a fine network, for another model
            calls += [("inspect", str(path)), ("merge", str(path), "-o", "m.pt")]
        for call in calls:
            outcome = sdops("hypernet", *call)
            assert outcome.code == 1, call
            assert word in outcome.err
            assert "hint" in outcome.err
    assert not {"pwned", "m.pt", "nan.lora.safetensors"} & set(os.listdir(tmp_path))


def test_wrong_options_are_explained(sdops, model, style):
    assert "did you mean `safetensors`?" in sdops("hypernet", "convert", style, "--to", "safetensor").err
    strength = sdops("hypernet", "apply", model, f"{style}:much")
    assert (strength.code, "`much` is no strength" in strength.err) == (2, True)
    dialect = sdops("hypernet", "to-lora", style, "--model", model, "--to", "kohia")
    assert (dialect.code, "kohya" in dialect.err) == (2, True)
    assert sdops("hypernet", "convert", style, "-o", "x.safetensors", "--to", "novelai").code == 2
