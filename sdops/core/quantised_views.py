"""Weights as scaled fp8 in ComfyUI's two spellings: the reverse of `core.views.Dequantised`.

    old   X.weight F8, X.scale_weight F32, and once per model `scaled_fp8`: two elements of the fp8 dtype
    new   X.weight F8, X.weight_scale F32, X.comfy_quant: U8, JSON {"format": "float8_e4m3fn"}

W = fp8 * scale with scale = max |W| / 448 (57344 in e5m2), one per tensor. Two elements instead of none in `scaled_fp8`
tell ComfyUI to multiply matrices in full precision, since no scales of the inputs are known.
"""

from __future__ import annotations

import json
import mmap
from collections.abc import Iterable, Mapping
from typing import Literal

import numpy as np

from sdops.core.cast_view import Computing
from sdops.core.casting import cast, raw_dtype
from sdops.core.fp8 import WRITABLE
from sdops.core.noise import Noise
from sdops.core.run import piece_bytes
from sdops.core.source import Source, aligned
from sdops.core.spec import Spec
from sdops.errors import FormatError

_NAMES = {"F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2"}
_UNKNOWN = -1.0


class Quantised(Computing):
    """A Source with some weights as scaled fp8, and their scales and markers beside them.

    A weight is read twice: for its largest magnitude when its scale or its values are first asked for, then for its
    values. Scales come before fp8 in a safetensors file, so that both happen once, also with several processes.

    Args:
        source: What is looked at.
        weights: Names `X.weight`, of any float dtype, to quantise -> F8_E4M3 or F8_E5M2.
        spelling: "old" or "new".
        prefixes: Of the models in the file, for the names of the old markers: `model.diffusion_model.`, "".
        seed: Round at random instead of to nearest.

    Raises:
        FormatError: while reading, a weight holds NaN or infinity.
    """

    def __init__(
        self,
        source: Source,
        weights: Mapping[str, str],
        *,
        spelling: Literal["old", "new"] = "new",
        prefixes: Iterable[str] = ("",),
        seed: int | None = None,
    ) -> None:
        self.weights = {key: number for number, key in enumerate(weights)}
        scale = "scale_weight" if spelling == "old" else "weight_scale"
        specs = dict(source.specs)
        self.scales: dict[str, str] = {}
        self.values: dict[str, bytes] = {}
        for key in self.weights:
            specs[key] = Spec(weights[key], specs[key].shape)
            stem = key.removesuffix("weight")
            self.scales[stem + scale] = key
            if spelling == "new":
                self.values[f"{stem}comfy_quant"] = json.dumps({"format": _NAMES[weights[key]]}).encode()
        specs |= dict.fromkeys(self.scales, Spec("F32", ()))
        specs |= {name: Spec("U8", (len(value),)) for name, value in self.values.items()}
        for prefix in prefixes if spelling == "old" else ():
            if first := next((key for key in weights if key.startswith(prefix)), None):
                self.values[f"{prefix}scaled_fp8"] = bytes(2)
                specs[f"{prefix}scaled_fp8"] = Spec(weights[first], (2,))
        super().__init__(source, specs)
        self._seed = seed
        # shared with forked processes; all of them would write the same number
        shared = mmap.mmap(-1, max(4 * len(self.weights), 1))
        self._found = np.frombuffer(shared, np.float32, len(self.weights))
        self._found[:] = _UNKNOWN

    def splits(self, key: str) -> bool:
        """As the source's; what is computed here may be shared."""
        return super().splits(key) if key in self.source.specs else True

    def piece_bytes(self, key: str) -> int:
        """Portions in which the tensor is quantised or read."""
        if key in self.weights:
            itemsize = raw_dtype(self.source.specs[key].dtype).itemsize
            return self.reads_pieces(key, itemsize) // itemsize
        return piece_bytes(self.source, key) if key in self.source.specs else 1 << 20

    def read_into(self, key: str, start: int, buffer: memoryview) -> None:
        """As the source's, quantised; or a scale or marker."""
        if key in self.weights:
            self._quantise(key, start, np.frombuffer(buffer, np.uint8))
        elif key in self.scales:
            raw = self.scale(self.scales[key]).astype("<f4").tobytes()
            buffer[:] = raw[start : start + len(buffer)]
        elif key in self.values:
            buffer[:] = self.values[key][start : start + len(buffer)]
        else:
            self.source.read_into(key, start, buffer)

    def scale(self, key: str) -> np.float32:
        """max |W| / largest fp8 value, rounded to float32; 1 for a weight of zeros.

        Raises:
            FormatError: the weight holds NaN or infinity.
        """
        number = self.weights[key]
        if self._found[number] == _UNKNOWN:
            self._found[number] = self._largest(key)
        if not np.isfinite(self._found[number]):
            raise FormatError(
                f"`{key}` of `{self.name}` holds NaN or infinity and has no fp8 scale",
                hint="`sdops verify` lists such tensors; `--exclude` leaves them as they are",
                key=key,
            )
        scale = np.float32(self._found[number] / np.float32(WRITABLE[self.specs[key].dtype][2]))
        return scale if scale > 0 else np.float32(1)

    def _singles(self, key: str, first: int, count: int) -> np.ndarray:
        """Values `[first, first + count)` as float32."""
        dtype = self.source.specs[key].dtype
        raw = raw_dtype(dtype)
        view = aligned(count * raw.itemsize)
        self.source.read_into(key, first * raw.itemsize, view)
        singles = np.empty(count, np.uint32)
        cast(np.frombuffer(view, raw), dtype, singles, "F32")
        return singles.view(np.float32)

    def _largest(self, key: str) -> np.float32:
        """max |W|; NaN if there is one."""
        numel, step = self.source.specs[key].numel, self.piece_bytes(key)
        largest = np.float32(0)
        for first in range(0, numel, step):
            values = self._singles(key, first, min(step, numel - first))
            largest = np.maximum(largest, np.maximum(values.max(), -values.min()))
        return largest

    def _quantise(self, key: str, first: int, out: np.ndarray) -> None:
        scale, step = self.scale(key), self.piece_bytes(key)
        for begin in range(0, len(out), step):
            part = out[begin : begin + step]
            values = self._singles(key, first + begin, len(part))
            np.divide(values, scale, out=values)
            noise = None if self._seed is None else Noise(self._seed, key, first + begin).words(0, len(part))
            cast(values.view(np.uint32), "F32", part, self.specs[key].dtype, noise)
