"""Which GGML type each tensor of a model gets, and a Source that gives their bytes."""

from __future__ import annotations

import threading
from collections.abc import Container, Mapping
from math import prod

import numpy as np

from sdops.core.cast_view import Computing
from sdops.core.casting import Counts, cast, raw_dtype
from sdops.core.ggml import PLAIN, TYPES, packed_bytes
from sdops.core.ggml_blocks import quantise
from sdops.core.source import Source, aligned
from sdops.core.spec import FP8, Spec
from sdops.errors import UsageError

_SMALL = 1024  # numbers; tensors of no more stay in F32, as ComfyUI-GGUF has it


def choose_types(
    specs: Mapping[str, Spec], wanted: Mapping[str, str], delicate: Container[str] = ()
) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Name -> (GGML type, shape) for `GgufSink`: what is wanted where it fits, F16 or F32 elsewhere.

    Vectors and small tensors become F32; delicate tensors, and matrices whose rows are no whole number of blocks, F16
    (BF16 if they are bf16, whose range F16 lacks). Integers stay as they are where GGUF has their type. With "" others
    stay as they are, too, and fp8 becomes F16, which holds all its values.

    Args:
        specs: The tensors.
        wanted: Name -> F32, F16, BF16, Q8_0, Q5_1, Q5_0, Q4_1, Q4_0 or "".
        delicate: Tensors to keep out of blocks.

    Raises:
        UsageError: a dtype has no type in GGUF.
    """
    return {key: (_type(key, spec, wanted[key], key in delicate), spec.shape) for key, spec in specs.items()}


def _type(key: str, spec: Spec, wanted: str, delicate: bool) -> str:
    if spec.dtype in PLAIN and not spec.is_float:
        return spec.dtype
    if not spec.is_float and spec.dtype not in FP8:
        raise UsageError(f"GGUF has no type for `{key}` of dtype {spec.dtype}", hint="leave this tensor out")
    if len(spec.shape) <= 1 or spec.numel <= _SMALL:
        return "F32"
    if not wanted:
        return spec.dtype if spec.dtype in PLAIN else "F16"
    if wanted in PLAIN:
        return wanted
    if delicate or spec.shape[-1] % TYPES[wanted].block:
        return "BF16" if spec.dtype == "BF16" else "F16"
    return wanted


class Packed(Computing):
    """The bytes that a GGUF file holds for each tensor, as U8 tensors of one dimension.

    Values go to F32 first, exactly (doubles are rounded), then to the blocks of their type (core.ggml_blocks).

    Args:
        source: Float tensors of any dtype, and integers that stay as they are.
        tensors: Name -> (GGML type, shape), as `choose_types` makes it; only these are offered.

    Attributes:
        types: Name -> GGML type.
        counts: Tensor -> numbers of values that were clamped, of NaN and of infinities; only tensors that have some.
    """

    def __init__(self, source: Source, tensors: Mapping[str, tuple[str, tuple[int, ...]]]) -> None:
        for key, (kind, shape) in tensors.items():
            if prod(shape) != source.specs[key].numel:
                raise ValueError(f"{key}: {shape} is not {source.specs[key]}")
            if (
                not source.specs[key].is_float
                and source.specs[key].dtype not in FP8
                and source.specs[key].dtype != kind
            ):
                raise ValueError(f"{key}: {source.specs[key].dtype} cannot become {kind}")
        super().__init__(source, {key: Spec("U8", (packed_bytes(*tensors[key]),)) for key in tensors})
        self.tensors = tensors
        self.types = {key: kind for key, (kind, _) in tensors.items()}
        self.counts: dict[str, Counts] = {}
        self._lock = threading.Lock()

    def piece_bytes(self, key: str) -> int:
        """Portions of whole blocks."""
        kind = TYPES[self.tensors[key][0]]
        return self._numbers(key) // kind.block * kind.nbytes

    def read_into(self, key: str, start: int, buffer: memoryview) -> None:
        """Bytes `[start, start + len(buffer))` of the packed tensor."""
        kind, dtype = TYPES[self.tensors[key][0]], self.source.specs[key].dtype
        if PLAIN.get(kind.name) == dtype:
            self.source.read_into(key, start, buffer)
            return
        first, last = start // kind.nbytes, -(-(start + len(buffer)) // kind.nbytes)
        step = self._numbers(key) // kind.block
        for begin in range(first, last, step):
            packed = self._pack(key, begin * kind.block, min(step, last - begin) * kind.block)
            here = begin * kind.nbytes  # position of `packed` in the tensor
            low, high = max(here, start), min(here + len(packed), start + len(buffer))
            buffer[low - start : high - start] = packed.data[low - here : high - here]

    def _pack(self, key: str, first: int, count: int) -> np.ndarray:
        """Numbers `[first, first + count)` in blocks, uint8."""
        kind, dtype = self.tensors[key][0], self.source.specs[key].dtype
        raw = raw_dtype(dtype)
        view = aligned(count * raw.itemsize)
        self.source.read_into(key, first * raw.itemsize, view)
        if kind in PLAIN:
            out = np.empty(count, raw_dtype(kind))
            self._count(key, cast(np.frombuffer(view, raw), dtype, out, kind))
            return out.view(np.uint8)
        singles = np.empty(count, np.uint32)
        self._count(key, cast(np.frombuffer(view, raw), dtype, singles, "F32"))
        return quantise(singles.view(np.float32), kind)

    def counted(self) -> Mapping[str, Counts]:
        """As `counts`."""
        return self.counts

    def count_more(self, counts: Mapping[str, Counts]) -> None:
        """Add to `counts`."""
        for key, more in counts.items():
            self._count(key, more)

    def _count(self, key: str, more: Counts) -> None:
        if any(more):
            with self._lock:
                self.counts[key] = self.counts.get(key, Counts()).plus(more)

    def _numbers(self, key: str) -> int:
        """How many to read at once: what the source wants, in whole blocks of 256."""
        itemsize = max(self.source.specs[key].nbytes // max(self.source.specs[key].numel, 1), 1)
        return max(self.reads_pieces(key, itemsize) // itemsize // 256 * 256, 256)
