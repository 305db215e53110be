"""`sdops custom ...` on the command line."""

from __future__ import annotations

import json
import os

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests import tiny
from tests.custom_diffusion import files


@pytest.fixture
def model(tmp_path):
    """Enough of an SD1 to be recognised, with the layers that the files change."""
    found = tiny.checkpoint(dtype="F32", clip=False, vae=False)
    for layer, weight in files.weights().items():
        found[f"{tiny.UNET}{layer}.weight"] = ("F32", weight.numpy())
    return str(tiny.write(tmp_path / "sd1.safetensors", found))


def test_inspect(sdops, model, tmp_path):
    path = str(files.adobe(tmp_path))
    outcome = sdops("custom", "inspect", path)
    assert outcome.code == 0
    assert "2 x to_k, 2 x to_v" in outcome.out
    assert "`<new1>`" in outcome.out
    facts = sdops("custom", "inspect", path, "--model", model, "--json").json["files"][0]
    assert facts["layers"][0]["relative"] > 0


def test_convert(sdops, tmp_path):
    path = str(files.adobe(tmp_path))
    os.mkdir("out")
    outcome = sdops("custom", "convert", path, "--to", "diffusers", "-o", "out/", "-q")
    assert outcome.out.split() == ["out/pytorch_custom_diffusion_weights.safetensors", "out/<new1>.safetensors"]
    back = sdops("custom", "convert", "out", "--to", "adobe", "-o", "back.bin")
    assert back.code == 0
    first, second = (torch.load(each, weights_only=True) for each in (path, "back.bin"))
    assert all(torch.equal(value, second["unet"][key]) for key, value in first["unet"].items())
    assert torch.equal(first["modifier_token"]["<new1>"], second["modifier_token"]["<new1>"])
    refused = sdops("custom", "convert", path, "--to", "webui")
    assert (refused.code, "`--to compvis`" in refused.err) == (1, True)


def test_apply_and_to_lora_do_the_same(sdops, model, tmp_path):
    path = str(files.compressed(tmp_path))
    assert sdops("custom", "apply", model, f"{path}:0.5", "-o", "a.safetensors").code == 0
    assert sdops("custom", "to-lora", path, "-o", "l.safetensors").code == 0
    assert sdops("apply", model, "--lora", "l.safetensors:0.5", "-o", "b.safetensors").code == 0
    first, second = load_file("a.safetensors"), load_file("b.safetensors")
    assert all(torch.equal(value, second[key]) for key, value in first.items())
    assert not torch.equal(first[f"{tiny.UNET}{files.LAYERS[0]}.weight"], files.weights()[files.LAYERS[0]])
    assert sdops("inspect", "l.safetensors", "--json").json["files"][0]["adapter"]["dialect"] == "kohya"


def test_a_dry_run_writes_nothing(sdops, model, tmp_path):
    path = str(files.compressed(tmp_path))
    before = sorted(os.listdir(tmp_path))
    for call in (("apply", model, path), ("to-lora", path), ("convert", path, "--to", "webui")):
        outcome = sdops("custom", *call, "-n")
        assert outcome.code == 0
        assert "would" in outcome.out + outcome.err or "nothing was written" in outcome.err
    assert sorted(set(os.listdir(tmp_path)) - {"cache"}) == before


class Bomb:
    def __reduce__(self):
        return os.system, ("echo pwned > pwned",)


def _wrong(tmp_path):
    """What users and strangers give in place of custom diffusion, and a word that the error must have."""
    good = files.compressed(tmp_path)
    half = tmp_path / "half.bin"
    half.write_bytes(good.read_bytes()[: good.stat().st_size // 2])
    torch.save({"unet": {"x.attn2.to_k.weight": Bomb()}}, tmp_path / "bomb.bin")
    pairs = torch.load(good, weights_only=True)
    next(iter(pairs["unet"].values()))["u"][3, 1] = float("nan")
    torch.save(pairs, tmp_path / "nan.bin")
    names = (f"{files.diffusers(layer)}.weight" for layer in files.LAYERS)
    torch.save({"unet": {name: torch.zeros(320, 1024) for name in names}}, tmp_path / "sd2.bin")
    save_file({"a": torch.zeros(2)}, tmp_path / "other.safetensors")
    return {
        tmp_path / "absent.bin": "absent.bin",
        half: "half.bin",
        tmp_path / "bomb.bin": "bomb.bin",
        tmp_path / "nan.bin": "NaN",
        tmp_path / "sd2.bin": "is for sd2",
        tmp_path / "other.safetensors": "holds no custom diffusion",
    }


def test_wrong_files_are_named_and_nothing_is_run_or_written(sdops, model, tmp_path):
    for path, word in _wrong(tmp_path).items():
        calls = [("apply", model, str(path)), ("to-lora", str(path), "--model", model)]
        calls.append(("merge", str(path), "--model", model, "-o", "m.safetensors"))
        for call in calls:
            outcome = sdops("custom", *call)
            assert outcome.code == 1, call
            assert word in outcome.err or (word == "NaN" and call[0] == "merge"), call  # merge wants a text encoder
    left = set(os.listdir(tmp_path))
    assert not {"pwned", "m.safetensors", "nan.lora.safetensors"} & left
    assert not [name for name in left if "+" in name]


def test_wrong_options_are_explained(sdops, model, tmp_path):
    path = str(files.adobe(tmp_path))
    strength = sdops("custom", "apply", model, f"{path}:much")
    assert (strength.code, "`much` is no strength" in strength.err) == (2, True)
    base = sdops("custom", "to-lora", path)
    assert (base.code, "`--model M`" in base.err) == (1, True)
    assert "did you mean `adobe`?" in sdops("custom", "convert", path, "--to", "adob").err
    missing = sdops("custom", "merge", path, "--model", model)
    assert (missing.code, "'-o'" in missing.err) == (2, True)


@pytest.mark.parametrize("writer", [files.adobe, files.compressed, files.webui, files.diffusers_bin])
def test_apply_points_to_the_command_for_it(writer, sdops, model, tmp_path):
    path = str(writer(tmp_path))
    outcome = sdops("apply", model, "--lora", f"{path}:0.7")
    assert outcome.code == 1
    assert f"sdops custom apply MODEL {path}" in " ".join(outcome.err.split())
    header = {"json": json.dumps({"entries": {}})}
    save_file({"weight": torch.zeros(3, 3)}, tmp_path / "none.safetensors", metadata=header)
    assert "is no adapter file" in sdops("apply", model, "--lora", str(tmp_path / "none.safetensors")).err
