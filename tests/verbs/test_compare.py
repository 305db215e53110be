"""Laws of comparing LoRAs: the same numbers as of dense matrices."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import sdops
from fixtures import loras
from sdops.errors import MismatchError
from sdops.verbs._adapters import open_adapter
from tests.dialects.helpers import deltas


def lora(
    folder: Path, name: str, family: str = "lora_alpha", dialect: str = "kohya", model: str = "sd1", seed: int = 0
) -> Path:
    arrays = loras.tensors(dialect, loras.SPELLINGS[dialect, model], family, 3)
    exact = {key: np.roll(value.astype(np.float32), 5 * seed) for key, value in arrays.items()}
    return loras.save(folder / f"{name}.safetensors", exact)


@pytest.mark.parametrize("other", ["lora", "loha", "lokr", "tucker", "full"])
def test_cosine_is_that_of_the_dense_changes(other, tmp_path):
    files = [lora(tmp_path, "a"), lora(tmp_path, "b", other, seed=1)]
    report = sdops.compare(*files)
    one, two = (deltas(open_adapter(file)) for file in files)
    for name, delta in one.items():
        facts = report.data["layers"][name]
        d, e = delta.double(), two[name].double()
        assert facts["norms"] == pytest.approx([float(d.norm()), float(e.norm())], rel=1e-6)
        assert facts["cosine"] == pytest.approx(float((d * e).sum() / d.norm() / e.norm()), abs=1e-7)
    whole = [torch.cat([delta.double().flatten() for delta in each.values()]) for each in (one, two)]
    cosine = float(whole[0] @ whole[1] / whole[0].norm() / whole[1].norm())
    assert report.data["cosine"] == pytest.approx(cosine, abs=1e-7)


def test_overlap_is_that_of_the_singular_vectors(tmp_path):
    files = [lora(tmp_path, "a"), lora(tmp_path, "b", seed=1)]
    report = sdops.compare(*files)
    one, two = (deltas(open_adapter(file)) for file in files)
    for name, facts in report.data["layers"].items():
        first, second = (torch.linalg.svd(each[name].double(), full_matrices=False) for each in (one, two))
        inputs = (first.Vh[:3] @ second.Vh[:3].T).square().sum() / 3
        outputs = (first.U[:, :3].T @ second.U[:, :3]).square().sum() / 3
        assert facts["overlap_in"] == pytest.approx(float(inputs), abs=1e-6)
        assert facts["overlap_out"] == pytest.approx(float(outputs), abs=1e-6)


def test_itself_in_another_dialect(tmp_path):
    file = lora(tmp_path, "a", "lora", "diffusers", "flux1")
    sdops.convert(file, to="kohya", output=tmp_path / "k.safetensors")
    report = sdops.compare(file, tmp_path / "k.safetensors")
    assert report.data["cosine"] == pytest.approx(1, abs=1e-9)
    assert all(each["overlap_in"] == pytest.approx(1) for each in report.data["layers"].values())
    assert report.result == ["1.000000"]
    assert "█" in str(report)
    json.dumps(report.as_dict())


def test_opposite(tmp_path):
    file = lora(tmp_path, "a")
    sdops.merge(file, weights=(-0.5,), output=tmp_path / "m.safetensors")
    report = sdops.compare(file, tmp_path / "m.safetensors")
    assert report.data["cosine"] == pytest.approx(-1, abs=1e-9)
    assert report.data["norms"][1] == pytest.approx(report.data["norms"][0] / 2, rel=1e-6)


def test_what_depends_on_the_base_is_told(tmp_path):
    arrays = loras.tensors("kohya", loras.SPELLINGS["kohya", "sd1"], "lora", 2)
    stem = next(iter(loras.SPELLINGS["kohya", "sd1"]))
    scale = np.ones((320, 1), np.float32)
    mixed = loras.save(tmp_path / "mixed.safetensors", {**arrays, f"{stem}.dora_scale": scale})
    report = sdops.compare(lora(tmp_path, "a"), mixed)
    assert report.data["skipped"] == 1
    assert "depends on the base" in report.warnings[0]


def test_refusals(tmp_path):
    with pytest.raises(MismatchError, match="Stable Diffusion XL"):
        sdops.compare(lora(tmp_path, "a"), lora(tmp_path, "b", model="sdxl"))
    with pytest.raises(MismatchError, match="in common"):
        sdops.compare(lora(tmp_path, "c", "dora"), lora(tmp_path, "d", "dora"))
