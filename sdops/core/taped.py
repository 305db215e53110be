"""Run elementwise merge methods as tapes (core/tape.py), played by compiled code. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sdops.core import native
from sdops.core.exact import PIECE
from sdops.core.gram import inner_products
from sdops.core.method import Method
from sdops.core.native import NativeTape
from sdops.core.noise import key_words
from sdops.core.plan import Step
from sdops.core.portions import Passes, Room, check_finite, not_finite, read_unchecked
from sdops.core.precision import FORMATS, Raw, decode
from sdops.core.retained import SAMPLE, Retained
from sdops.core.tape import Program, UntraceableError, record

PORTION = PIECE  # elements: smaller ones cost more in calls than they gain in the cache


class Taped:
    """Evaluates steps with one elementwise method. Safe to use from several threads.

    Args:
        method: An elementwise one.
        retained: Receives samples.
        seed: For methods that take noise.
    """

    def __init__(self, method: Method, retained: Retained, *, seed: int) -> None:
        self.method = method
        self.retained = retained
        self.seed = seed
        self.passes = Passes()
        # two sets of buffers: a pass over a tensor may begin while a portion of it is at hand
        self._room, self._pass_room = Room(), Room()
        self._programs: dict[Any, Program | None] = {}
        self._tapes: dict[Any, NativeTape] = {}

    def can(self, step: Step) -> bool:
        """Whether a step can be done: there is compiled code for its dtypes, and the method can be recorded.

        Raises:
            UsageError: the method does not accept its knobs.
        """
        if native.library() is None or not {*_dtypes(step), step.spec.dtype} <= set(native.DTYPES):
            return False
        return self._program(step) is not None

    def try_knobs(self, step: Step) -> None:
        """Record the method, so that it refuses bad knobs."""
        self._program(step)

    def splits(self) -> bool:
        """Whether threads may share a tensor: not if they would all have to pass over it."""
        return not self.method.needs_gram

    def piece_bytes(self, step: Step) -> int:
        """Portions in which a step is computed."""
        return PORTION * FORMATS[step.spec.dtype].raw(0).itemsize

    def read_into(self, key: str, step: Step, start: int, buffer: memoryview) -> int:
        """Compute bytes of a merged tensor; return how many elements overflowed and were clamped.

        Raises:
            FormatError: an input holds NaN or infinity, or the method made one.
        """
        out = np.frombuffer(buffer, FORMATS[step.spec.dtype].raw)
        play, keys = self._tape(key, step, step.spec.dtype), self._keys(key, step)
        first, overflow = start // out.itemsize, 0
        for begin in range(0, len(out), PORTION):
            part = out[begin : begin + PORTION]
            raws = read_unchecked(step, first + begin, len(part), self._room)
            clamped = play(raws, part, keys, first + begin)
            if clamped < 0:
                check_finite(step, raws)
                raise not_finite(self.method.name, key)
            overflow += clamped
            if first + begin == 0 and self.retained.wants(key):
                self._sample(key, step, [raw[:SAMPLE] for raw in raws], part[:SAMPLE])
        if start + len(buffer) >= step.spec.nbytes:
            self.passes.forget(key)
        return overflow

    def _sample(self, key: str, step: Step, raws: Sequence[Raw], written: Raw) -> None:
        """Tell how much of the change survived rounding."""
        wanted = np.empty(len(written), np.uint32)
        self._tape(key, step, "F32")(raws, wanted, self._keys(key, step), 0)
        before, out = decode(raws[0], step.inputs[0].spec.dtype), decode(written, step.spec.dtype)
        self.retained.sample(before, decode(wanted, "F32"), out)

    def _keys(self, key: str, step: Step) -> list[tuple[int, int]]:
        """What the draws of random numbers for a tensor begin with."""
        program = self._program(step)
        draws = program.draws if program else ()
        return [key_words(self.seed, key, model, stream) for model, stream in draws]

    def _tape(self, key: str, step: Step, out_dtype: str) -> NativeTape:
        if self.method.needs_gram:
            gram = self.passes.once(key, lambda: inner_products(step, self._pass_room))
            return NativeTape(self._record(step, gram), _dtypes(step), out_dtype)
        identity = (_knobs(step), _dtypes(step), out_dtype)
        program = self._program(step)
        if identity not in self._tapes and program is not None:
            self._tapes[identity] = NativeTape(program, _dtypes(step), out_dtype)
        return self._tapes[identity]

    def _program(self, step: Step) -> Program | None:
        """What the method does with a step's knobs, if it can be recorded; with a gram, for some or other one."""
        identity = (_knobs(step), len(step.inputs))
        if identity not in self._programs:
            try:
                self._programs[identity] = self._record(step, np.eye(len(step.inputs)))
            except UntraceableError:
                self._programs[identity] = None
        return self._programs[identity]

    def _record(self, step: Step, gram: NDArray[np.float64]) -> Program:
        call = partial(self.method.call, self.method.function, knobs=step.knobs, gram=gram)
        return record(call, len(step.inputs))


def _dtypes(step: Step) -> tuple[str, ...]:
    return tuple(item.spec.dtype for item in step.inputs)


def _knobs(step: Step) -> tuple[tuple[str, Any], ...]:
    return tuple(sorted(step.knobs.items()))
