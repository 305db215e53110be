"""Laws of converting adapters: names change and numbers stay; families change and the change stays."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import sdops
from fixtures import loras
from sdops.adapters import family as family_of
from sdops.core.source import read
from sdops.dialects import dialect
from sdops.errors import FormatError, MismatchError, OutputError, UsageError
from sdops.verbs._adapter_names import names_of
from sdops.verbs._adapters import open_adapter, read_parts
from tests.dialects.helpers import assert_same_deltas, bytes_of, deltas

SHARED = Path(__file__).parents[3] / "shared" / "data" / "loras"


def lora(folder: Path, family: str, dialect: str = "kohya", architecture: str = "sd1", rank: int = 2) -> Path:
    arrays = loras.tensors(dialect, loras.SPELLINGS[dialect, architecture], family, rank)
    exact = {key: value.astype(np.float32) for key, value in arrays.items() if not key.endswith(".diff_b")}
    return loras.save(folder / f"{family}.safetensors", exact, {"ss_output_name": "x"})


@pytest.mark.parametrize(
    ("dialect", "architecture", "to"),
    [
        ("kohya", "sd1", "diffusers"),
        ("kohya", "sd1", "comfy"),
        ("kohya", "sdxl", "onetrainer"),
        ("diffusers", "sd1", "kohya"),
        ("comfy", "flux1", "kohya"),
        ("onetrainer", "flux1", "lycoris"),
    ],
)
def test_there_and_back_is_the_same_file(dialect, architecture, to, tmp_path):
    layers = loras.SPELLINGS[dialect, architecture]
    if to == "lycoris":
        layers = {stem: layer for stem, layer in layers.items() if "lora_te" not in stem}
    plain = "lora" if to == "diffusers" or dialect == "diffusers" else "lora_alpha"
    raw = loras.save(tmp_path / "raw.safetensors", loras.tensors(dialect, layers, plain), {"ss_output_name": "x"})
    first = tmp_path / "first.safetensors"
    sdops.convert(raw, to=dialect, output=first)  # in the order and with the names that we write
    sdops.convert(first, to=to, output=tmp_path / "there.safetensors")
    sdops.convert(tmp_path / "there.safetensors", to=dialect, output=tmp_path / "back.safetensors")
    assert open_adapter(tmp_path / "there.safetensors").dialect == to
    assert first.read_bytes() == (tmp_path / "back.safetensors").read_bytes()
    assert bytes_of(open_adapter(first)) == bytes_of(open_adapter(raw))


def test_split_and_fused(tmp_path):
    source = lora(tmp_path, "lora", "diffusers", "flux1")
    sdops.convert(source, to="kohya", output=tmp_path / "fused.safetensors")
    assert_same_deltas(open_adapter(source), open_adapter(tmp_path / "fused.safetensors"))
    sdops.convert(tmp_path / "fused.safetensors", to="diffusers", output=tmp_path / "split.safetensors")
    assert_same_deltas(open_adapter(source), open_adapter(tmp_path / "split.safetensors"))


def test_peft_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    source = lora(tmp_path, "lora_alpha", "peft", "flux1")
    unet = lora(tmp_path, "lora", "diffusers", "flux1")
    with pytest.raises(MismatchError, match="one model"):
        sdops.convert(unet, to="peft")
    assert not (tmp_path / "lora.peft").exists()
    report = sdops.convert(source, to="peft")
    assert report.data["output"] == "lora_alpha.peft"
    assert json.loads((tmp_path / "lora_alpha.peft" / "adapter_config.json").read_text())["peft_type"] == "LORA"
    assert_same_deltas(open_adapter(source), open_adapter(tmp_path / "lora_alpha.peft"))
    with pytest.raises(OutputError):
        sdops.convert(source, to="peft")


@pytest.mark.parametrize("family", ["loha", "lokr", "tucker", "lora_alpha"])
def test_exact_conversions_to_lora(family, tmp_path):
    source = lora(tmp_path, family)
    report = sdops.convert(source, family="lora", output=tmp_path / "l.safetensors")
    made = open_adapter(tmp_path / "l.safetensors")
    assert {patch.family for patch in made.patches} == {"lora"}
    assert not any("mid" in patch.parts for patch in made.patches)
    assert_same_deltas(open_adapter(source), made)
    assert report.data["captured"] == pytest.approx(1, abs=1e-12)
    if family == "loha":
        assert max(layer["rank"] for layer in report.data["layers"]) == 4  # r^2


def test_convolutions_keep_their_kernels(tmp_path):
    sdops.convert(lora(tmp_path, "loha"), family="lora", to="kohya", output=tmp_path / "l.safetensors")
    specs = open_adapter(tmp_path / "l.safetensors").source.specs
    assert specs["lora_unet_up_blocks_3_resnets_2_conv1.lora_down.weight"].shape[1:] == (64, 3, 3)
    assert specs["lora_unet_up_blocks_3_resnets_2_conv1.lora_up.weight"].shape[2:] == (1, 1)


@pytest.mark.parametrize("rank", [1, 3, 5])
@pytest.mark.parametrize("family", ["lokr", "loha", "full"])
def test_the_best_lora_of_a_rank(family, rank, tmp_path):
    source = lora(tmp_path, family)
    report = sdops.convert(source, family="lora", rank=rank, output=tmp_path / "l.safetensors")
    found = deltas(open_adapter(tmp_path / "l.safetensors"))
    captured = {layer["layer"]: layer["captured"] for layer in report.data["layers"]}
    for name, delta in deltas(open_adapter(source)).items():
        values = torch.linalg.svdvals(delta.double())
        best, norm = values[rank:].square().sum().sqrt(), torch.linalg.norm(delta.double())
        assert torch.linalg.norm(delta.double() - found[name]) == pytest.approx(
            float(best), rel=1e-4, abs=1e-6 * float(norm)
        )
        assert captured[name] == pytest.approx(float(1 - (best / norm) ** 2), abs=1e-6)


MODULES = {
    "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k": (
        "middle_block.1.transformer_blocks.0.attn2.to_k"
    ),
    "lora_unet_up_blocks_3_resnets_2_conv1": "output_blocks.11.0.in_layers.2",
}


@pytest.mark.parametrize("family", ["glora", "dora", "oft", "ia3"])
def test_with_the_base(family, tmp_path, small_checkpoint):
    base = small_checkpoint("sd15", dtype="F32")
    specs = sdops.open(base).specs
    arrays = {}
    for stem, module in MODULES.items():
        shape = specs[f"model.diffusion_model.{module}.weight"].shape
        if family != "glora" or len(shape) == 2:
            parts = loras.FAMILIES[family](shape, 2, np.random.default_rng(1))
            arrays |= {stem + suffix: values.astype(np.float32) for suffix, values in parts.items()}
    source = loras.save(tmp_path / "a.safetensors", arrays)
    with pytest.raises(MismatchError, match="depends on the weights"):
        sdops.convert(source, family="lora", output=tmp_path / "l.safetensors")
    report = sdops.convert(source, family="lora", base=base, energy=1.0, output=tmp_path / "l.safetensors")
    found = deltas(open_adapter(tmp_path / "l.safetensors"))
    adapter = open_adapter(source)
    for patch in adapter.patches:
        key = f"model.diffusion_model.{patch.target.module}.weight"
        weight = torch.frombuffer(read(sdops.open(base), key), dtype=torch.float32).reshape(specs[key].shape)
        delta = family_of(patch.family).delta(read_parts(adapter, patch), specs[key].shape, weight).flatten(1)
        assert torch.linalg.norm(found[str(patch.target)] - delta) <= 2e-6 * torch.linalg.norm(delta)
    assert report.data["captured"] == pytest.approx(1, abs=1e-6)
    low = sdops.convert(source, family="lora", base=base, rank=1, output=tmp_path / "m.safetensors")
    assert low.data["captured"] < 1
    made = json.loads(open_adapter(tmp_path / "m.safetensors").source.metadata["sdops"])
    assert [each["role"] for each in made["inputs"]] == ["a", "base"]


def test_to_differences(tmp_path):
    source = lora(tmp_path, "loha")
    sdops.convert(source, family="full", output=tmp_path / "d.safetensors")
    made = open_adapter(tmp_path / "d.safetensors")
    assert {patch.family for patch in made.patches} == {"full"}
    assert_same_deltas(open_adapter(source), made)


def test_refusals(tmp_path, small_checkpoint):
    source, target = lora(tmp_path, "loha"), tmp_path / "out.safetensors"
    with pytest.raises(UsageError, match="another family"):
        sdops.convert(source, to="kohya", rank=4, output=target)
    with pytest.raises(UsageError, match="family"):
        sdops.convert(source, family="lokr", output=target)
    with pytest.raises(MismatchError, match="diffusers"):
        sdops.convert(source, to="diffusers", output=target)
    with pytest.raises(UsageError, match="for LoRAs"):
        sdops.convert(small_checkpoint("sd15"), family="lora", output=target)
    with pytest.raises(MismatchError, match="Stable Diffusion 1"):
        sdops.convert(lora(tmp_path, "oft"), family="lora", base=small_checkpoint("sd21-ldm"), output=target)
    half = tmp_path / "half.safetensors"
    half.write_bytes(source.read_bytes()[:-10])
    with pytest.raises(FormatError):
        sdops.convert(half, to="kohya", output=target)
    assert not target.exists()


@pytest.mark.skipif(not SHARED.exists(), reason="the real files are not here")
def test_real_lokr_to_lora(tmp_path):
    source = SHARED / "lycoris_lokr_r8_sd1_kohya_names.safetensors"
    report = sdops.convert(source, family="lora", rank=8, output=tmp_path / "l.safetensors")
    assert 0.3 < report.data["captured"] < 1
    assert open_adapter(tmp_path / "l.safetensors").source.metadata["ss_network_dim"] == "8"


# ------------------------------------------------------------------------------------------------ cloneofsimo's lists


def complete_sd1(folder: Path) -> Path:
    """All layers that cloneofsimo counts, of rank 1, and two tokens."""
    names = names_of("sd1")
    rng = np.random.default_rng(0)
    arrays = {}
    for stem in dialect("cloneofsimo").stems(names):
        arrays[f"{stem}:up"] = rng.standard_normal((320 if stem == "unet:0" else 8, 1)).astype(np.float32)
        arrays[f"{stem}:down"] = rng.standard_normal((1, 768)).astype(np.float32)
    arrays |= {f"<s{number}>": rng.standard_normal(768).astype(np.float32) for number in (1, 2)}
    return loras.save(folder / "all.safetensors", arrays)


def test_lists_of_torch_are_written_and_read_again(tmp_path: Path) -> None:
    file = complete_sd1(tmp_path)
    report = sdops.convert(file, to="cloneofsimo", output=tmp_path / "x.pt")
    assert report.result == [str(tmp_path / f"x{end}") for end in (".pt", ".text_encoder.pt", ".ti.pt")]
    original = open_adapter(file)
    for name, kind, count in (("x.pt", "unet", 144), ("x.text_encoder.pt", "text_encoder", 48)):
        saved = torch.load(tmp_path / name, weights_only=True)
        assert type(saved) is list
        assert len(saved) == 2 * count
        for number, part in ((0, "up"), (0, "down"), (count - 1, "down")):
            wanted = read(original.source, f"{kind}:{number}:{part}")
            assert saved[2 * number + (part == "down")].numpy().tobytes() == bytes(wanted)
    tokens = torch.load(tmp_path / "x.ti.pt", weights_only=True)
    assert {name: tuple(vector.shape) for name, vector in tokens.items()} == {"<s1>": (768,), "<s2>": (768,)}
    assert {str(p.target) for name in ("x.pt", "x.text_encoder.pt") for p in open_adapter(tmp_path / name).patches} == {
        str(patch.target) for patch in original.patches
    }
    with pytest.raises(OutputError, match="exists"):
        sdops.convert(file, to="cloneofsimo", output=tmp_path / "x.pt")


def test_a_list_that_cannot_be_written_leaves_none_behind(tmp_path: Path) -> None:
    (tmp_path / "x.ti.pt").write_bytes(b"mine")
    with pytest.raises(OutputError, match=r"x\.ti\.pt"):
        sdops.convert(complete_sd1(tmp_path), to="cloneofsimo", output=tmp_path / "x.pt")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["all.safetensors", "x.ti.pt"]


@pytest.mark.parametrize("name", ["x.pt", "x.bin", "x.ckpt"])
def test_names_that_promise_torch_files_are_refused_elsewhere(tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError, match="are safetensors"):
        sdops.convert(complete_sd1(tmp_path), to="kohya", output=tmp_path / name)
