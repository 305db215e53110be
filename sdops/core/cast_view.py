"""A Source whose float tensors have other dtypes: values are rounded while they are read."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sdops.core.casting import CASTABLE, READABLE, Counts, cast, raw_dtype
from sdops.core.noise import Noise
from sdops.core.run import Forkable, piece_bytes
from sdops.core.source import Source, aligned
from sdops.core.spec import FP8, Spec
from sdops.core.view import View
from sdops.errors import UsageError

PIECE = 1 << 18  # elements read at once

# Last part of a name -> a tensor that says how others are to be read, or holds their scales: not a weight.
MARKERS = frozenset({"scaled_fp8", "comfy_quant", "scale_weight", "weight_scale", "scale_input", "input_scale"})


def castable(key: str, spec: Spec) -> bool:
    """Whether a tensor's dtype is a matter of taste: floats, but neither markers, nor scales, nor empty tensors."""
    return (spec.is_float or spec.dtype in FP8) and spec.numel > 0 and key.rpartition(".")[2] not in MARKERS


class Computing(View):
    """A view that computes with numpy: what core.run wants to know of it, also where it looks at another such."""

    def reads_pieces(self, key: str, itemsize: int) -> int:
        """Bytes of the source's tensor to read at once: as the source wants, or PIECE elements."""
        asks = getattr(self.source, "piece_bytes", None)
        return PIECE * itemsize if asks is None else int(asks(key))

    @property
    def forks(self) -> bool:
        """Whether forked processes may do the work."""
        return not hasattr(self.source, "piece_bytes") or bool(getattr(self.source, "forks", False))

    def tally(self) -> Any:
        """What was counted in this process, here and in the source."""
        inner = self.source.tally() if isinstance(self.source, Forkable) else None
        return self.counted(), inner

    def add(self, tally: Any) -> None:
        """Add what another process counted."""
        own, inner = tally
        self.count_more(own)
        if isinstance(self.source, Forkable):
            self.source.add(inner)

    def counted(self) -> Mapping[str, Counts]:
        """Tensor -> what was counted."""
        return {}

    def count_more(self, counts: Mapping[str, Counts]) -> None:
        """Add to what was counted."""


class Cast(Computing):
    """Tensors in other float dtypes, rounded as core.casting says; those that `dtypes` leaves out are as they were.

    Args:
        source: What is looked at.
        dtypes: Tensor -> its new dtype: F64, F32, F16, BF16, F8_E4M3 or F8_E5M2.
        seed: Round at random, keyed by seed, tensor and element, instead of to nearest.

    Attributes:
        counts: Tensor -> numbers of values that were clamped, of NaN and of infinities; only tensors that have some.

    Raises:
        UsageError: a tensor or the new dtype is none that can be cast.
    """

    def __init__(self, source: Source, dtypes: Mapping[str, str], *, seed: int | None = None) -> None:
        for key, dtype in dtypes.items():
            if source.specs[key].dtype not in READABLE or dtype not in CASTABLE:
                raise UsageError(
                    f"`{key}` of `{source.name}` is {source.specs[key].dtype} and cannot become {dtype}",
                    hint="`sdops inspect` shows the dtypes of a file",
                )
        self.dtypes = {key: dtype for key, dtype in dtypes.items() if dtype != source.specs[key].dtype}
        casted = {key: Spec(dtype, source.specs[key].shape) for key, dtype in self.dtypes.items()}
        super().__init__(source, {key: casted.get(key, spec) for key, spec in source.specs.items()})
        self.counts: dict[str, Counts] = {}
        self._seed = seed
        self._lock = threading.Lock()
        self._local = threading.local()

    def piece_bytes(self, key: str) -> int:
        """Portions in which the tensor is cast, or read if it is not."""
        if key not in self.dtypes:
            return piece_bytes(self.source, key)
        itemsize = raw_dtype(self.source.specs[key].dtype).itemsize
        return self.reads_pieces(key, itemsize) // itemsize * raw_dtype(self.dtypes[key]).itemsize

    def read_into(self, key: str, start: int, buffer: memoryview) -> None:
        """As the source's, cast."""
        if key not in self.dtypes:
            self.source.read_into(key, start, buffer)
            return
        dtype = self.source.specs[key].dtype
        out = np.frombuffer(buffer, raw_dtype(self.dtypes[key]))
        itemsize, first = raw_dtype(dtype).itemsize, start // out.itemsize
        step = self.reads_pieces(key, itemsize) // itemsize
        counts = Counts()
        for begin in range(0, len(out), step):
            part = out[begin : begin + step]
            view = self._buffer(len(part) * itemsize)
            self.source.read_into(key, (first + begin) * itemsize, view)
            noise = self._noise(key, first + begin, len(part))
            counts = counts.plus(cast(np.frombuffer(view, raw_dtype(dtype)), dtype, part, self.dtypes[key], noise))
        if any(counts):
            self.count_more({key: counts})

    def counted(self) -> Mapping[str, Counts]:
        """As `counts`."""
        return self.counts

    def count_more(self, counts: Mapping[str, Counts]) -> None:
        """Add to `counts`."""
        with self._lock:
            for key, more in counts.items():
                self.counts[key] = self.counts.get(key, Counts()).plus(more)

    def _noise(self, key: str, first: int, count: int) -> NDArray[np.uint32] | None:
        return None if self._seed is None else Noise(self._seed, key, first).words(0, count)

    def _buffer(self, nbytes: int) -> memoryview:
        """This thread's buffer, grown as needed."""
        if len(getattr(self._local, "buffer", b"")) < nbytes:
            self._local.buffer = aligned(nbytes)
        view: memoryview = self._local.buffer
        return view[:nbytes]
