"""`apply` writes what the model is: one file, shards, or a folder of diffusers with everything that was in it."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

import sdops
from sdops.core.source import read
from sdops.errors import FormatError, OutputError
from sdops.formats import open_source
from sdops.formats.gguf import GgufFile
from tests import tiny

Made = tuple[Path, Path]


@pytest.fixture(scope="module")
def small(small_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Made:
    """A small SD1.5, and a LoRA that fits it."""
    base, tuned = small_checkpoint("sd15", dtype="F16"), small_checkpoint("sd15", dtype="F16", tuned=1)
    lora = tmp_path_factory.mktemp("lora") / "lora.safetensors"
    sdops.extract(tuned, base=base, rank=2, include=["*attn*"], output=lora)
    return base, lora


def tensors(path: Path) -> dict[str, bytes]:
    with closing(open_source(path)) as source:
        return {key: bytes(read(source, key)) for key in source.specs}


def test_a_folder_becomes_a_folder(small: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, lora = small
    monkeypatch.chdir(tmp_path)
    folder, single = tmp_path / "model", tmp_path / "single.safetensors"
    sdops.convert(base, to="diffusers", output=folder)
    lazy = sdops.apply(folder, lora=[f"{lora}:0.5"])
    name = lazy.derived_name()
    assert name == "model+lora0.5"
    lazy.save(tmp_path / name)
    sdops.apply(base, lora=[f"{lora}:0.5"], output=single)
    sdops.convert(single, to="diffusers", output=tmp_path / "wanted")
    assert tensors(tmp_path / name) == tensors(tmp_path / "wanted")
    inside = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    made = {path.relative_to(tmp_path / name).as_posix() for path in (tmp_path / name).rglob("*") if path.is_file()}
    assert made == inside - {"sdops_extra.safetensors"}
    assert json.loads((tmp_path / name / "model_index.json").read_text())["_class_name"] == "StableDiffusionPipeline"
    with closing(open_source(tmp_path / name / "unet" / "diffusion_pytorch_model.safetensors")) as source:
        assert json.loads(source.metadata["sdops"])["verb"] == "apply"
        assert "sha256" in json.loads(source.metadata["sdops"])["inputs"][0]
    with pytest.raises(OutputError, match="exists already"):
        lazy.save(tmp_path / name)


def test_a_folder_becomes_a_single_file_of_that_name(small: Made, tmp_path: Path) -> None:
    base, lora = small
    sdops.convert(base, to="diffusers", output=tmp_path / "model")
    sdops.apply(tmp_path / "model", lora=[lora], output=tmp_path / "one.safetensors")
    sdops.apply(base, lora=[lora], output=tmp_path / "two.safetensors")
    assert tensors(tmp_path / "one.safetensors") == tensors(tmp_path / "two.safetensors")


def test_shards_become_shards(small: Made, tmp_path: Path) -> None:
    base, lora = small
    sdops.convert(base, to="safetensors", shard=1_000_000, output=tmp_path / "model.safetensors")
    index = tmp_path / "model.safetensors.index.json"
    lazy = sdops.apply(index, lora=[lora])
    assert lazy.derived_name() == "model+lora.safetensors.index.json"
    lazy.save(tmp_path / lazy.derived_name())
    assert len(list(tmp_path.glob("model+lora-*-of-*.safetensors"))) == len(list(tmp_path.glob("model-*-of-*")))
    sdops.apply(base, lora=[lora], output=tmp_path / "one.safetensors")
    assert tensors(tmp_path / lazy.derived_name()) == tensors(tmp_path / "one.safetensors")


def test_a_gguf_file_is_unpacked_to_half_and_rounded_once(small: Made, tmp_path: Path) -> None:
    base, lora = small
    gguf, out = tmp_path / "x.gguf", tmp_path / "out.safetensors"
    sdops.convert(base, to="gguf", dtype="q8_0", output=gguf)
    report = sdops.apply(gguf, lora=[f"{lora}:te=0"], output=out)
    assert "Q8_0 weights of `x.gguf` are written as F16" in report.warnings[0]
    plain, wide = tmp_path / "plain.safetensors", tmp_path / "wide.safetensors"
    sdops.convert(gguf, to="safetensors", dtype="fp32", output=plain)
    sdops.apply(plain, lora=[f"{lora}:te=0"], output=wide, dtype="fp16")
    with closing(open_source(out)) as source, closing(open_source(gguf)) as origin:
        assert isinstance(origin, GgufFile)
        packed = [key for key, kind in origin.types.items() if kind == "Q8_0"]
        assert packed
        assert {source.specs[key].dtype for key in packed} == {"F16"}
    one, two = tensors(out), tensors(wide)
    assert all(one[key] == two[key] for key in packed)


def test_names_of_other_kinds_of_files_are_refused(small: Made, tmp_path: Path) -> None:
    base, lora = small
    with pytest.raises(OutputError, match="called as another kind"):
        sdops.apply(base, lora=[lora], output=tmp_path / "x.ckpt")


def test_codes_of_bitsandbytes_are_refused(tmp_path: Path, small: Made) -> None:
    model = tiny.load(small[0])
    key = next(key for key in model if key.endswith("attn1.to_q.weight"))
    codes = {f"{key}.absmax": ("F32", np.zeros(1, np.float32)), key: ("U8", np.zeros((8, 1), np.uint8))}
    codes |= {f"{key}.quant_state.bitsandbytes__nf4": ("U8", np.zeros(3, np.uint8))}
    file = tiny.write(tmp_path / "nf4.safetensors", {**model, **codes})
    with pytest.raises(FormatError, match=r"is quantised \(nf4, ") as caught:
        sdops.apply(file, lora=[small[1]], output=tmp_path / "out.safetensors")
    assert "load the LoRA beside it" in caught.value.hint
