"""Run merge methods that need torch on portions as small as their execution class allows.

    elementwise   flat portions
    gram          one pass for the inner products, then an exact linear combination with the resulting coefficients
    ranked        two passes for the order statistics, then portions with masks
    rows          blocks of whole rows
    tensor, model the whole tensor, under a common memory budget

A tensor whose pieces depend on a pass over all of it (gram, ranked) is read by one thread from start to end; what the
pass found is kept until the last piece is read.
"""

from __future__ import annotations

import ctypes
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from math import prod
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sdops.core import native
from sdops.core.budget import Budget
from sdops.core.exact import PIECE, ExactSum, Scratch
from sdops.core.inputs import largest_magnitude, nonfinite, read_raw
from sdops.core.linear import to_single
from sdops.core.method import Method
from sdops.core.noise import Noise
from sdops.core.plan import Plan, Step
from sdops.core.precision import FORMATS, Raw, count_nonfinite, decode
from sdops.core.ranking import Ranking
from sdops.core.retained import SAMPLE, Retained
from sdops.core.select import RadixSelect
from sdops.core.source import aligned
from sdops.errors import FormatError, UsageError

PORTION = 1 << 17  # elements: smaller ones cost more in calls than they gain in the cache
HELD_SCORES = 1 << 23  # scores of a ranked method that are kept in memory instead of being made again

TORCH_DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64}


class _Room(threading.local):
    """Buffers for the inputs of a portion, each thread's own, used again and again."""

    def __init__(self) -> None:
        self._kept: list[memoryview] = []

    def buffers(self, count: int) -> Sequence[memoryview]:
        """The first so many buffers, each for PIECE elements of any dtype."""
        self._kept += [aligned(PIECE * 8) for _ in range(count - len(self._kept))]
        return self._kept[:count]


class Stream:
    """Evaluates steps of one plan with one method. Safe to use from several threads.

    Args:
        plan: The steps; "model" methods prepare on all of its merged tensors.
        method: Anything but a linear one.
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
        self._passes: dict[str, Any] = {}  # what a first pass over a tensor found, until its last piece is read
        self._portion: dict[str, tuple[int, bytearray]] = {}  # first byte and content of the portion at hand
        # two sets of buffers: a pass over a tensor may begin while a portion of it is at hand
        self._room, self._pass_room = _Room(), _Room()

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
        return (PIECE if self.method.execution == "gram" else PORTION) * size

    def check_knobs(self) -> None:
        """Call the method on empty tensors with every combination of knobs, so that it refuses bad ones at once.

        Raises:
            UsageError: the method does not accept its knobs.
        """
        if self.method.prepare is not None:
            return  # it would need the state that the pass over the whole model makes
        empty = torch.zeros(0) if self.method.execution in ("elementwise", "ranked") else torch.zeros(0, 3)
        checked = set()
        for step in self.plan.steps.values():
            identity = tuple(sorted(step.knobs.items())), len(step.inputs)
            if step.action != "merge" or identity in checked:
                continue
            checked.add(identity)
            try:
                self._try(step, [empty] * len(step.inputs))
            except (ArithmeticError, ValueError, RuntimeError) as error:
                knobs = ", ".join(f"`{name}` {value}" for name, value in step.knobs.items())
                raise UsageError(
                    f"`{self.method.name}` cannot work with {knobs}: {error}",
                    hint=f"`sdops methods {self.method.name}` explains the knobs",
                ) from error

    def _try(self, step: Step, inputs: list[Tensor]) -> None:
        """Call the method's functions on inputs without elements."""
        call, method, knobs = self.method.call, self.method, step.knobs
        gram = torch.zeros(len(inputs), len(inputs), dtype=torch.float64)
        if method.execution == "gram":
            call(method.function, gram, knobs=knobs)
            return
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
            with self._lock:
                self._passes.pop(key, None)
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
        if self.method.execution == "gram":
            return self._combine(key, step, first, count, view)
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
            supplied["gram"] = self._once(key, lambda: _gram(step, self._pass_room))
        if self.method.execution == "ranked":
            supplied["kept"] = self._kept(key, step, first, inputs)
        if self.method.prepare is not None:
            supplied["state"] = self._prepare()
        shaped = [
            _shape(x, item.spec.shape, self.method.execution) for x, item in zip(inputs, step.inputs, strict=True)
        ]
        result: Tensor = self.method.call(self.method.function, *shaped, knobs=step.knobs, **supplied)
        return result.reshape(-1)

    def _combine(self, key: str, step: Step, first: int, count: int, view: memoryview) -> int:
        """Gram class: the coefficients once per tensor, then their exact linear combination."""
        combine, used = self._once(key, lambda: self._combination(step))
        raws = [
            read_raw(step.inputs[i], first, count, buffer)
            for i, buffer in zip(used, self._room.buffers(len(used)), strict=True)
        ]
        out = np.frombuffer(view, FORMATS[step.spec.dtype].raw)
        overflow: int = combine(raws, out, Scratch.of_thread())
        if first == 0 and self.retained.wants(key):
            weights = dict(zip(used, combine.coefficients, strict=True))
            everything = [read_raw(item, 0, min(count, SAMPLE)) for item in step.inputs]
            self.retained.sample_linear(step, everything, weights, out)
        return overflow

    def _combination(self, step: Step) -> tuple[ExactSum, list[int]]:
        gram = _gram(step, self._pass_room)
        coefficients = self.method.call(self.method.function, gram, knobs=step.knobs).tolist()
        exact = [to_single(c) for c in coefficients]
        if abs(sum(coefficients) - 1) < 1e-12:  # an average stays one after rounding: equal models give themselves
            exact[0] = Fraction(1) - sum(exact[1:])
        used = [i for i, c in enumerate(exact) if c]
        dtypes = [step.inputs[i].spec.dtype for i in used]
        return ExactSum([exact[i] for i in used], dtypes, step.spec.dtype), used

    def _kept(self, key: str, step: Step, first: int, inputs: list[Tensor]) -> Tensor:
        """Ranked class: which of the portion's elements fall into the window of the order statistics."""
        ranking: Ranking = self._once(key, lambda: self._rank(step))
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

    def _once(self, key: str, compute: Callable[[], Any]) -> Any:
        """Result of a pass over a tensor, kept until its last piece is read."""
        with self._lock:
            found = self._passes.get(key)
        if found is None:
            found = compute()
            with self._lock:
                self._passes[key] = found
        return found

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
                raise FormatError(
                    f"`{self.method.name}` made values of `{key}` that are not finite",
                    hint=f"`--exclude '{key}'` copies the first model's, or change the knobs",
                    key=key,
                )
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


