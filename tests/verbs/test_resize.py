"""Laws of `resize`: the best of every rank, the error as reported, nothing lost without need."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import sdops
from fixtures import loras
from sdops.core.hashing import digests
from sdops.errors import FormatError, MismatchError, OutputError, UsageError
from sdops.verbs._adapters import open_adapter
from tests.dialects.helpers import assert_same_deltas, bytes_of, deltas

SHARED = Path(__file__).parents[3] / "shared" / "data" / "loras"


def lora(folder: Path, family: str = "lora_alpha", dialect: str = "kohya", architecture: str = "sd1", rank: int = 4):
    layers = loras.SPELLINGS[dialect, architecture]
    arrays = loras.tensors(dialect, layers, family, rank)
    exact = {key: value.astype(np.float32) for key, value in arrays.items()}
    header = {
        "ss_network_dim": "4",
        "ss_network_alpha": "1",
        "ss_tag_frequency": '{"a": {"cat": 3}}',
        "sshs_model_hash": "0",
    }
    return loras.save(folder / f"{family}.safetensors", exact, header)


def optimum(delta: torch.Tensor, rank: int) -> float:
    """The least error of a rank (Eckart and Young)."""
    return float(torch.linalg.svdvals(delta.double())[rank:].square().sum().sqrt())


@pytest.mark.parametrize("family", ["lora", "lora_alpha", "tucker", "loha", "lokr"])
@pytest.mark.parametrize("rank", [1, 2, 3])
def test_least_error_of_every_family(family, rank, tmp_path):
    source = lora(tmp_path, family, rank=2 if family == "loha" else 4)
    report = sdops.resize(source, rank=rank, output=tmp_path / "small.safetensors")
    before, after = deltas(open_adapter(source)), deltas(open_adapter(tmp_path / "small.safetensors"))
    reported = {layer["layer"]: layer["error"] for layer in report.data["layers"]}
    for name, delta in before.items():
        norm, error = torch.linalg.norm(delta), torch.linalg.norm(delta - after[name])
        assert error <= optimum(delta, rank) * (1 + 1e-5) + 1e-6 * norm
        assert reported[name] == pytest.approx(float(error / norm), rel=1e-4, abs=3e-7)
    total = sum(float(torch.linalg.norm(d)) ** 2 for d in before.values())
    lost = sum(float(torch.linalg.norm(before[n] - after[n])) ** 2 for n in before)
    assert report.data["error"] == pytest.approx((lost / total) ** 0.5, rel=1e-4, abs=3e-7)


def test_full_rank_keeps_every_bit(tmp_path):
    source = lora(tmp_path)
    report = sdops.resize(source, rank=64, output=tmp_path / "same.safetensors")
    assert report.data["changed"] == 0
    assert bytes_of(open_adapter(source)) == bytes_of(open_adapter(tmp_path / "same.safetensors"))


@pytest.mark.parametrize("family", ["lora_alpha", "tucker", "loha", "lokr"])
def test_without_a_rule_nothing_is_lost(family, tmp_path):
    source = lora(tmp_path, family)
    sdops.resize(source, output=tmp_path / "same.safetensors")
    assert_same_deltas(open_adapter(source), open_adapter(tmp_path / "same.safetensors"))


def test_idle_ranks_go(tmp_path):
    """A LoRA whose ranks repeat has a lower rank than it says; dropping them is no loss."""
    arrays = loras.tensors("kohya", loras.SPELLINGS["kohya", "sd1"], "lora", 2)
    doubled = {}
    for key, value in arrays.items():
        wide = value.astype(np.float32)
        doubled[key] = np.concatenate([wide, wide], axis=1 if "lora_up" in key else 0)
    source = loras.save(tmp_path / "double.safetensors", doubled)
    report = sdops.resize(source, output=tmp_path / "single.safetensors")
    assert {layer["rank"] for layer in report.data["layers"]} == {2}
    assert_same_deltas(open_adapter(source), open_adapter(tmp_path / "single.safetensors"), 2e-6)


def test_rules(tmp_path):
    """Every rule against its definition, on the largest layer."""
    source = lora(tmp_path, rank=8)
    name, delta = next(iter(deltas(open_adapter(source)).items()))
    values = torch.linalg.svdvals(delta.double())
    energy = values.square().cumsum(0) / values.square().sum()
    expected = {
        ("energy", 0.5): int((energy < 0.5).sum()) + 1,
        ("frobenius", 0.8): int((energy < 0.64).sum()) + 1,
        ("ratio", 0.9): int((values > 0.9 * values[0]).sum()),
        ("absolute", float(values[2]) * 1.0001): 2,
        ("quantile", 0.5): max(int((values.cumsum(0) < 0.5 * values.sum()).sum()), 1),
        ("rank", 5): 5,
    }
    for (rule, value), rank in expected.items():
        report = sdops.resize(source, **{rule: value}, dry_run=True, output=tmp_path / "x.safetensors")
        found = {layer["layer"]: layer["rank"] for layer in report.data["layers"]}
        assert found[name] == rank, rule
    assert not (tmp_path / "x.safetensors").exists()


def test_budget_is_kept_and_better_than_one_rank(tmp_path):
    source = lora(tmp_path, rank=8)
    fixed = sdops.resize(source, rank=3, output=tmp_path / "fixed.safetensors")
    size = (tmp_path / "fixed.safetensors").stat().st_size + 6000  # what a budget sets aside for the header
    spread = sdops.resize(source, budget=size, output=tmp_path / "budget.safetensors")
    assert (tmp_path / "budget.safetensors").stat().st_size <= size
    assert spread.data["error"] <= fixed.data["error"]
    whole = sdops.resize(source, budget=10**9, output=tmp_path / "whole.safetensors")
    assert whole.data["changed"] == 0
    with pytest.raises(MismatchError, match="cannot be made smaller"):
        sdops.resize(source, budget=100, output=tmp_path / "none.safetensors")


def test_what_has_no_rank_stays(tmp_path):
    for family in ("dora", "full", "oft", "ia3"):
        source = lora(tmp_path, family)
        report = sdops.resize(source, rank=1, output=tmp_path / f"{family}-1.safetensors")
        assert bytes_of(open_adapter(source)) == bytes_of(open_adapter(tmp_path / f"{family}-1.safetensors"))
        assert any("as they are" in text for text in report.warnings)


def test_metadata(tmp_path):
    source = lora(tmp_path)
    sdops.resize(source, rank=2, output=tmp_path / "a.safetensors")
    header = open_adapter(tmp_path / "a.safetensors").source.metadata
    assert (header["ss_network_dim"], header["ss_network_alpha"]) == ("2", "2")
    assert json.loads(header["ss_network_args"]) == {"conv_dim": "2", "conv_alpha": "2"}
    assert header["ss_tag_frequency"] == '{"a": {"cat": 3}}'
    assert header["sshs_model_hash"] == digests(tmp_path / "a.safetensors").tensors
    made = json.loads(header["sdops"])
    assert made["verb"] == "resize"
    assert made["rank"] == 2
    assert len(made["inputs"][0]["sha256"]) == 64
    sdops.resize(source, rank=2, output=tmp_path / "b.safetensors", strip_training_metadata=True, hash_inputs=False)
    stripped = open_adapter(tmp_path / "b.safetensors").source.metadata
    assert "ss_tag_frequency" not in stripped
    assert stripped["ss_network_dim"] == "2"


def test_into_another_dialect(tmp_path):
    source = lora(tmp_path)
    sdops.resize(source, rank=4, to="diffusers", dtype="fp16", output=tmp_path / "d.safetensors")
    other = open_adapter(tmp_path / "d.safetensors")
    assert other.dialect == "diffusers"
    assert_same_deltas(open_adapter(source), other, 2e-3)


def test_fused_rows_with_swapped_halves(tmp_path):
    source = loras.save(
        tmp_path / "flux.safetensors", loras.tensors("diffusers", loras.SPELLINGS["diffusers", "flux1"], "lora", 4)
    )
    sdops.resize(source, rank=4, dtype="fp32", output=tmp_path / "same.safetensors", to="kohya")
    assert_same_deltas(open_adapter(source), open_adapter(tmp_path / "same.safetensors"), 2e-6)


def test_refusals(tmp_path):
    source, target = lora(tmp_path), tmp_path / "out.safetensors"
    with pytest.raises(UsageError, match="exclude each other"):
        sdops.resize(source, rank=2, energy=0.5, output=target)
    with pytest.raises(UsageError, match="share"):
        sdops.resize(source, energy=1.5, output=target)
    with pytest.raises(UsageError, match="dialect"):
        sdops.resize(source, rank=1, to="kohia", output=target)
    with pytest.raises(OutputError):
        sdops.resize(source, rank=1, output=source)
    arrays = loras.tensors("kohya", loras.SPELLINGS["kohya", "sd1"], "lora", 2)
    key = next(key for key in arrays if "lora_up" in key)
    broken = loras.save(tmp_path / "nan.safetensors", arrays | {key: arrays[key] * np.float16("nan")})
    with pytest.raises(FormatError, match="NaN"):
        sdops.resize(broken, rank=1, output=target)
    half = tmp_path / "half.safetensors"
    half.write_bytes(source.read_bytes()[:-100])
    with pytest.raises(FormatError):
        sdops.resize(half, rank=1, output=target)
    assert not target.exists()
    assert not list(tmp_path.glob(".sdops*"))


@pytest.mark.skipif(not SHARED.exists(), reason="the real files are not here")
@pytest.mark.parametrize("path", sorted(SHARED.glob("*.*")) if SHARED.exists() else [], ids=lambda path: path.name)
def test_real_files(path, tmp_path):
    adapter = open_adapter(path)
    if not adapter.patches:
        with pytest.raises(MismatchError):
            sdops.resize(path, rank=2, output=tmp_path / "r.safetensors")
        return
    report = sdops.resize(path, rank=2, to="kohya", output=tmp_path / "r.safetensors", hash_inputs=False)
    chosen = adapter.patches[::40]
    targets = {patch.target for patch in chosen}
    small = open_adapter(tmp_path / "r.safetensors")
    found = deltas(replace(small, patches=tuple(patch for patch in small.patches if patch.target in targets)))
    reported = {layer["layer"]: layer["error"] for layer in report.data["layers"]}
    for name, delta in deltas(replace(adapter, patches=chosen)).items():
        error = torch.linalg.norm(delta - found[name])
        assert reported[name] * torch.linalg.norm(delta) == pytest.approx(float(error), rel=1e-3, abs=1e-5)
