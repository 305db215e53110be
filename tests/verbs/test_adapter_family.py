"""What an adapter was made for: told from names, shapes, depth and header, or by the user; and others are refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import sdops
from fixtures import loras
from sdops.errors import FormatError, MismatchError, UsageError
from sdops.verbs._adapters import open_adapter
from tests import tiny

H = 3072  # of Flux and Qwen-Image alike
JOINT = [f"attn.{name}" for name in ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "to_add_out")]


def pair(stem: str, rows: int, columns: int, ends: tuple[str, str] = (".lora_B.weight", ".lora_A.weight")) -> dict:
    return {stem + ends[0]: np.zeros((rows, 1), np.float16), stem + ends[1]: np.zeros((1, columns), np.float16)}


def joint(blocks: range, prefix: str = "transformer.") -> loras.Arrays:
    """Attention of Flux or Qwen-Image in diffusers' names."""
    stems = [f"{prefix}transformer_blocks.{block}.{name}" for block in blocks for name in JOINT]
    return {key: value for stem in stems for key, value in pair(stem, H, H).items()}


def fused(blocks: int, *more: str) -> loras.Arrays:
    """Attention of Flux or Chroma in the original names."""
    stems = [f"diffusion_model.double_blocks.{block}.img_attn.qkv" for block in range(blocks)]
    found = {key: value for stem in stems for key, value in pair(stem, 3 * H, H).items()}
    for stem in more:
        found |= pair(f"diffusion_model.{stem}", 6 * H, H)
    return found


def saved(tmp_path: Path, arrays: loras.Arrays, metadata: dict[str, str] | None = None) -> Path:
    return loras.save(tmp_path / "x.safetensors", arrays, metadata)


KOHYA = {"ss_base_model_version": "chroma"}
SPEC = {"modelspec.architecture": "qwen-image/lora"}


@pytest.mark.parametrize(
    ("arrays", "metadata", "family", "rivals"),
    [
        (joint(range(3)), {}, "flux1", ("qwen_image", "chroma", "flux2")),  # as diffusers' pipelines call it
        (joint(range(3), ""), {}, "qwen_image", ("flux1", "chroma", "flux2")),  # bare
        (joint(range(3)), SPEC, "qwen_image", ()),
        (joint(range(3), ""), {"ss_base_model_version": "flux1"}, "flux1", ()),
        (
            joint(range(3)),
            {"ss_base_model_version": "sd_1.5"},
            "flux1",
            ("qwen_image", "chroma", "flux2"),
        ),  # a header that is wrong
        (joint(range(19), ""), {}, "flux1", ("chroma",)),  # all blocks of Flux
        (joint(range(60)), {}, "qwen_image", ()),  # more than Flux has
        (fused(2), {}, "flux1", ("chroma", "flux2")),
        (fused(2), KOHYA, "chroma", ()),
        (fused(2, "double_blocks.0.img_mod.lin"), KOHYA, "flux1", ()),  # Chroma has no such layer
    ],
)
def test_ties_are_broken_by_depth_and_header(arrays, metadata, family, rivals, tmp_path):
    adapter = open_adapter(saved(tmp_path, arrays, metadata))
    assert (adapter.architecture, set(adapter.rivals)) == (family, set(rivals))


def test_the_configuration_of_peft_tells_the_base(tmp_path):
    file = loras.save(tmp_path / "adapter_model.safetensors", joint(range(2), "base_model.model."))
    assert open_adapter(file).rivals
    config = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "base_model_name_or_path": "black-forest-labs/FLUX.1-dev"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    adapter = open_adapter(file)
    assert (adapter.architecture, adapter.rivals) == ("flux1", ())


def test_the_users_word_counts(tmp_path):
    file = saved(tmp_path, joint(range(3)))
    assert open_adapter(file, architecture="qwen_image").architecture == "qwen_image"
    with pytest.raises(UsageError, match="did you mean `qwen_image`"):
        open_adapter(file, architecture="qwen_imag")
    with pytest.raises(FormatError, match="nothing here understands"):
        open_adapter(file, architecture="sdxl")


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The few tensors that a Qwen-Image is known by, and one layer."""
    shapes = {"txt_norm.weight": (3584,), "img_in.weight": (H, 64), "transformer_blocks.0.attn.to_q.weight": (H, H)}
    shapes |= {"transformer_blocks.0.img_mod.1.weight": (6 * H, H)}
    model: tiny.Model = {key: ("F16", np.zeros(shape, np.float16)) for key, shape in shapes.items()}
    return tiny.write(tmp_path_factory.mktemp("qwen") / "qwen.safetensors", model)


def test_a_lora_for_flux_that_fits_qwen_is_refused(qwen, tmp_path):
    layer = pair("transformer.transformer_blocks.0.attn.to_q", H, H)
    output = tmp_path / "out.safetensors"
    with pytest.raises(MismatchError, match=r"is for Flux\.1 \(`ss_base_model_version` is `flux1`\), .* is Qwen-Image"):
        sdops.apply(qwen, lora=[saved(tmp_path, layer, {"ss_base_model_version": "flux1"})], output=output)
    open_question = saved(tmp_path, layer)
    with pytest.raises(MismatchError, match=r"may be for Flux\.1 or Qwen-Image, nothing in it tells") as caught:
        sdops.apply(qwen, lora=[open_question], output=output)
    assert "--architecture qwen_image" in caught.value.hint
    assert not output.exists()
    report = sdops.apply(qwen, lora=[open_question], output=output, architecture="qwen_image")
    assert report.data["recipe"]["architecture"] == "qwen_image"
    assert report.data["tensors"]["changed"] == 1


def test_files_for_one_model_settle_each_other(tmp_path):
    layer = pair("transformer.transformer_blocks.0.attn.to_q", H, H)
    unsure = loras.save(tmp_path / "unsure.safetensors", layer)
    sure = loras.save(tmp_path / "sure.safetensors", layer, {"ss_base_model_version": "qwen_image"})
    assert sdops.compare(unsure, sure).data["architecture"] == "qwen_image"
    other = loras.save(tmp_path / "other.safetensors", layer, {"ss_base_model_version": "flux1"})
    with pytest.raises(MismatchError, match=r"Qwen-Image.*Flux\.1"):
        sdops.compare(sure, other)


def test_a_half_pair_among_many_is_named(tmp_path):
    arrays = joint(range(3))
    gone = next(iter(arrays))
    del arrays[gone]
    with pytest.raises(FormatError, match=r"`transformer\.transformer_blocks\.0\.attn\.to_q` is incomplete"):
        open_adapter(saved(tmp_path, arrays))
