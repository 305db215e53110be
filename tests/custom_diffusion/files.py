"""Custom diffusion as the programs write it that made it up, for two layers of an SD1, whole, as deltas, as factors."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file

LDM = "model.diffusion_model."
BLOCKS = {  # as LDM calls them -> as diffusers does
    "input_blocks.1.1.transformer_blocks.0.attn2": "down_blocks.0.attentions.0.transformer_blocks.0.attn2",
    "output_blocks.11.1.transformer_blocks.0.attn2": "up_blocks.3.attentions.2.transformer_blocks.0.attn2",
}
LAYERS = [f"{block}.{layer}" for block in BLOCKS for layer in ("to_k", "to_v")]
RANK = 4

State = dict[str, torch.Tensor]  # layer as LDM calls it -> [320, 768]


def diffusers(layer: str) -> str:
    block, _, last = layer.rpartition(".")
    return f"{BLOCKS[block]}.{last}"


def weights(seed: int = 0) -> State:
    generator = torch.Generator().manual_seed(seed)
    return {layer: torch.randn(320, 768, generator=generator) / 28 for layer in LAYERS}


def factors(seed: int = 1, rank: int = RANK) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return {
        layer: (torch.randn(320, rank, generator=generator) / 20, torch.randn(rank, 768, generator=generator) / 20)
        for layer in LAYERS
    }


def deltas(seed: int = 1, rank: int = RANK) -> State:
    return {layer: u @ v for layer, (u, v) in factors(seed, rank).items()}


def tuned(seed: int = 1, rank: int = RANK) -> State:
    return {layer: weight + deltas(seed, rank)[layer] for layer, weight in weights().items()}


def words(number: int = 1, seed: int = 7) -> torch.Tensor:
    return torch.randn(number, 768, generator=torch.Generator().manual_seed(seed)) * 0.0137


def adobe(folder: Path, seed: int = 1, rank: int = RANK) -> Path:
    unet = {f"{diffusers(layer)}.weight": weight for layer, weight in tuned(seed, rank).items()}
    torch.save({"unet": unet, "modifier_token": {"<new1>": words(seed=seed)[0]}}, folder / "delta.bin")
    return folder / "delta.bin"


def compvis(folder: Path) -> Path:
    state = {f"{LDM}{layer}.weight": weight for layer, weight in tuned().items()}
    torch.save({"state_dict": state | {"embed": words(2)}}, folder / "delta_epoch=000004.ckpt")
    return folder / "delta_epoch=000004.ckpt"


def compressed(folder: Path, seed: int = 1, rank: int = RANK) -> Path:
    pairs = {f"{diffusers(layer)}.weight": {"u": u, "v": v} for layer, (u, v) in factors(seed, rank).items()}
    torch.save({"unet": pairs, "modifier_token": {"<new1>": words(seed=seed)[0]}}, folder / "compressed_delta.bin")
    return folder / "compressed_delta.bin"


def compressed_compvis(folder: Path) -> Path:
    pairs = {f"{LDM}{layer}.weight": {"u": u, "v": v} for layer, (u, v) in factors().items()}
    torch.save({"state_dict": pairs | {"embed": words(2)}}, folder / "compressed.ckpt")
    return folder / "compressed.ckpt"


def _webui(folder: Path, tensors: State, kind: str) -> Path:
    entries = {f"{LDM}{layer}.weight": kind for layer in LAYERS}
    header = {"json": json.dumps({"meta": {"version": "0.2.0"}, "entries": entries})}
    save_file(tensors, folder / "cat.delta.safetensors", metadata=header)
    embedding = {"string_to_token": {"*": 265}, "string_to_param": {"*": words()}, "name": "cat", "step": 500}
    torch.save(embedding, folder / "cat.pt")
    return folder / "cat.delta.safetensors"


def webui(folder: Path) -> Path:
    return _webui(folder, {f"{LDM}{layer}.weight": delta for layer, delta in deltas().items()}, "delta")


def webui_factors(folder: Path) -> Path:
    tensors = {}
    for layer, (u, v) in factors().items():
        tensors |= {f"{LDM}{layer}.weight.US": u, f"{LDM}{layer}.weight.Vh": v}
    return _webui(folder, tensors, "delta_factors")


def _processors() -> State:
    found = {}
    for layer, weight in tuned().items():
        block, _, last = diffusers(layer).rpartition(".")
        found[f"{block}.processor.{last}_custom_diffusion.weight"] = weight
    return found


def diffusers_safetensors(folder: Path) -> Path:
    save_file(_processors(), folder / "pytorch_custom_diffusion_weights.safetensors")
    save_file({"<new1>": words()[0]}, folder / "<new1>.safetensors")
    return folder / "pytorch_custom_diffusion_weights.safetensors"


def diffusers_bin(folder: Path) -> Path:
    """With the empty dicts of self attention, and all of cross attention."""
    state: dict[str, object] = dict(_processors())
    for block in BLOCKS.values():
        state[f"{block.replace('attn2', 'attn1')}.processor"] = {}
        state[f"{block}.processor.to_out_custom_diffusion.0.bias"] = torch.full((320,), 0.5)
    torch.save(state, folder / "pytorch_custom_diffusion_weights.bin")
    torch.save({"<new1>": words()[0]}, folder / "<new1>.bin")
    return folder / "pytorch_custom_diffusion_weights.bin"


WRITERS: dict[Callable[[Path], Path], tuple[str, str]] = {  # layout, kind
    adobe: ("adobe", "whole"),
    compvis: ("compvis", "whole"),
    compressed: ("compressed", "factors"),
    compressed_compvis: ("compressed", "factors"),
    webui: ("webui", "delta"),
    webui_factors: ("webui", "factors"),
    diffusers_safetensors: ("diffusers", "whole"),
    diffusers_bin: ("diffusers", "whole"),
}
