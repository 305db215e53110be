"""What `inspect` says of adapters, made up and real."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import sdops
from fixtures import loras
from sdops.verbs._adapters import open_adapter
from tests.dialects.helpers import deltas

SHARED = Path(__file__).parents[3] / "shared" / "data" / "loras"


def lora(folder: Path, family: str = "lora_alpha", dialect: str = "kohya", model: str = "sd1", **metadata: str) -> Path:
    arrays = loras.tensors(dialect, loras.SPELLINGS[dialect, model], family, 2)
    return loras.save(folder / f"{family}-{model}.safetensors", arrays, metadata)


@pytest.mark.parametrize(("dialect", "model"), [("kohya", "sdxl"), ("diffusers", "flux1"), ("comfy", "flux1")])
def test_dialect_and_model(dialect, model, tmp_path):
    facts = sdops.inspect(lora(tmp_path, "lora", dialect, model)).data["files"][0]["adapter"]
    assert (facts["dialect"], facts["architecture"], facts["ranks"]) == (dialect, model, {"2": len(
        loras.SPELLINGS[dialect, model]
    )})  # fmt: skip


def test_families_alphas_and_metadata(tmp_path):
    said = {
        "ss_base_model_version": "sd_v1",
        "ss_network_dim": "16",
        "ss_tag_frequency": json.dumps({"x": {"cat": 7, "hat": 9}}),
        "modelspec.trigger_phrase": "mycat",
    }
    report = sdops.inspect(lora(tmp_path, **said))
    facts = report.data["files"][0]["adapter"]
    assert facts["families"] == {"lora": 4}
    assert facts["alphas"] == {"0.75": 4}
    assert facts["components"]["unet"]["attn2.to_k"] == 1
    assert facts["trained_on"] == {"ss_base_model_version": "sd_v1"}
    assert facts["trigger_words"] == ["mycat"]
    assert list(facts["tags"].items()) == [("hat", 9), ("cat", 7)]
    assert any("rank 16" in text for text in report.warnings)
    assert "mycat" in str(report)
    for family, words in (("dora", "lora with DoRA"), ("tucker", "LoCon (Tucker)"), ("lokr", "lokr")):
        assert words in sdops.inspect(lora(tmp_path, family)).data["files"][0]["adapter"]["families"]


def test_broken_converters_are_recognised(tmp_path):
    stem = "lora_unet_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"
    up, down = np.ones((320, 2), np.float16), np.ones((2, 768), np.float16)
    arrays = {f"{stem}_lora_up.weight": up, f"{stem}_lora_down.weight": down}
    report = sdops.inspect(loras.save(tmp_path / "broken.safetensors", arrays))
    assert any("broken converter" in text for text in report.warnings)


def test_norms(tmp_path):
    file = lora(tmp_path)
    report = sdops.inspect(file, norms=True)
    found = report.data["files"][0]["adapter"]
    dense = deltas(open_adapter(file))
    assert found["norms"]["IN01"] == pytest.approx(
        float(torch.stack([d.norm() for n, d in dense.items() if "input_blocks.1." in n]).norm()), rel=1e-5
    )
    assert found["clamped"] == 0
    assert "█" in str(report)


def test_clamp_damage(tmp_path):
    """What extractors do: cut both factors at the 0.99 quantile of both together."""
    rng = np.random.default_rng(0)
    stem = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"
    up, down = rng.standard_normal((320, 8)).astype(np.float32), rng.standard_normal((8, 768)).astype(np.float32)
    bound = np.quantile(np.concatenate([up.ravel(), down.ravel()]), 0.99)
    arrays = {f"{stem}.lora_up.weight": up.clip(-bound, bound), f"{stem}.lora_down.weight": down.clip(-bound, bound)}
    report = sdops.inspect(loras.save(tmp_path / "clamped.safetensors", arrays), norms=True)
    assert report.data["files"][0]["adapter"]["clamped"] == pytest.approx(0.02, abs=0.003)
    assert any("clamps" in text for text in report.warnings)


@pytest.mark.skipif(not SHARED.exists(), reason="the real files are not here")
@pytest.mark.parametrize("path", sorted(SHARED.glob("*.*")) if SHARED.exists() else [], ids=lambda path: path.name)
def test_real_files(path):
    report = sdops.inspect(path, norms="lycoris" not in path.name)
    facts = report.data["files"][0].get("adapter")
    if ".ti." in path.name:
        return
    assert facts["architecture"] == ("sd2" if "contents_lora" in path.name else "sd1")
    assert facts["unknown"] == []
    if "analog_svd" in path.name:
        assert facts["clamped"] == pytest.approx(0.02, abs=0.002)
        assert any("clamps" in text for text in report.warnings)


@pytest.mark.parametrize(
    "family", ["lora_alpha", "tucker", "dora", "loha", "lokr", "glora", "oft", "boft", "full", "ia3"]
)
def test_no_part_of_an_adapter_is_unclaimed(family, tmp_path):
    arrays = loras.tensors("kohya", loras.SPELLINGS["kohya", "sd1"], family)
    norm = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_norm1"
    arrays |= {f"{norm}.{part}": np.ones(320, np.float16) for part in ("w_norm", "b_norm")}
    assert sdops.inspect(loras.save(tmp_path / "a.safetensors", arrays)).data["files"][0]["unclaimed"] == []


@pytest.mark.parametrize("block", ["double", "single", "block"])
def test_what_the_dialect_understands_is_the_adapters(block, tmp_path):
    """XLabs' names end as those of models do: `.up.weight`."""
    arrays = loras.tensors("xlabs", loras.SPELLINGS["xlabs", "flux1"], "lora")
    arrays = {key: values for key, values in arrays.items() if block in key}
    path = loras.save(tmp_path / "a.safetensors", arrays | {"foo.weight": np.ones(3, np.float16)})
    facts = sdops.inspect(path, keys=True).data["files"][0]
    assert facts["architecture"] == "adapter"
    assert facts["unclaimed"] == facts["adapter"]["unknown"] == ["foo.weight"]
    assert [(part["name"], part["keys"]) for part in facts["components"]] == [("adapter", len(arrays))]
    assert {key: said["component"] for key, said in facts["keys"].items()} == {
        **dict.fromkeys(arrays, "adapter"),
        "foo.weight": "other",
    }


def test_t_lora_is_named(tmp_path):
    stem = "lora_unet_down_blocks_0_attentions_0_proj_in"
    shapes = {"q_layer.weight": (2, 320), "p_layer.weight": (320, 2), "lambda_layer": (1, 2)}
    arrays = {f"{stem}.{part}": np.ones(shape, np.float16) for part, shape in shapes.items()}
    report = sdops.inspect(loras.save(tmp_path / "a.safetensors", arrays))
    assert any("T-LoRA" in warning for warning in report.warnings)
