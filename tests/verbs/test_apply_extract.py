"""A LoRA that is applied and extracted again is the same change, up to the error that is reported."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import sdops
from sdops.verbs._adapters import open_adapter
from tests.dialects.helpers import deltas

STRENGTH = 0.7


@pytest.fixture(scope="module")
def small(small_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A small SD1.5 in float32, and a LoRA of rank 3 for its attention, convolutions and text encoder."""
    base, tuned = small_checkpoint("sd15", dtype="F32"), small_checkpoint("sd15", dtype="F32", tuned=1)
    lora = tmp_path_factory.mktemp("lora") / "lora.safetensors"
    sdops.extract(tuned, base=base, rank=3, include=["*attn2*", "*in_layers.2*", "*fc1*"], output=lora, dtype="fp32")
    return base, lora


@pytest.mark.parametrize(("dtype", "rank"), [("fp32", 3), ("fp32", 2), ("fp16", 3)])
@pytest.mark.parametrize("to", ["kohya", "comfy"])
def test_apply_then_extract(small: tuple[Path, Path], dtype: str, rank: int, to: str, tmp_path: Path) -> None:
    base, lora = small
    applied, again = tmp_path / "applied.safetensors", tmp_path / "again.safetensors"
    sdops.apply(base, lora=[f"{lora}:{STRENGTH}"], output=applied, dtype="fp32")
    report = sdops.extract(applied, base=base, rank=rank, output=again, dtype=dtype, svd="exact", to=to)
    before, after = deltas(open_adapter(lora)), deltas(open_adapter(again))
    assert after.keys() == before.keys()
    lost = sum(float((STRENGTH * before[name] - after[name]).double().square().sum()) for name in before)
    whole = sum(float((STRENGTH * delta).double().square().sum()) for delta in before.values())
    error = (lost / whole) ** 0.5
    assert error <= report.data["error"] + 1e-5  # what float32 weights of the model round away
    assert report.data["error"] <= {("fp32", 3): 1e-5, ("fp16", 3): 1e-3}.get((dtype, rank), 1.0)
    if rank < 3:
        assert error > 0.05  # the bound means something
        assert abs(error - report.data["error"]) <= 1e-3 * error


def test_what_is_left_is_what_the_optimum_leaves(small: tuple[Path, Path], tmp_path: Path) -> None:
    base, lora = small
    applied, again = tmp_path / "applied.safetensors", tmp_path / "again.safetensors"
    sdops.apply(base, lora=[lora], output=applied, dtype="fp32")
    sdops.extract(applied, base=base, rank=2, output=again, dtype="fp32", svd="exact")
    before, after = deltas(open_adapter(lora)), deltas(open_adapter(again))
    for name, delta in before.items():
        matrix = delta.double().flatten(1)
        least = float(torch.linalg.svdvals(matrix)[2:].norm())
        found = float((matrix - after[name].double().flatten(1)).norm())
        assert found <= (1 + 1e-6) * least + 2e-6 * float(matrix.norm()), name
