"""Run merge methods that need torch on portions as small as their execution class allows.

    elementwise   flat portions; only where core.taped cannot take them
    ranked        two passes for the order statistics, then portions with masks
    rows          blocks of whole rows
    tensor, model the whole tensor, under a common memory budget

A tensor whose pieces depend on a pass over all of it (ranked, inner products) is read by one thread from start to end;
what the pass found is kept until the last piece is read.
"""

from __future__ import annotations

import ctypes
import sys
import threading
from collections.abc import Iterator
from math import prod
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sdops.core.budget import Budget
from sdops.core.gram import inner_products
from sdops.core.inputs import largest_magnitude
from sdops.core.method import Method
from sdops.core.noise import Noise
from sdops.core.plan import Plan, Step
from sdops.core.portions import Passes, Room, not_finite, read_raws
from sdops.core.precision import FORMATS
from sdops.core.ranking import Ranking
from sdops.core.retained import SAMPLE, Retained
from sdops.core.select import RadixSelect

PORTION = 1 << 17  # elements: smaller ones cost more in calls than they gain in the cache
HELD_SCORES = 1 << 23  # scores of a ranked method that are kept in memory instead of being made again

TORCH_DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64}


class Stream:
    """Evaluates steps of one plan with one method. Safe to use from several threads.

    Args:
        plan: The steps; "model" methods prepare on all of its merged tensors.
        method: Anything but a linear one or one of class "gram".
        retained: Receives samples.
        seed: For methods that take noise.
        memory: Bytes that whole tensors may take at the same time.
    """

    def __init__(self, plan: Plan, method: Method, retained: Retained, *, seed: int, memory: int) -> None:
        torch.set_num_threads(1)  # our own threads share the cores
        _keep_freed_memory()
        self.plan = plan
        self.method = method
        self.retained = retained
        self.seed = seed
        self.budget = Budget(memory)
        self._lock = threading.Lock()
        self._state: Any = None
        self._prepared = method.prepare is None
        self.passes = Passes()
        self._portion: dict[str, tuple[int, bytearray]] = {}  # first byte and content of the portion at hand
        # two sets of buffers: a pass over a tensor may begin while a portion of it is at hand
        self._room, self._pass_room = Room(), Room()

    @property
    def remark(self) -> str:
        """What the pass over the whole model found, in one sentence, if its state can say so."""
        return str(self._state) if "__str__" in vars(type(self._state)) else ""

    def splits(self) -> bool:
        """Whether threads may share a tensor."""
        return self.method.execution == "elementwise" and not self.method.needs_gram

    def piece_bytes(self, step: Step) -> int:
        """Portions in which a step is computed."""
        size = max(step.spec.nbytes // max(step.spec.numel, 1), 1)
        if self.method.execution in ("tensor", "model"):
            return max(step.spec.nbytes, 1)
        if self.method.execution == "rows":
            row = _row_size(step.spec.shape)
            return max(PORTION // row, 1) * row * size
        return PORTION * size

    def try_knobs(self, step: Step) -> None:
        """Call the method's functions on tensors without elements, so that they refuse bad knobs."""
        call, method, knobs = self.method.call, self.method, step.knobs
        if method.prepare is not None:
            return  # it would need the state that the pass over the whole model makes
        empty = torch.zeros(0) if method.execution in ("elementwise", "ranked") else torch.zeros(0, 3)
        inputs = [empty] * len(step.inputs)
        gram = np.zeros([len(inputs)] * 2)
        supplied: dict[str, Any] = {"key": "", "gram": gram, "noise": Noise(self.seed, "")}
        if method.execution == "ranked":
            call(method.window, 1, knobs=knobs)
            supplied["kept"] = call(method.scores, *inputs, knobs=knobs).bool()
        call(method.function, *inputs, knobs=knobs, **supplied)

    def read_into(self, key: str, step: Step, start: int, buffer: memoryview) -> int:
        """Compute bytes of a merged tensor; return how many elements overflowed and were clamped.

        Reads that begin and end where portions do are computed in place; whoever reads otherwise (a merge of this
        merge) is served from the portion at hand.

        Raises:
            FormatError: an input holds NaN or infinity, or the method made one.
        """
        size = FORMATS[step.spec.dtype].raw(0).itemsize
        portion, end = self.piece_bytes(step), start + len(buffer)
        whole = self.method.execution in ("rows", "tensor", "model")
        if whole and (start % portion or (end % portion and end < step.spec.nbytes)):
            overflow = self._patchwork(key, step, start, buffer)
        else:
            overflow = 0
            for begin in range(0, len(buffer), portion):
                view = buffer[begin : begin + portion]
                overflow += self._piece(key, step, (start + begin) // size, len(view) // size, view)
        if end >= step.spec.nbytes:
            self.passes.forget(key)
            with self._lock:
                self._portion.pop(key, None)
        return overflow

    def _patchwork(self, key: str, step: Step, start: int, buffer: memoryview) -> int:
        """Fill `buffer` from whole portions; the last one is kept for the read that follows."""
        size, portion = FORMATS[step.spec.dtype].raw(0).itemsize, self.piece_bytes(step)
        overflow, position, end = 0, start, start + len(buffer)
        while position < end:
            begin = position // portion * portion
            with self._lock:
                kept, data = self._portion.get(key, (-1, bytearray()))
            if kept != begin:
                data = bytearray(min(portion, step.spec.nbytes - begin))
                overflow += self._piece(key, step, begin // size, len(data) // size, memoryview(data))
                with self._lock:
                    self._portion[key] = begin, data
            stop = min(begin + len(data), end)
            buffer[position - start : stop - start] = data[position - begin : stop - begin]
            position = stop
        return overflow

    def _piece(self, key: str, step: Step, first: int, count: int, view: memoryview) -> int:
        whole = self.method.execution in ("tensor", "model")
        with self.budget.hold(_held_bytes(step) if whole else 0):
            inputs = _read_all(step, first, count, None if whole else self._room)
            result = self._call(key, step, first, inputs)
            return self._write(key, step, first, inputs[0], result, view)

    def _call(self, key: str, step: Step, first: int, inputs: list[Tensor]) -> Tensor:
        """The method on one portion: elements [first, first + n) of each input, flat; the result likewise."""
        supplied: dict[str, Any] = {"key": key}
        if "noise" in self.method.needs:
            supplied["noise"] = Noise(self.seed, key, first)
        if self.method.needs_gram:
            supplied["gram"] = self.passes.once(key, lambda: inner_products(step, self._pass_room))
        if self.method.execution == "ranked":
            supplied["kept"] = self._kept(key, step, first, inputs)
        if self.method.prepare is not None:
            supplied["state"] = self._prepare()
        shaped = [
            _shape(x, item.spec.shape, self.method.execution) for x, item in zip(inputs, step.inputs, strict=True)
        ]
        result: Tensor = self.method.call(self.method.function, *shaped, knobs=step.knobs, **supplied)
        return result.reshape(-1)

    def _kept(self, key: str, step: Step, first: int, inputs: list[Tensor]) -> Tensor:
        """Ranked class: which of the portion's elements fall into the window of the order statistics."""
        ranking: Ranking = self.passes.once(key, lambda: self._rank(step))
        if ranking.keeps_all:
            return torch.ones(ranking.rows, len(inputs[0]), dtype=torch.bool)
        if first != ranking.position:  # only when a tensor is not read from its start to its end
            ranking.rewind()
            for portion in _portions(step, self._pass_room, first):
                ranking.advance(self._scores(step, portion))
        return ranking.advance(self._scores(step, inputs))

    def _rank(self, step: Step) -> Ranking:
        """A tensor's order statistics, from all scores at once if they are few, else in two passes."""
        numel = step.spec.numel
        first, last = self.method.call(self.method.window, numel, knobs=step.knobs)
        rows = len(self._scores(step, [torch.zeros(1)] * len(step.inputs)))
        if first <= 0 and last >= numel:
            return Ranking(RadixSelect.keeping_all(rows))
        scores = (self._scores(step, portion) for portion in _portions(step, self._pass_room))
        if numel * rows <= HELD_SCORES:
            return Ranking(RadixSelect.of(torch.cat(list(scores), dim=1), first, last))
        select = RadixSelect(rows, first, last)
        for portion_scores in scores:
            select.count_high(portion_scores)
        for portion in _portions(step, self._pass_room):
            select.count_low(self._scores(step, portion))
        return Ranking(select)

    def _scores(self, step: Step, inputs: list[Tensor]) -> Tensor:
        scores: Tensor = self.method.call(self.method.scores, *inputs, knobs=step.knobs)
        return scores

    def _prepare(self) -> Any:
        """The pass over the whole model, made once."""
        with self._lock:
            if not self._prepared and self.method.prepare is not None:
                steps = {k: s for k, s in self.plan.steps.items() if s.action == "merge"}

                def read(key: str) -> list[Tensor]:
                    step = steps[key]
                    inputs = _read_all(step, 0, step.spec.numel, None)
                    return [x.reshape(item.spec.shape) for x, item in zip(inputs, step.inputs, strict=True)]

                knobs = next(iter(steps.values())).knobs if steps else {}
                self._state = self.method.call(self.method.prepare, list(steps), read, knobs=knobs)
                self._prepared = True
            return self._state

    def _write(self, key: str, step: Step, first: int, before: Tensor, result: Tensor, view: memoryview) -> int:
        """Round the result into the output dtype; clamp and count what does not fit."""
        if not len(view):
            return 0
        target = FORMATS[step.spec.dtype]
        raw = np.frombuffer(view, target.raw)
        out = torch.frombuffer(view, dtype=TORCH_DTYPES[step.spec.dtype])
        out.copy_(result)
        overflow = 0
        if largest_magnitude(raw, step.spec.dtype) >= target.infinity:
            if not bool(torch.isfinite(result).all()):
                raise not_finite(self.method.name, key)
            overflow = int(torch.isinf(out).sum())
            out.clamp_(-target.largest, target.largest)
        if first == 0 and self.retained.wants(key):
            start, wanted, written = (x[:SAMPLE].double().numpy() for x in (before, result, out))
            self.retained.sample(start, wanted, written)
        return overflow


def _keep_freed_memory() -> None:
    """Let the C library keep what temporaries leave: given back, the system would have to clear and map it again."""
    trim_threshold, mmap_threshold = -1, -3  # M_... of malloc.h in the GNU C library
    if sys.platform == "linux" and hasattr(library := ctypes.CDLL(None), "mallopt"):
        library.mallopt(trim_threshold, 256 << 20)
        library.mallopt(mmap_threshold, 32 << 20)


def _held_bytes(step: Step) -> int:
    """What a whole-tensor step holds: inputs as float32, the result, and about as much again in between."""
    return step.spec.numel * 4 * (2 * len(step.inputs) + 3)


def _row_size(shape: tuple[int, ...]) -> int:
    """Elements of one row; 0-d and 1-d tensors are one row."""
    return max(prod(shape[1:]) if len(shape) > 1 else prod(shape), 1)


def _shape(flat: Tensor, shape: tuple[int, ...], execution: str) -> Tensor:
    if execution in ("tensor", "model"):
        return flat.reshape(shape)
    if execution == "rows":
        return flat.reshape(-1, *shape[1:]) if len(shape) > 1 else flat.reshape(1, -1)
    return flat


def _read_all(step: Step, first: int, count: int, room: Room | None) -> list[Tensor]:
    """Elements [first, first + count) of all inputs: float64 if one of them is, else float32.

    What this thread read into `room` before is overwritten; without one they get fresh memory.
    """
    if not count:
        return [torch.zeros(0) for _ in step.inputs]
    inputs = [
        torch.from_numpy(raw).view(TORCH_DTYPES[item.spec.dtype])
        for raw, item in zip(read_raws(step, first, count, room), step.inputs, strict=True)
    ]
    wide = torch.float64 if any(x.dtype == torch.float64 for x in inputs) else torch.float32
    return [x.to(wide) for x in inputs]


def _portions(step: Step, room: Room, stop: int | None = None) -> Iterator[list[Tensor]]:
    """The inputs of a step in flat portions, up to element `stop`."""
    stop = step.spec.numel if stop is None else stop
    for first in range(0, stop, PORTION):
        count = min(PORTION, stop - first)
        yield _read_all(step, first, count, room)
