"""The fixture generator: real names, believable weights, the same bytes every time."""

from __future__ import annotations

import json
from math import prod

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from safetensors.numpy import save as reference_save

from fixtures import make
from sdops.archs.detect import detect
from sdops.core.spec import Spec

NAMES = make.names()


def detected(tensors):
    return detect({key: Spec(*spec) for key, spec in tensors.items()})


@pytest.mark.parametrize("name", NAMES)
def test_shrinking_keeps_names_and_the_relations_of_widths(name):
    full, small = make.specs(name), make.shrunk(make.specs(name))
    assert list(small) == list(full)
    assert sum(prod(shape) for key, (_, shape) in small.items() if not make._fixed(key)) * 2 <= make.SMALL
    widths = {}
    for key, (_, shape) in full.items():
        assert len(small[key][1]) == len(shape)
        if not make._fixed(key):
            for before, after in zip(shape, small[key][1], strict=True):
                assert widths.setdefault(before, after) == after
    factor = max(before // after for before, after in widths.items())
    assert all(after in (before, before // factor) and after > 0 for before, after in widths.items())


@pytest.mark.parametrize("name", NAMES)
def test_shrunk_models_are_recognised(name):
    full, small = detected(make.specs(name)), detected(make.shrunk(make.specs(name)))
    assert full.family != "unknown"
    assert (small.family, small.layout) == (full.family, full.layout)
    assert [part.name for part in small.components] == [part.name for part in full.components]
    assert all(part.complete is not False for part in small.components)


def test_aliases_name_lists():
    assert set(make.ALIASES.values()) <= set(NAMES)
    assert set(make.PIPELINES) <= set(NAMES)


@pytest.mark.parametrize("name", ["sd15", "sd15-ema"])
def test_files_are_as_the_reference_library_writes_them(name, small_checkpoint):
    path = small_checkpoint(name)
    assert path.read_bytes() == reference_save(load_file(path), {"format": "pt"})


def test_values_are_believable(small_checkpoint):
    tensors = load_file(small_checkpoint("sd15-ema"))
    assert all(np.isfinite(array).all() for array in tensors.values())
    ids = tensors["cond_stage_model.transformer.text_model.embeddings.position_ids"]
    assert ids.dtype == np.int64
    assert (ids == np.arange(77)).all()
    assert tensors["alphas_cumprod"][-1] == pytest.approx(0.00466, abs=1e-5)
    assert tensors["model_ema.num_updates"].dtype == np.int32
    norm = tensors["model.diffusion_model.middle_block.1.norm.weight"]
    assert 0.8 < norm.mean() < 1.2
    linear = tensors["model.diffusion_model.middle_block.1.transformer_blocks.0.ff.net.2.weight"].astype("f4")
    assert linear.std() * linear.shape[1] ** 0.5 == pytest.approx(1, abs=0.1)
    assert any((array == 0).any() for array in tensors.values() if array.dtype == np.float16)


def test_the_same_arguments_give_the_same_bytes(tmp_path, small_checkpoint):
    for arguments in ({}, {"tuned": 1}):
        make.small("sd15", tmp_path / "again", **arguments)
        assert (tmp_path / "again").read_bytes() == small_checkpoint("sd15", **arguments).read_bytes()
    make.small("sd15", tmp_path / "other", seed=1)
    assert (tmp_path / "other").read_bytes() != small_checkpoint("sd15").read_bytes()


def test_fine_tunes_differ_by_a_little(small_checkpoint):
    base, one, two = (load_file(small_checkpoint("sd15", tuned=tuned, dtype="F32")) for tuned in (None, 1, 2))
    changed = {key for key in base if not np.array_equal(base[key], one[key])}
    assert not [key for key in changed if key.startswith("first_stage_model.") or "position_ids" in key]
    trained = [key for key in base if not key.startswith("first_stage_model.")]
    assert 0.8 < len(changed) / len(trained) < 1
    assert any(not np.array_equal(one[key], two[key]) for key in changed)
    sizes = [(one[key] - base[key]).std() / base[key].std() for key in changed if base[key].size > 1000]
    assert 0.03 < min(sizes) < max(sizes) < 0.13


def test_the_change_is_low_rank_and_noise():
    shape = (600, 700)
    base, tuned = (
        np.concatenate([np.frombuffer(piece, "f4") for piece in make.Weights(0, name).pieces("x", "F32", shape)])
        for name in (None, 1)
    )
    energy = np.linalg.svd((tuned - base).reshape(shape), compute_uv=False) ** 2
    assert 0.25 < energy[: make.RANK].sum() / energy.sum() < 0.5
    assert energy[make.RANK] < 0.02 * energy.sum()


def test_a_tensor_of_many_pieces_does_not_repeat():
    pieces = [bytes(piece) for piece in make.Weights(0, None).pieces("x", "F32", (3000, 400))]
    assert sum(map(len, pieces)) == 3000 * 400 * 4
    assert len({piece[:64] for piece in pieces}) == len(pieces) > 1


def test_bf16_rounds_to_nearest_even():
    values = np.random.default_rng(0).standard_normal(10_000).astype("f4")
    values[:2] = np.array([0x3F808000, 0x3F818000], "u4").view("f4")  # ties
    expected = torch.from_numpy(values).bfloat16().view(torch.int16).numpy()
    assert np.array_equal(make._encode(values, "BF16").view("i2"), expected)


def test_sparse_files_have_the_real_size_and_no_weight(tmp_path):
    path = tmp_path / "sparse.safetensors"
    make.full("flux1-dev", path, sparse=True)
    assert path.stat().st_size > 23_000_000_000
    assert path.stat().st_blocks * 512 < 1_000_000


def test_a_pipeline_is_a_folder(small_checkpoint):
    folder = small_checkpoint("sd15-diffusers")
    index = json.loads((folder / "model_index.json").read_text())
    assert index["_class_name"] == "StableDiffusionPipeline"
    assert index["unet"] == ["diffusers", "UNet2DConditionModel"]
    found = {str(path.relative_to(folder)) for path in folder.glob("*/*")}
    unet = "unet/diffusion_pytorch_model.safetensors"
    assert found == {unet, "vae/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"}
    assert "conv_in.weight" in load_file(folder / unet)
