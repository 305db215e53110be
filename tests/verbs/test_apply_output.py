"""`apply` writes what the model is: one file, shards, or a folder of diffusers with everything that was in it."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

import sdops
from sdops.core.source import read
from sdops.errors import OutputError
from sdops.formats import open_source

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
