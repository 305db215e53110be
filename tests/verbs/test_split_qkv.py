"""Flux LoRAs that were trained with `split_qkv` and weakened when they were saved: told and repaired."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import sdops
from fixtures import loras
from sdops.verbs._adapters import open_adapter
from tests.dialects.helpers import deltas

H, RANK = 8, 2
EDGES = {"double_blocks_0_img_attn_qkv": (0, 1, 2, 3), "single_blocks_0_linear1": (0, 1, 2, 3, 7)}
ARGS = {"split_qkv": "True", "verbose": "1"}


def joined(alpha: float = 1.0, fill: float = 0.0) -> loras.Arrays:
    """As kohya's trainer saves them: block-diagonal, with the alpha of one block."""
    rng = np.random.default_rng(0)
    found: loras.Arrays = {}
    for layer, edges in EDGES.items():
        parts = len(edges) - 1
        up = np.full((edges[-1] * H, parts * RANK), fill, np.float32)
        for part in range(parts):
            rows = slice(edges[part] * H, edges[part + 1] * H)
            up[rows, part * RANK : (part + 1) * RANK] = rng.standard_normal((rows.stop - rows.start, RANK))
        found[f"lora_unet_{layer}.lora_up.weight"] = up
        found[f"lora_unet_{layer}.lora_down.weight"] = rng.standard_normal((parts * RANK, H)).astype(np.float32)
        found[f"lora_unet_{layer}.alpha"] = np.array(alpha, np.float32)
    return found


def saved(path: Path, arrays: loras.Arrays, args: dict[str, str] = ARGS) -> Path:
    said = {"ss_network_args": json.dumps(args), "ss_base_model_version": "flux1", "sshs_model_hash": "0" * 64}
    return loras.save(path, arrays, said)


def test_the_repair_gives_the_trained_strength_once(tmp_path):
    file = saved(tmp_path / "x.safetensors", joined())
    (note,) = open_adapter(file).notes
    assert "in 2 layers programs apply a third" in note
    assert "sdops fix x.safetensors" in note
    done = sdops.fix(file)
    assert done.data["repairs"]["split-qkv"] == ["multiplied 2 alphas by 3, of `linear1` by 4"]
    fixed = tmp_path / "x.fixed.safetensors"
    before, after = deltas(open_adapter(file)), deltas(open_adapter(fixed))
    for name, factor in zip(before, (3, 4), strict=True):
        assert float((after[name] - factor * before[name]).norm()) <= 1e-6 * float(after[name].norm())
    assert open_adapter(fixed).notes == ()
    assert json.loads(open_adapter(fixed).source.metadata["ss_network_args"]) == {"verbose": "1"}
    assert "split-qkv" not in sdops.fix(fixed, dry_run=True).data["repairs"]


@pytest.mark.parametrize(
    ("arrays", "args"),
    [
        (joined(), {}),  # nothing says that it was trained so
        (joined(), {"split_qkv": "False"}),
        (joined(fill=1e-3), ARGS),  # not block-diagonal: it was changed since
        ({key: value for key, value in joined().items() if not key.endswith("alpha")}, ARGS),  # alpha is the rank
    ],
)
def test_others_are_left_alone(arrays, args, tmp_path):
    file = saved(tmp_path / "x.safetensors", arrays, args)
    assert open_adapter(file).notes == ()
    assert "split-qkv" not in sdops.fix(file, dry_run=True).data["repairs"]
