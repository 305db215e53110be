"""Every format's files, written by the libraries that define them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

Tensors = Mapping[str, Tensor]


def write_safetensors(folder: Path, tensors: Tensors) -> Path:
    path = folder / "model.safetensors"
    save_file(dict(tensors), path, metadata={"format": "pt"})
    return path


def write_torch(folder: Path, tensors: Tensors, *, legacy: bool, protocol: int) -> Path:
    path = folder / "model.ckpt"
    torch.save(dict(tensors), path, pickle_protocol=protocol, _use_new_zipfile_serialization=not legacy)
    return path


def write_shards(folder: Path, tensors: Tensors, *, stem: str = "model", variant: str = "", index: bool = True) -> Path:
    """Two shards of every second tensor each."""
    names = list(tensors)
    dotted = f".{variant}" if variant else ""
    weight_map = {}
    for number in (1, 2):
        part = {name: tensors[name] for name in names[number - 1 :: 2]}
        shard = f"{stem}{dotted}-{number:05d}-of-00002.safetensors"
        save_file(part, folder / shard)
        weight_map |= dict.fromkeys(part, shard)
    if not index:
        return folder / f"{stem}{dotted}-00001-of-00002.safetensors"
    path = folder / f"{stem}.safetensors.index{dotted}.json"
    path.write_text(json.dumps({"metadata": {"total_size": 0}, "weight_map": weight_map}))
    return path


def write_component(folder: Path, tensors: Tensors) -> Path:
    path = folder / "unet"
    path.mkdir()
    (path / "config.json").write_text(json.dumps({"_class_name": "UNet2DConditionModel"}))
    save_file(dict(tensors), path / "diffusion_pytorch_model.safetensors")
    return path


# Format -> ways to write it.
WRITERS: dict[str, Callable[[Path, Tensors], Path]] = {
    "safetensors": write_safetensors,
    "torch_zip": partial(write_torch, legacy=False, protocol=2),
    "torch_zip-3": partial(write_torch, legacy=False, protocol=3),
    "torch_zip-4": partial(write_torch, legacy=False, protocol=4),
    "torch_zip-5": partial(write_torch, legacy=False, protocol=5),
    "torch_legacy": partial(write_torch, legacy=True, protocol=2),
    "torch_legacy-4": partial(write_torch, legacy=True, protocol=4),
    "torch_legacy-5": partial(write_torch, legacy=True, protocol=5),
    "sharded": write_shards,
    "sharded-siblings": partial(write_shards, index=False),
    "diffusers": write_component,
}


def raw_bytes(tensor: Tensor) -> bytes:
    """Bytes of the contiguous tensor."""
    flat = tensor.detach().resolve_conj().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""


def sample(seed: int = 0) -> dict[str, Tensor]:
    """A small model of mixed dtypes."""
    torch.manual_seed(seed)
    return {
        "conv.weight": torch.randn(4, 3, 3, 3),
        "conv.bias": torch.randn(4).half(),
        "norm.weight": torch.randn(8).bfloat16(),
        "position_ids": torch.arange(7).reshape(1, 7),
        "scalar": torch.tensor(3.5, dtype=torch.float64),
        "empty": torch.zeros(0, 5),
        "mask": torch.tensor([True, False, True]),
    }
