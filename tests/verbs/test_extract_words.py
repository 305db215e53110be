"""New words of a fine-tune come along when a LoRA is extracted."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import sdops
from sdops.verbs._embed_open import open_embeddings
from tests import tiny

LAYER = f"{tiny.UNET}input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"
TABLE = f"{tiny.CLIP}embeddings.token_embedding.weight"


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A base, and a fine-tune with two words more."""
    folder = tmp_path_factory.mktemp("models")
    generator = torch.Generator().manual_seed(0)
    state = {key: torch.zeros(shape).half() for key, shape in tiny.shapes(vae=False).items()}
    state[LAYER] = torch.randn(320, 768, generator=generator).half()
    state[f"{tiny.CLIP}encoder.layers.11.layer_norm1.weight"] = torch.ones(768).half()
    state[TABLE] = torch.zeros(49408, 768).half()
    save_file(state, folder / "base.safetensors")
    words = (torch.randn(2, 768, generator=generator) * 0.0137).half()
    change = torch.randn(320, 4, generator=generator) @ torch.randn(4, 768, generator=generator)
    state |= {LAYER: (state[LAYER].float() + 0.1 * change).half(), TABLE: torch.cat([state[TABLE], words])}
    save_file(state, folder / "tuned.safetensors")
    return folder / "tuned.safetensors", folder / "base.safetensors", words


def test_words_are_bundled(models, tmp_path):
    tuned, base, words = models
    report = sdops.extract(tuned, base=base, output=tmp_path / "lora.safetensors", rank=4)
    assert report.data["words"] == ["added0", "added1"]
    found = open_embeddings(tmp_path / "lora.safetensors").embeddings
    for one, row in zip(found, words, strict=True):
        np.testing.assert_array_equal(one.vectors["clip_l"].values[0], row.float().numpy())
    assert "bundled as embeddings" in str(report)


def test_a_dialect_without_room_says_so(models, tmp_path):
    tuned, base, _ = models
    report = sdops.extract(tuned, base=base, output=tmp_path / "lora.safetensors", rank=4, to="diffusers")
    assert any("no place for the new words `added0`" in text for text in report.warnings)


def test_nothing_is_told_where_nothing_was_added(models, tmp_path):
    tuned, base, _ = models
    report = sdops.extract(base, base=tuned, output=tmp_path / "lora.safetensors", rank=4)
    assert "words" not in report.data
