"""Laws of merging LoRAs: sums of changes, never of factors."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import sdops
from fixtures import loras
from sdops.adapters import family as family_of
from sdops.core.patch import Adapter
from sdops.core.source import read
from sdops.errors import FormatError, MismatchError, UsageError
from sdops.verbs._adapters import open_adapter, read_parts
from tests.dialects.helpers import bytes_of, deltas

SHARED = Path(__file__).parents[3] / "shared" / "data" / "loras"
FACTORED = ["lora", "lora_alpha", "tucker", "loha", "lokr"]


def lora(
    folder: Path,
    name: str,
    family: str = "lora_alpha",
    dialect: str = "kohya",
    architecture: str = "sd1",
    rank: int = 2,
    seed: int = 0,
    metadata: dict[str, str] | None = None,
) -> Path:
    """Float32, so that only the arithmetic counts. `seed` turns the numbers round."""
    layers = loras.SPELLINGS[dialect, architecture]
    arrays = loras.tensors(dialect, layers, family, rank)
    exact = {key: np.roll(value.astype(np.float32), 5 * seed) for key, value in arrays.items()}
    return loras.save(folder / f"{name}.safetensors", exact, metadata)


def summed(adapters: list[Adapter], weights: list[float]) -> dict[str, torch.Tensor]:
    total: dict[str, torch.Tensor] = {}
    for adapter, weight in zip(adapters, weights, strict=True):
        for name, delta in deltas(adapter).items():
            total[name] = total.get(name, torch.zeros_like(delta)) + weight * delta
    return total


def assert_sum(output: Path, files: list[Path], weights: list[float], tolerance: float = 1e-6) -> None:
    found, wanted = deltas(open_adapter(output)), summed([open_adapter(file) for file in files], weights)
    assert found.keys() == wanted.keys()
    for name, delta in wanted.items():
        assert torch.linalg.norm(found[name] - delta) <= tolerance * torch.linalg.norm(delta), name


@pytest.mark.parametrize("one", FACTORED)
@pytest.mark.parametrize("other", [*FACTORED, "full"])
def test_concat_is_the_sum_of_the_changes(one, other, tmp_path):
    files = [lora(tmp_path, "a", one, rank=3), lora(tmp_path, "b", other, seed=1)]
    sdops.merge(*files, weights=(0.7, -0.3), output=tmp_path / "c.safetensors")
    assert_sum(tmp_path / "c.safetensors", files, [0.7, -0.3])


@pytest.mark.parametrize(
    ("one", "other"), [(("kohya", "flux1"), ("diffusers", "flux1")), (("onetrainer", "flux1"), ("xlabs", "flux1"))]
)
def test_dialects_that_divide_layers_in_other_ways(one, other, tmp_path):
    files = [lora(tmp_path, "a", "lora", *one), lora(tmp_path, "b", "lora", *other)]
    for to in ("kohya", "comfy"):
        sdops.merge(*files, weights=(1.0, -2.0), to=to, output=tmp_path / f"{to}.safetensors")
        assert_sum(tmp_path / f"{to}.safetensors", files, [1.0, -2.0])


def test_three_and_one(tmp_path):
    files = [lora(tmp_path, name, seed=i, rank=i + 1) for i, name in enumerate("abc")]
    sdops.merge(*files, output=tmp_path / "d.safetensors")
    assert_sum(tmp_path / "d.safetensors", files, [1.0, 1.0, 1.0])
    sdops.merge(files[0], weights=(0.5,), output=tmp_path / "half.safetensors")
    assert_sum(tmp_path / "half.safetensors", files[:1], [0.5])


@pytest.mark.parametrize("family", [*FACTORED, "dora", "oft", "full"])
def test_one_alone_at_its_own_strength_keeps_every_bit(family, tmp_path):
    file = lora(tmp_path, "a", family)
    sdops.merge(file, output=tmp_path / "same.safetensors")
    assert bytes_of(open_adapter(file)) == bytes_of(open_adapter(tmp_path / "same.safetensors"))


def test_no_ranks_are_wasted(tmp_path):
    """A LoRA with itself has its own rank, and with itself taken away nothing is left."""
    file = lora(tmp_path, "a", rank=3)
    report = sdops.merge(file, file, output=tmp_path / "twice.safetensors")
    assert {layer["rank"] for layer in report.data["layers"]} == {3}
    assert_sum(tmp_path / "twice.safetensors", [file], [2.0])
    with pytest.raises(MismatchError, match="nothing is left"):
        sdops.merge(file, file, weights=(0, 0), output=tmp_path / "none.safetensors")


def test_svd_is_the_best_of_its_rank(tmp_path):
    files = [lora(tmp_path, "a", rank=3), lora(tmp_path, "b", rank=3, seed=1)]
    report = sdops.merge(*files, method="svd", rank=2, output=tmp_path / "c.safetensors")
    found, wanted = deltas(open_adapter(tmp_path / "c.safetensors")), summed([open_adapter(f) for f in files], [1, 1])
    reported = {layer["layer"]: layer["error"] for layer in report.data["layers"]}
    for name, delta in wanted.items():
        best = torch.linalg.svdvals(delta.double())[2:].square().sum().sqrt()
        error = torch.linalg.norm(found[name] - delta)
        assert error == pytest.approx(float(best), rel=1e-4)
        assert reported[name] * torch.linalg.norm(delta) == pytest.approx(float(best), rel=1e-4)
    report = sdops.merge(*files, method="svd", output=tmp_path / "d.safetensors")
    assert {layer["rank"] for layer in report.data["layers"]} == {3}


def test_orthogonal_leaves_the_first_alone(tmp_path):
    files = [lora(tmp_path, "a", rank=3), lora(tmp_path, "b", rank=2, seed=1)]
    sdops.merge(*files, method="orthogonal", output=tmp_path / "c.safetensors")
    found = deltas(open_adapter(tmp_path / "c.safetensors"))
    first, second = (deltas(open_adapter(file)) for file in files)
    for name, delta in first.items():
        rows = torch.linalg.svd(delta.double(), full_matrices=False).Vh[:3]  # what the first reacts to
        merged = found[name].double()
        assert torch.linalg.norm(merged @ rows.T - delta.double() @ rows.T) <= 1e-5 * torch.linalg.norm(delta)
        others = merged - merged @ rows.T @ rows
        wanted = second[name].double() - second[name].double() @ rows.T @ rows
        assert torch.linalg.norm(others - wanted) <= 1e-5 * torch.linalg.norm(wanted)


@pytest.mark.parametrize("method", ["ties", "dare", "knots"])
def test_core_methods_with_everything_kept(method, tmp_path):
    """With density 1 DARE is the sum; TIES and KnOTS of a LoRA with itself are that LoRA."""
    files = [lora(tmp_path, "a", rank=3), lora(tmp_path, "b", rank=2, seed=1)]
    if method == "dare":
        sdops.merge(*files, method=method, density=1.0, output=tmp_path / "c.safetensors")
        assert_sum(tmp_path / "c.safetensors", files, [1.0, 1.0])
        return
    sdops.merge(files[0], files[0], method=method, density=1.0, output=tmp_path / "c.safetensors")
    assert_sum(tmp_path / "c.safetensors", files[:1], [1.0], 2e-6)


def test_ties_on_a_core_against_its_definition(tmp_path):
    """Both LoRAs diagonal in one basis: the core is diagonal too, and TIES can be done by hand."""
    basis = np.eye(8, 4, dtype=np.float32)
    down = np.eye(4, 6, dtype=np.float32)
    stem = "lora_unet_middle_block_1_proj_in"
    stem = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
    for name, values in (("a", [4, 3, -2, 0.5]), ("b", [-1, 5, -6, 0.25])):
        up = basis * np.array(values, np.float32)
        loras.save(tmp_path / f"{name}.safetensors", {f"{stem}.lora_up.weight": up, f"{stem}.lora_down.weight": down})
    files = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    sdops.merge(*files, method="ties", density=3 / 16, output=tmp_path / "c.safetensors")
    found = next(iter(deltas(open_adapter(tmp_path / "c.safetensors")).values()))
    assert torch.allclose(found.diagonal()[:4], torch.tensor([4.0, 4.0, -4.0, 0.0]), atol=1e-5)


def test_dare_is_random_by_seed_alone(tmp_path):
    files = [lora(tmp_path, "a"), lora(tmp_path, "b", seed=1)]
    made = []
    for name, seed, jobs in (("one", 1, 1), ("same", 1, 2), ("other", 2, 1)):
        out = tmp_path / f"{name}.safetensors"
        sdops.merge(*files, method="dare", seed=seed, jobs=jobs, output=out)
        made.append(bytes_of(open_adapter(out)))
    assert made[0] == made[1]
    assert made[0] != made[2]


def test_block_weights(tmp_path):
    files = [lora(tmp_path, "a"), lora(tmp_path, "b", seed=1)]
    sdops.merge(*files, blocks=("1, OUT11=0.5, clip_l=0", "IN01=0"), output=tmp_path / "c.safetensors")
    found = deltas(open_adapter(tmp_path / "c.safetensors"))
    one, other = (deltas(open_adapter(file)) for file in files)
    for name, delta in found.items():
        first = 0.5 if "output_blocks.11" in name else 0.0 if "clip_l" in name else 1.0
        second = 0.0 if "input_blocks.1." in name else 1.0
        wanted = first * one[name] + second * other[name]
        assert torch.linalg.norm(delta - wanted) <= 1e-6 * torch.linalg.norm(wanted)


def test_metadata(tmp_path):
    said = {
        "ss_base_model_version": "sd_v1",
        "ss_tag_frequency": '{"set": {"cat": 3, "hat": 1}}',
        "modelspec.trigger_phrase": "mycat, fluffy",
    }
    other = {**said, "ss_tag_frequency": '{"set": {"cat": 2}}', "modelspec.trigger_phrase": "face, fluffy"}
    files = [lora(tmp_path, "a", metadata=said), lora(tmp_path, "b", seed=1, metadata=other)]
    sdops.merge(*files, output=tmp_path / "c.safetensors")
    header = open_adapter(tmp_path / "c.safetensors").source.metadata
    assert header["modelspec.trigger_phrase"] == "mycat, fluffy, face"
    assert json.loads(header["ss_tag_frequency"]) == {"set": {"cat": 5, "hat": 1}}
    assert header["ss_base_model_version"] == "sd_v1"
    assert header["ss_network_dim"] == "4"
    made = json.loads(header["sdops"])
    assert (made["method"], made["weights"], len(made["inputs"])) == ("concat", [1.0, 1.0], 2)
    assert all(len(each["sha256"]) == 64 for each in made["inputs"])
    sdops.merge(*files, output=tmp_path / "d.safetensors", strip_training_metadata=True)
    stripped = open_adapter(tmp_path / "d.safetensors").source.metadata
    assert "ss_tag_frequency" not in stripped
    assert stripped["modelspec.trigger_phrase"] == "mycat, fluffy, face"


def test_refusals(tmp_path, small_checkpoint):
    one, other = lora(tmp_path, "a"), lora(tmp_path, "x", architecture="sdxl")
    target = tmp_path / "out.safetensors"
    with pytest.raises(MismatchError, match=r"Stable Diffusion 1.*Stable Diffusion XL"):
        sdops.merge(one, other, output=target)
    with pytest.raises(MismatchError, match="is not"):
        sdops.merge(one, small_checkpoint("sd15-ldm"), output=target)
    with pytest.raises(UsageError, match="no way to merge LoRAs"):
        sdops.merge(one, one, method="slerp", output=target)
    with pytest.raises(UsageError, match="for checkpoints"):
        sdops.merge(one, one, alpha=0.3, output=target)
    with pytest.raises(UsageError, match="1 weight for 2 files"):
        sdops.merge(one, one, weights=(1,), output=target)
    with pytest.raises(UsageError, match="lazily"):
        sdops.merge(one, one)
    with pytest.raises(MismatchError, match="depends on the weights"):
        sdops.merge(one, lora(tmp_path, "dora", "dora"), output=target)
    arrays = loras.tensors("kohya", loras.SPELLINGS["kohya", "sd1"], "lora", 2)
    key = next(key for key in arrays if "lora_up" in key)
    nan = loras.save(tmp_path / "nan.safetensors", arrays | {key: arrays[key] * np.float16("nan")})
    with pytest.raises(FormatError, match="NaN"):
        sdops.merge(one, nan, output=target)
    assert not target.exists()
    assert not list(tmp_path.glob(".sdops*"))


@pytest.mark.skipif(not SHARED.exists(), reason="the real files are not here")
def test_real_files_of_three_dialects(tmp_path):
    names = ("catundchat_sd15_diffusers_old.safetensors", "cloneofsimo_lora_disney.safetensors")
    files = [SHARED / name for name in names]
    sdops.merge(*files, weights=(0.5, 0.5), to="kohya", dtype="fp32", output=tmp_path / "c.safetensors")
    assert_sum(tmp_path / "c.safetensors", files, [0.5, 0.5])


MODULES = {
    "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k": (
        "middle_block.1.transformer_blocks.0.attn2.to_k"
    ),
    "lora_unet_up_blocks_3_resnets_2_conv1": "output_blocks.11.0.in_layers.2",
}


def fitting(folder: Path, base: Path, family: str, seed: int) -> Path:
    """An adapter whose layers have the base's shapes."""
    specs = sdops.open(base).specs
    arrays = {}
    for stem, module in MODULES.items():
        shape = specs[f"model.diffusion_model.{module}.weight"].shape
        if family in ("glora", "boft") and len(shape) == 4:
            continue  # the fixtures have none that fit
        parts = loras.FAMILIES[family](shape, 2, np.random.default_rng(seed))
        arrays |= {stem + suffix: values.astype(np.float32) for suffix, values in parts.items()}
    return loras.save(folder / f"{family}{seed}.safetensors", arrays)