def _read_all(step: Step, first: int, count: int, room: _Room | None) -> list[Tensor]:
    """Elements [first, first + count) of all inputs: float64 if one of them is, else float32.

    What this thread read into `room` before is overwritten; without one they get fresh memory.
    """
    if not count:
        return [torch.zeros(0) for _ in step.inputs]
    inputs = [
        torch.from_numpy(raw).view(TORCH_DTYPES[item.spec.dtype])
        for raw, item in zip(_read_raws(step, first, count, room), step.inputs, strict=True)
    ]
    wide = torch.float64 if any(x.dtype == torch.float64 for x in inputs) else torch.float32
    return [x.to(wide) for x in inputs]


def _read_raws(step: Step, first: int, count: int, room: _Room | None) -> list[Raw]:
    """Bit patterns of the elements [first, first + count) of all inputs.

    Raises:
        FormatError: NaN or infinity among them.
    """
    buffers = room.buffers(len(step.inputs)) if room else [None] * len(step.inputs)
    raws = [read_raw(item, first, count, buffer) for item, buffer in zip(step.inputs, buffers, strict=True)]
    for raw, item in zip(raws, step.inputs, strict=True):
        if largest_magnitude(raw, item.spec.dtype) >= FORMATS[item.spec.dtype].infinity:
            raise nonfinite(item, *count_nonfinite(raw, item.spec.dtype))
    return raws


def _portions(step: Step, room: _Room, stop: int | None = None) -> Iterator[list[Tensor]]:
    """The inputs of a step in flat portions, up to element `stop`."""
    stop = step.spec.numel if stop is None else stop
    for first in range(0, stop, PORTION):
        count = min(PORTION, stop - first)
        yield _read_all(step, first, count, room)


def _gram(step: Step, room: _Room) -> Tensor:
    """Inner products of the inputs in float64, (N, N)."""
    count = len(step.inputs)
    gram = np.zeros((count, count))
    dtypes = [item.spec.dtype for item in step.inputs]
    for first in range(0, step.spec.numel, PIECE):
        raws = _read_raws(step, first, min(PIECE, step.spec.numel - first), room)
        if not native.inner(raws, dtypes, gram):
            stacked = np.stack([decode(raw, dtype) for raw, dtype in zip(raws, dtypes, strict=True)])  # (N, n)
            gram += stacked @ stacked.T
    return torch.from_numpy(np.tril(gram) + np.tril(gram, -1).T)
