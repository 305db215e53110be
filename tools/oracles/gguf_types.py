"""Test vectors for GGML's tensor types from the `gguf` package, and a comparison on many random blocks.

    python tools/oracles/gguf_types.py fixtures/ggml_vectors.json.gz [--compare BLOCKS]

Runs in an environment of its own (`pip install gguf`) with the repository on PYTHONPATH. The same version writes the
same file. `--compare` also runs sdops on random blocks of every type and reports the types whose bits differ.
"""

from __future__ import annotations

import argparse
import base64
import gzip
import json
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType, dequantize, quantize
from gguf.constants import GGML_QUANT_SIZES

# Type -> places of fp16 numbers in a block; random bytes there would be NaN.
HALVES = {
    "Q4_0": [0], "Q4_1": [0, 2], "Q5_0": [0], "Q5_1": [0, 2], "Q8_0": [0], "Q2_K": [80, 82], "Q3_K": [108],
    "Q4_K": [0, 2], "Q5_K": [0, 2], "Q6_K": [208], "IQ4_NL": [0], "IQ4_XS": [0],
}  # fmt: skip
ENCODED = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "BF16", "F16")


def random_blocks(name: str, count: int, seed: int) -> np.ndarray:
    """Any bits, with reasonable scales."""
    rng = np.random.default_rng(seed)
    size = GGML_QUANT_SIZES[GGMLQuantizationType[name]][1]
    blocks = rng.integers(0, 256, (count, size), dtype=np.uint8)
    for place in HALVES[name]:
        scale = (rng.standard_normal((count, 1)) * 0.01).astype(np.float16)
        blocks[:, place : place + 2] = scale.view(np.uint8)
    return blocks


def numbers(count: int, seed: int) -> np.ndarray:
    """Blocks of 32: weights, zeros, constants, ties, extremes."""
    rng = np.random.default_rng(seed)
    blocks = (rng.standard_normal((count, 32)) * 0.02).astype(np.float32)
    special = [np.zeros(32), np.full(32, 0.5), np.full(32, -3.0), np.arange(32) - 15.5, np.arange(32) * 1e-8]
    special += [np.arange(-127, 129, 8) / 2, -np.arange(32.0), np.where(np.arange(32) % 2, 1.0, -1.0)]
    blocks[: len(special)] = np.array(special)[:count]
    return blocks


def text(array: np.ndarray) -> str:
    """Bytes as JSON can hold them."""
    return base64.b64encode(np.ascontiguousarray(array).tobytes()).decode()


def decoded(name: str, blocks: np.ndarray) -> np.ndarray:
    """Values of blocks, by the package."""
    return dequantize(blocks, GGMLQuantizationType[name])


def encoded(name: str, values: np.ndarray) -> np.ndarray:
    """Bytes of blocks, by the package."""
    return quantize(values, GGMLQuantizationType[name]).view(np.uint8)


def vectors() -> dict[str, object]:
    """What the tests compare with."""
    values = numbers(16, 1)
    decode = {}
    for seed, name in enumerate(HALVES):
        blocks = random_blocks(name, 3, seed)
        decode[name] = {"blocks": text(blocks), "values": text(decoded(name, blocks))}
    encode = {name: text(encoded(name, values)) for name in ENCODED}
    return {"decode": decode, "encode": {"values": text(values), **encode}}


def compare(count: int) -> list[str]:
    """Types whose bits differ between sdops and the package."""
    from sdops.core.ggml_blocks import dequantise, quantise

    wrong = []
    for seed, name in enumerate(HALVES):
        blocks = random_blocks(name, count, 100 + seed)
        ours, theirs = dequantise(blocks.reshape(-1), name), decoded(name, blocks).reshape(-1)
        if ours.tobytes() != theirs.tobytes():
            wrong.append(f"{name}: {np.count_nonzero(ours.view('u4') != theirs.view('u4'))} values decoded otherwise")
    values = numbers(count, 2)
    for name in ENCODED:
        ours, theirs = quantise(values.reshape(-1), name), encoded(name, values).reshape(-1)
        if ours.tobytes() != theirs.tobytes():
            wrong.append(f"{name}: {np.count_nonzero(ours != theirs)} bytes encoded otherwise")
    return wrong


def main() -> None:
    """Write the vectors; compare if asked to."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output", type=Path)
    parser.add_argument("--compare", type=int, default=0, metavar="BLOCKS")
    arguments = parser.parse_args()
    arguments.output.write_bytes(gzip.compress(json.dumps(vectors(), sort_keys=True).encode(), mtime=0))
    if arguments.compare:
        wrong = compare(arguments.compare)
        print("\n".join(wrong) or f"equal bits for {arguments.compare} blocks of every type")
        raise SystemExit(bool(wrong))


if __name__ == "__main__":
    main()
