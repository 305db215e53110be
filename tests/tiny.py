"""Small checkpoints with real names, enough of them to be recognised, as plain numpy arrays and files.

A model is a dict: tensor name -> (safetensors dtype, array). Arrays of BF16 and fp8 tensors hold bit patterns.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from sdops.core.precision import FORMATS, decode, encode
from sdops.core.spec import DTYPE_BITS, Spec

Model = dict[str, tuple[str, Any]]

UNET = "model.diffusion_model."
VAE = "first_stage_model."
CLIP = "cond_stage_model.transformer.text_model."
FIRST = f"{UNET}input_blocks.0.0.weight"
LARGE = f"{UNET}input_blocks.2.1.transformer_blocks.0.attn2.to_k.weight"  # longer than one piece
IDS = f"{CLIP}embeddings.position_ids"
POSITIONS = np.arange(77, dtype=np.int64).reshape(1, 77)

UNET_SHAPES: dict[str, tuple[int, ...]] = {
    "input_blocks.0.0.weight": (320, 4, 3, 3),
    "input_blocks.0.0.bias": (320,),
    "input_blocks.2.1.transformer_blocks.0.attn2.to_k.weight": (320, 768),
    "input_blocks.4.0.in_layers.2.weight": (6, 5, 3, 3),
    "middle_block.1.norm.weight": (33,),
    "middle_block.1.transformer_blocks.0.attn1.to_q.weight": (12, 10),
    "output_blocks.11.1.transformer_blocks.0.attn2.to_k.weight": (320, 768),
    "out.0.weight": (9,),
    "out.2.weight": (4, 9, 3, 3),
    "out.2.bias": (4,),
    "time_embed.0.bias": (1,),
}
VAE_SHAPES: dict[str, tuple[int, ...]] = {
    "decoder.conv_in.weight": (512, 4, 3, 3),
    "decoder.up.0.block.0.norm1.weight": (16,),
    "decoder.up.3.upsample.conv.weight": (3, 2, 3, 3),
    "encoder.conv_in.weight": (5, 3, 3, 3),
}
CLIP_SHAPES: dict[str, tuple[int, ...]] = {
    "embeddings.token_embedding.weight": (3, 768),
    "encoder.layers.11.layer_norm1.weight": (768,),
    "encoder.layers.0.mlp.fc1.bias": (24,),
}


def shapes(*, unet: bool = True, vae: bool = True, clip: bool = True) -> dict[str, tuple[int, ...]]:
    found = {UNET + name: shape for name, shape in UNET_SHAPES.items()} if unet else {}
    found |= {VAE + name: shape for name, shape in VAE_SHAPES.items()} if vae else {}
    return found | ({CLIP + name: shape for name, shape in CLIP_SHAPES.items()} if clip else {})


def encoded(values: Any, dtype: str) -> tuple[str, Any]:
    """Numbers as a tensor of a floating dtype."""
    array = np.asarray(values, np.float64)
    raw = encode(np.ascontiguousarray(array).reshape(-1), dtype)[0].reshape(array.shape)
    return dtype, raw if dtype == "BF16" else raw.view({"F16": "f2", "F32": "f4", "F64": "f8"}[dtype])


def numbers(tensor: tuple[str, Any]) -> Any:
    """A floating tensor's values, float64."""
    dtype, array = tensor
    return decode(np.ascontiguousarray(array).reshape(-1).view(FORMATS[dtype].raw), dtype).reshape(array.shape)


def checkpoint(seed: int = 0, dtype: str = "F16", *, spread: float = 0.02, **parts: bool) -> Model:
    """A fine-tune of the one base that all seeds share (seed 0 is the base), with all parts or some."""
    return dict(_made(seed, dtype, spread, tuple(sorted(parts.items()))))


@cache
def _made(seed: int, dtype: str, spread: float, chosen: tuple[tuple[str, bool], ...]) -> Model:
    parts, model = dict(chosen), Model()
    for index, (key, shape) in enumerate(shapes(**parts).items()):
        base = np.random.default_rng(1000 + index).standard_normal(shape) * 0.05
        change = np.random.default_rng([seed, index]).standard_normal(shape) * 0.05 * spread
        model[key] = encoded(base + (change if seed else 0), dtype)
    if parts.get("clip", True):
        model[IDS] = ("I64", POSITIONS)
    return model


def write(path: Path, model: Mapping[str, tuple[str, Any]], metadata: Mapping[str, str] | None = None) -> Path:
    """A safetensors file."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    chunks, end = [], 0
    for key, (dtype, array) in sorted(model.items(), key=lambda item: (-DTYPE_BITS[item[1][0]], item[0])):
        raw = np.ascontiguousarray(array).tobytes()
        header[key] = {"dtype": dtype, "shape": list(np.shape(array)), "data_offsets": [end, end + len(raw)]}
        chunks.append(raw)
        end += len(raw)
    text = json.dumps(header, ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"".join(chunks))
    return path


_NUMPY = {"BF16": "u2", "F16": "f2", "F32": "f4", "F64": "f8", "I64": "i8", "I32": "i4", "U8": "u1", "BOOL": "u1"}


def load(path: Path) -> Model:
    """What a safetensors file holds, read in the plainest way."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    header.pop("__metadata__", None)
    model: Model = {}
    for key, entry in header.items():
        begin, end = (8 + length + offset for offset in entry["data_offsets"])
        raw = np.frombuffer(data[begin:end], _NUMPY.get(entry["dtype"], "u1"))
        model[key] = (entry["dtype"], raw.reshape(entry["shape"]))
    return model


def metadata_of(path: Path) -> dict[str, str]:
    data = path.read_bytes()
    found: dict[str, str] = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")]).get("__metadata__", {})
    return found


def same(a: tuple[str, Any], b: tuple[str, Any]) -> bool:
    """Equal in dtype, shape and every bit."""
    return (
        a[0] == b[0] and np.shape(a[1]) == np.shape(b[1]) and np.asarray(a[1]).tobytes() == np.asarray(b[1]).tobytes()
    )


class Memory:
    """A model in memory as a Source that counts what is read from it."""

    def __init__(self, model: Mapping[str, tuple[str, Any]], name: str = "memory") -> None:
        self.name = name
        self.metadata: dict[str, str] = {}
        self.specs = {key: Spec(dtype, np.shape(array)) for key, (dtype, array) in model.items()}
        self.reads: dict[str, int] = {}
        self._data = {key: np.ascontiguousarray(array).tobytes() for key, (_, array) in model.items()}

    def read_into(self, key: str, start: int, buffer: memoryview) -> None:
        self.reads[key] = self.reads.get(key, 0) + len(buffer)
        buffer[:] = self._data[key][start : start + len(buffer)]

    def close(self) -> None:
        pass