@pytest.mark.parametrize("family", ["dora", "dora_inputs", "glora", "oft", "boft", "ia3"])
def test_families_that_depend_on_the_base(family, tmp_path, small_checkpoint):
    base = small_checkpoint("sd15", dtype="F32")
    files = [fitting(tmp_path, base, family, 1), fitting(tmp_path, base, "lora", 2)]
    sdops.merge(*files, weights=(0.7, -0.3), base=base, output=tmp_path / "c.safetensors")
    merged = deltas(open_adapter(tmp_path / "c.safetensors"))
    wanted = based([open_adapter(file) for file in files], [0.7, -0.3], base)
    assert merged.keys() == wanted.keys()
    for name, delta in wanted.items():
        assert torch.linalg.norm(merged[name] - delta) <= 1e-6 * torch.linalg.norm(delta), name


def based(adapters: list[Adapter], weights: list[float], base: Path) -> dict[str, torch.Tensor]:
    """The sum of changes that depend on the base, by the families' own definition."""
    total: dict[str, torch.Tensor] = {}
    source = sdops.open(base)
    for adapter, weight in zip(adapters, weights, strict=True):
        for patch in adapter.patches:
            key = f"model.diffusion_model.{patch.target.module}.weight"
            shape = source.specs[key].shape
            values = torch.frombuffer(read(source, key), dtype=torch.float32).reshape(shape)
            delta = (
                family_of(patch.family).delta(read_parts(adapter, patch), shape, values, **patch.settings).flatten(1)
            )
            total[str(patch.target)] = total.get(str(patch.target), torch.zeros_like(delta)) + weight * delta
    return total
