"""Hypernetworks and custom diffusion on SD2 and SDXL: all their layers' names, small shapes."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file

import sdops
from fixtures import make
from tests.hypernetworks import files

UNET = "model.diffusion_model."
FAMILIES = {"sd21": ("sd2", 1024), "sdxl": ("sdxl", 2048)}
# Two attentions of each as LDM (SGM) and as diffusers call them.
BLOCKS = {
    "sd21": {
        "input_blocks.1.1.transformer_blocks.0.attn2": "down_blocks.0.attentions.0.transformer_blocks.0.attn2",
        "output_blocks.11.1.transformer_blocks.0.attn2": "up_blocks.3.attentions.2.transformer_blocks.0.attn2",
    },
    "sdxl": {
        "input_blocks.4.1.transformer_blocks.1.attn2": "down_blocks.1.attentions.0.transformer_blocks.1.attn2",
        "middle_block.1.transformer_blocks.9.attn2": "mid_block.attentions.0.transformer_blocks.9.attn2",
    },
}


@pytest.fixture(scope="module", params=FAMILIES)
def model(request, tmp_path_factory):
    """Name, and a U-Net whose attentions look at texts as wide as real ones."""
    name, width = request.param, FAMILIES[request.param][1]
    generator = torch.Generator().manual_seed(2)
    state = {}
    for key, (_, shape) in make.shrunk(make.specs(make.ALIASES[name])).items():
        is_text = key.endswith(("attn2.to_k.weight", "attn2.to_v.weight"))
        block = key.removeprefix(UNET).rsplit(".", 2)[0]
        if key.startswith(UNET) and (not is_text or block in BLOCKS[name]):  # two attentions are enough
            state[key] = torch.randn((shape[0], width) if is_text else shape, generator=generator) / 20
    path = tmp_path_factory.mktemp(name) / "unet.safetensors"
    save_file(state, path)
    return name, path


def same(first, second, before) -> None:
    """Both change the same tensors in the same way, up to the rounding of float32."""
    changed = 0
    for key, value in before.items():
        changed += not torch.equal(value, first[key])
        torch.testing.assert_close(first[key], second[key], rtol=0, atol=1e-5)
    assert changed


def test_a_hypernetwork_is_baked_in_and_becomes_a_lora(model, tmp_path):
    name, path = model
    before = load_file(path)
    width = FAMILIES[name][1]
    made = files.modules((width,), structure=[1, 0.004, 1])
    network = files.write(tmp_path / "h.pt", made, layer_structure=[1, 0.004, 1])
    report = sdops.hypernet.apply(path, (network, 0.5), output=tmp_path / "baked.safetensors")
    assert report.data["family"] == FAMILIES[name][0]
    assert all(fact["exact"] for fact in report.data["contexts"])
    baked = load_file(tmp_path / "baked.safetensors")
    key, value = made[width]
    for part, chain in (("to_k", key), ("to_v", value)):
        a = (chain.linear[1].weight @ chain.linear[0].weight).detach().double()
        for block in BLOCKS[name]:
            weight = before[f"{UNET}{block}.{part}.weight"].double()
            expected = weight + 0.5 * weight @ a
            torch.testing.assert_close(baked[f"{UNET}{block}.{part}.weight"].double(), expected, rtol=0, atol=1e-6)
    sdops.hypernet.to_lora((network, 0.5), model=path, rank=16, dtype="fp32", output=tmp_path / "lora.safetensors")
    sdops.apply(path, lora=[tmp_path / "lora.safetensors"], output=tmp_path / "applied.safetensors")
    same(baked, load_file(tmp_path / "applied.safetensors"), before)


def test_custom_diffusion_is_applied_and_becomes_a_lora(model, tmp_path):
    name, path = model
    before, width = load_file(path), FAMILIES[name][1]
    generator = torch.Generator().manual_seed(4)
    factors, whole = {}, {}
    for ldm, diffusers in BLOCKS[name].items():
        for part in ("to_k", "to_v"):
            weight = before[f"{UNET}{ldm}.{part}.weight"]
            u, v = (torch.randn(shape, generator=generator) / 20 for shape in ((len(weight), 3), (3, width)))
            factors[f"{diffusers}.{part}.weight"] = {"u": u, "v": v}
            whole[f"{diffusers}.{part}.weight"] = weight + u @ v
    word = {"<new1>": torch.randn(768 if name == "sdxl" else width, generator=generator) / 70}
    torch.save({"unet": factors, "modifier_token": word}, tmp_path / "compressed.bin")
    torch.save({"unet": whole, "modifier_token": word}, tmp_path / "delta.bin")
    report = sdops.custom.apply(path, tmp_path / "delta.bin", output=tmp_path / "a.safetensors")
    assert report.data["words"] == ["<new1>"]
    sdops.custom.to_lora(tmp_path / "compressed.bin", output=tmp_path / "lora.safetensors")
    sdops.apply(path, lora=[tmp_path / "lora.safetensors"], output=tmp_path / "b.safetensors")
    same(load_file(tmp_path / "a.safetensors"), load_file(tmp_path / "b.safetensors"), before)
    written = sdops.custom.convert(tmp_path / "delta.bin", to="compvis", output=tmp_path / "c.ckpt").data["outputs"][0]
    state = torch.load(written, weights_only=True)["state_dict"]
    for ldm, diffusers in BLOCKS[name].items():
        assert torch.equal(state[f"{UNET}{ldm}.to_k.weight"], whole[f"{diffusers}.to_k.weight"])
