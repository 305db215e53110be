"""Every preset is planned and built on small models of the families that it names."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import sdops
from fixtures import loras, make
from sdops.presets import names, preset_file
from sdops.verbs._recipe_check import check_recipe
from sdops.verbs._recipe_text import parse_recipe, read_recipe
from sdops.verbs._recipe_toml import to_toml

MODELS = {"sd1": "sd15", "sdxl": "sdxl"}
CASES = [(name, tag) for name in names() for tag in read_recipe(preset_file(name)).tags]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("presets")


def model(folder: Path, tag: str, tuned: int | None) -> Path:
    path = folder / f"{tag}-{tuned}.safetensors"
    if not path.exists():
        make.small(MODELS[tag], path, tuned=tuned)
    return path


def lora(folder: Path, tag: str, seed: int) -> Path:
    """Layers of the small model, in kohya's names."""
    path = folder / f"{tag}-lora-{seed}.safetensors"
    if not path.exists():
        specs = sdops.open(model(folder, tag, None)).specs
        start, tensors = "model.diffusion_model.", {}
        rng = np.random.default_rng(seed)
        keys = [key for key in specs if key.startswith(start) and key.endswith("attn2.to_k.weight")][:3]
        for key in keys:
            stem = "lora_unet_" + key.removeprefix(start).removesuffix(".weight").replace(".", "_")
            parts = loras.FAMILIES["lora_alpha"](specs[key].shape, 2, rng)
            tensors |= {stem + suffix: values for suffix, values in parts.items()}
        loras.save(path, tensors)
    return path


def inpainting(folder: Path, tag: str) -> Path:
    """The base with nine input channels."""
    path = folder / f"{tag}-inpainting.safetensors"
    if not path.exists():
        from tests import tiny

        tensors = tiny.load(model(folder, tag, None))
        key = "model.diffusion_model.input_blocks.0.0.weight"
        dtype, values = tensors[key]
        wide = np.zeros((values.shape[0], 9, *values.shape[2:]), values.dtype)
        wide[:, :4] = values
        tiny.write(path, tensors | {key: (dtype, wide)})
    return path


@pytest.mark.parametrize("name", names())
def test_a_preset_says_what_it_is_for(name: str) -> None:
    found = read_recipe(preset_file(name))
    assert found.name == name
    assert found.about
    assert found.source
    assert found.tags
    assert all(one.about for one in found.inputs.values())
    assert all(one.about for one in found.parameters.values())
    assert any(not one.file for one in found.inputs.values())
    assert check_recipe(found).warnings == ()
    assert parse_recipe(to_toml(found), name="x") == found
    for one in found.inputs.values():
        assert not one.file or one.file.startswith("hf://")


@pytest.mark.parametrize(("name", "tag"), CASES)
def test_a_preset_is_planned_and_built(
    name: str, tag: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    inputs, number = {}, 0
    for role in read_recipe(preset_file(name)).inputs:
        if role in ("fast", "first", "second"):
            inputs[role] = lora(folder, tag, len(inputs))
        elif role == "inpaint":
            inputs[role] = inpainting(folder, tag)
        elif role == "base":
            inputs[role] = model(folder, tag, None)
        else:
            number += 1
            inputs[role] = model(folder, tag, number)
    planned = sdops.build(name, inputs=inputs, dry_run=True)
    assert planned.data["dry_run"]
    assert not list(tmp_path.iterdir())
    if tag != read_recipe(preset_file(name)).tags[0]:
        return  # one family shows that it can be built
    report = sdops.build(name, inputs=inputs)
    (written,) = tmp_path.iterdir()
    assert report.result == [written.name]
    assert sdops.verify(written).failed is False


def test_a_model_of_another_family_is_told(folder: Path, tmp_path: Path) -> None:
    wrong, right = model(folder, "sd1", None), model(folder, "sdxl", None)
    given = {"model": model(folder, "sd1", 1), "base": wrong, "turbo": model(folder, "sd1", 2)}
    trial = sdops.build("turbo", inputs=given, output=tmp_path / "x.safetensors", dry_run=True)
    assert "`turbo` is for sdxl, but `model` is Stable Diffusion 1.x" in trial.warnings
    given = {"model": right, "base": right, "turbo": right}
    assert not sdops.build("turbo", inputs=given, output=tmp_path / "x.safetensors", dry_run=True).warnings
