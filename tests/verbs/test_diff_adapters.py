"""`diff` of LoRAs sees through their dialects: the same patches are the same, whatever they are called."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

import sdops
from fixtures import loras


def lora_in(folder: Path, to: str, alpha: float | None = 1.0) -> Path:
    """One LoRA of two layers, in a dialect."""
    layers = {
        "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k": (320, 768),
        "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_v": (320, 768),
    }
    rng = np.random.default_rng(0)
    arrays = {}
    for stem, (rows, columns) in layers.items():
        arrays[f"{stem}.lora_up.weight"] = rng.standard_normal((rows, 2)).astype(np.float32)
        arrays[f"{stem}.lora_down.weight"] = rng.standard_normal((2, columns)).astype(np.float32)
        arrays |= {} if alpha is None else {f"{stem}.alpha": np.array(alpha, np.float32)}
    name = f"{to}-{alpha}"
    kohya = loras.save(folder / f"{name}.kohya.safetensors", arrays)
    if to == "kohya":
        return kohya
    output = folder / (name if to == "peft" else f"{name}.safetensors")
    sdops.convert(kohya, to=to, output=output)
    return output


@pytest.mark.parametrize("to", ["peft", "diffusers", "comfy", "lycoris"])
@pytest.mark.parametrize("back", [False, True])
def test_a_lora_is_the_same_in_every_dialect(tmp_path: Path, to: str, back: bool) -> None:
    pair = lora_in(tmp_path, "kohya"), lora_in(tmp_path, to)
    report = sdops.diff(*(pair[::-1] if back else pair))
    assert report.data["same"]
    assert not report.failed
    assert {facts["dialect"] for facts in report.data["adapters"]} == {"kohya", to}
    assert f"dialect `{'kohya' if back else to}`" in str(report)


@pytest.mark.parametrize("to", ["kohya", "peft", "diffusers", "comfy"])
def test_another_alpha_is_a_difference_in_every_dialect(tmp_path: Path, to: str) -> None:
    report = sdops.diff(lora_in(tmp_path, "peft"), lora_in(tmp_path, to, alpha=0.5))
    assert report.failed
    assert report.data["tensors"]["changed"] >= 2
    assert "0.5" in str(report) or to == "diffusers"  # which keeps no alphas


def test_no_alpha_means_the_rank(tmp_path: Path) -> None:
    assert not sdops.diff(lora_in(tmp_path, "kohya", alpha=None), lora_in(tmp_path, "peft", alpha=2.0)).failed


def test_what_differs_between_loras_is_told_side_by_side(tmp_path: Path) -> None:
    text = str(sdops.diff(lora_in(tmp_path, "kohya"), lora_in(tmp_path, "comfy", alpha=0.5)))
    assert re.search(r"dialect +kohya +comfy", text)
    assert re.search(r"alphas +1 +0\.5", text)
