"""LoRAs added on a GPU: the weights of a portion are sent, changed by the kernel `bake`, and fetched.

Only tensors that are changed by low-rank terms alone go there; the CPU does all others.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from math import prod
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sdops.core.adding import SAMPLE, refused
from sdops.core.applied import Applied, Change, LowRank
from sdops.core.casting import raw_dtype
from sdops.core.noise import key_words
from sdops.core.plan import Input
from sdops.core.precision import Singles
from sdops.core.run import piece_bytes
from sdops.core.source import Source, splits
from sdops.core.stream import TORCH_DTYPES
from sdops.core.transfer import Transfer


class AppliedOnDevice(Applied):
    """As Applied, with large tensors changed on a device.

    Args:
        source, changes, weights, sequential, seed: As for Applied.
        device: `cuda`, or `cpu` to test the way through it.

    Attributes:
        transfer: The way there and back.
    """

    def __init__(
        self,
        source: Source,
        changes: Mapping[str, Change],
        *,
        device: str,
        weights: Source | None = None,
        sequential: bool = False,
        seed: int | None = None,
    ) -> None:
        super().__init__(source, changes, weights=weights, sequential=sequential, seed=seed)
        self.transfer = Transfer(device)
        self._seed = seed

    @property
    def forks(self) -> bool:
        """A device belongs to one process."""
        return False

    def piece_bytes(self, key: str) -> int:
        """Portions that are sent: whole rows, or the tensor if numbers are drawn for it or it is made at once."""
        if key not in self.changes or not self._is_sent(key):
            return super().piece_bytes(key)
        spec = self.specs[key]
        columns = prod(spec.shape[1:])
        whole = self._seed is not None or not splits(self.weights, key)
        rows = spec.shape[0] if whole else max(self.transfer.portion // columns, 1)
        return min(rows * columns * raw_dtype(spec.dtype).itemsize, spec.nbytes)

    def splits(self, key: str) -> bool:
        """Whether threads may share the tensor."""
        drawn = key in self.changes and self._is_sent(key) and self._seed is not None
        return super().splits(key) and not drawn

    def read_into(self, key: str, start: int, buffer: memoryview) -> None:
        """As the model's, with the changes.

        Raises:
            FormatError: a weight is NaN or infinite.
        """
        if key not in self.changes or not self._is_sent(key):
            super().read_into(key, start, buffer)
            return
        size, columns = raw_dtype(self.specs[key].dtype).itemsize, prod(self.specs[key].shape[1:])
        drawn_in_part = self._seed is not None and len(buffer) < self.specs[key].nbytes
        if start // size % columns or len(buffer) // size % columns or drawn_in_part:
            super().read_into(key, start, buffer)
            return
        with self.transfer.stream():
            read = partial(self._read_weight, key, start // size)
            sent = self.transfer.send("in", TORCH_DTYPES[self.weights.specs[key].dtype], len(buffer) // size, read)
            weight = sent.reshape(-1, columns)
            out = torch.empty_like(weight, dtype=TORCH_DTYPES[self.specs[key].dtype])
            changes = self._low_rank_of(key, start // size // columns, len(weight))
            keys = None if self._seed is None else [key_words(self._seed, key, 0, 0)]
            self.transfer.kernels.Bake([weight], [out], [changes], keys=keys).run()
            self._tell(key, weight, changes, out)
            self.transfer.fetch(out, buffer)

    def _is_sent(self, key: str) -> bool:
        change, own = self.changes[key], self.weights.specs[key]
        plain = all(isinstance(term, LowRank) for term in change.terms) and not change.scale
        dtypes = {own.dtype, change.spec.dtype}
        return (
            plain
            and dtypes <= TORCH_DTYPES.keys() - {"F64"}
            and change.spec.shape == own.shape
            and own.numel >= self.transfer.small
            and len(own.shape) > 1
        )

    def _read_weight(self, key: str, first: int, view: memoryview) -> None:
        """The model's elements from `first` on, in the portions in which it gives them."""
        begin = first * raw_dtype(self.weights.specs[key].dtype).itemsize
        step = piece_bytes(self.weights, key)
        for place in range(0, len(view), step):
            self.weights.read_into(key, begin + place, view[place : place + step])

    def _low_rank_of(self, key: str, top: int, rows: int) -> list[Any]:
        """What is added to some rows; several changes of the same rows side by side: one product for all."""
        parts: dict[tuple[int, int], list[tuple[Singles, Singles]]] = {}
        for start, count, up, down in self.loaded(key):
            begin, end = max(top, start), min(top + rows, start + count)
            if begin < end:
                parts.setdefault((begin, end), []).append((up(begin - start, end - start), down))
        changes = []
        for (begin, _), found in parts.items():
            ups, downs = zip(*found, strict=True)
            sent = [torch.from_numpy(part) for part in (np.concatenate(ups, axis=1), np.concatenate(downs))]
            factors = [part.to(self.transfer.device) for part in sent]
            changes.append(self.transfer.kernels.LoRA(*factors, first=begin - top))
        return changes

    def _tell(self, key: str, weight: Tensor, changes: list[Any], out: Tensor) -> None:
        """Count clamped weights, and how much of the change survives, from as many elements as the CPU looks at.

        Raises:
            FormatError: a weight is NaN or infinite, or the change is too large for float32.
        """
        if not bool(torch.isfinite(weight).all()):
            spec = self.weights.specs[key]
            raw = weight.cpu().view(-1).view(torch.uint8).numpy().view(raw_dtype(spec.dtype))
            raise refused(Input(self.weights, key, 0), raw)
        step = out.numel() // SAMPLE | 1
        places = torch.arange(0, out.numel(), step, device=weight.device)
        rows, columns = places // weight.shape[1], places % weight.shape[1]
        wanted = torch.zeros(len(places), device=weight.device)
        for change in changes:
            inside = (rows >= change.first) & (rows < change.first + change.shape[0])
            own = (rows - change.first).clamp(0, change.shape[0] - 1)
            wanted += torch.where(inside, (change.up[own] * change.down[:, columns].T).sum(1) * change.scale, 0)
        moved = out.view(-1)[places].double() - weight.view(-1)[places].double()
        largest = torch.finfo(out.dtype).max
        clamped = int(((out.abs() == largest) & (weight.float().abs() < largest)).sum())
        got, most = float(moved @ wanted.double()), float(wanted.double() @ wanted.double())
        self.adder.add(({key: clamped} if clamped else {}, {key: (got, most)}))
