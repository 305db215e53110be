"""Sources made of other Sources: renamed, with other channels, dequantised. Nothing is read until it is asked for."""

from __future__ import annotations

import threading
from collections.abc import Mapping

import numpy as np

from sdops.core.casting import cast
from sdops.core.precision import FORMATS, Doubles, decode, encode
from sdops.core.source import Source, read, splits
from sdops.core.spec import FP8, Spec
from sdops.core.view import View
from sdops.errors import FormatError


class Renamed(View):
    """Tensors under other names; those that `names` leaves out are hidden.

    Args:
        source: What is looked at.
        names: New name -> name in the source.
    """

    def __init__(self, source: Source, names: Mapping[str, str]) -> None:
        super().__init__(source, {new: source.specs[old] for new, old in names.items()})
        self.names = names

    def read_into(self, key: str, start: int, buffer: memoryview) -> None:
        """Read the tensor under its name in the source."""
        self.source.read_into(self.names[key], start, buffer)

    def splits(self, key: str) -> bool:
        """As the source's."""
        return splits(self.source, self.names[key])


class WithChannels(View):
    """A first convolution [out, in, ...] with the number of input channels that another model's has.

    Channels too many are cut off; missing ones are taken from the other model, so that a difference of two models
    that both lack them is zero there and an average leaves them as they are.

    Args:
        source: What is looked at.
        key: The convolution's weight.
        donor: The other model, whose tensor of that name has the wanted shape.
    """

    def __init__(self, source: Source, key: str, donor: Source) -> None:
        own, other = source.specs[key], donor.specs[key]
        dtype = own.dtype
        if own.dtype != other.dtype and own.shape[1] < other.shape[1]:  # one that holds the values of both
            dtype = "F64" if "F64" in (own.dtype, other.dtype) else "F32"
        wanted = Spec(dtype, other.shape)
        super().__init__(source, {**source.specs, key: wanted})
        self.key = key
        self.donor = donor
        self._bytes: bytes | None = None
        self._lock = threading.Lock()

    def read_into(self, key: str, start: int, buffer: memoryview) -> None:
        """As the source's, but for the one tensor, which is small and made at once."""
        if key != self.key:
            self.source.read_into(key, start, buffer)
            return
        with self._lock:
            if self._bytes is None:
                self._bytes = self._make()
        buffer[:] = self._bytes[start : start + len(buffer)]

    def _make(self) -> bytes:
        own, other = _values(self.source, self.key), _values(self.donor, self.key)
        channels = own.shape[1]
        widened = np.concatenate([own[:, : other.shape[1]], other[:, channels:]], axis=1)
        bits, _ = encode(np.ascontiguousarray(widened).reshape(-1), self.specs[self.key].dtype)
        return bits.tobytes()


class Dequantised(View):
    """fp8 weights as float32, multiplied by the scale stored beside them; scales and markers are hidden.

    ComfyUI writes `X.scale_weight` (old) or `X.weight_scale` (new) beside `X.weight`, one number per tensor or per
    output row; a weight without one is plain fp8.

    Raises:
        FormatError: a scale has a shape that is neither.
    """

    def __init__(self, source: Source) -> None:
        self.scales = {key: scale for key in source.specs if (scale := _scale_of(key, source)) is not None}
        hidden = {*self.scales.values(), *(key for key in source.specs if _is_quantisation_marker(key))}
        specs = {
            key: Spec("F32", spec.shape) if spec.dtype in FP8 else spec
            for key, spec in source.specs.items()
            if key not in hidden
        }
        super().__init__(source, specs)

        for key, scale in self.scales.items():
            self._check(key, scale)

    def read_into(self, key: str, start: int, buffer: memoryview) -> None:
        """As the source's, dequantised."""
        spec = self.source.specs[key]
        if spec.dtype not in FP8:
            self.source.read_into(key, start, buffer)
            return
        count, first = len(buffer) // 4, start // 4
        codes = bytearray(count)
        self.source.read_into(key, first, memoryview(codes))
        values = np.empty(count, np.float32)
        cast(np.frombuffer(codes, np.uint8), spec.dtype, values.view(np.uint32), "F32")
        if key in self.scales:
            scale = _values(self.source, self.scales[key]).astype(np.float32).reshape(-1)
            rows = np.arange(first, first + count) // (spec.numel // spec.shape[0]) if scale.size > 1 else 0
            values = values * scale[rows]
        buffer[:] = values.astype("<f4").tobytes()

    def _check(self, key: str, scale: str) -> None:
        shape, rows = self.source.specs[scale].shape, self.source.specs[key].shape[0]
        if self.source.specs[scale].numel not in (1, rows) or not self.source.specs[scale].is_float:
            raise FormatError(
                f"`{scale}` of `{self.source.name}` has shape {list(shape)}: not a scale for the tensor or its rows",
                hint="convert the file to fp16 with the program that made it",
                key=scale,
            )


def _scale_of(key: str, source: Source) -> str | None:
    if source.specs[key].dtype not in FP8 or not key.endswith(".weight"):
        return None
    stem = key.removesuffix("weight")
    return next((name for name in (f"{stem}scale_weight", f"{stem}weight_scale") if name in source.specs), None)


def _is_quantisation_marker(key: str) -> bool:
    name = key.rpartition(".")[2]
    return name in ("scaled_fp8", "comfy_quant", "scale_input", "input_scale")


def _values(source: Source, key: str) -> Doubles:
    """A small tensor's values as float64 in its shape."""
    spec = source.specs[key]
    raw = np.frombuffer(read(source, key), FORMATS[spec.dtype].raw)
    values: Doubles = decode(raw, spec.dtype).reshape(spec.shape)
    return values
