"""A merge in progress as a Source: tensors are computed when they are read.

Linear methods are evaluated exactly (core.exact), those that need inner products after a pass for these (core.gram).
Elementwise methods are played as tapes (core.taped). What is left runs as torch functions on portions as small as the
execution class allows (core.stream). Copies and casts need none of them.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from sdops.core import native
from sdops.core.chain import POURED, Chain, Link, Links, chain_of, link
from sdops.core.exact import PIECE, ExactSum, NonFiniteError, Scratch
from sdops.core.gram import Combined
from sdops.core.inputs import nonfinite
from sdops.core.linear import coefficients
from sdops.core.method import Method
from sdops.core.plan import Plan, Step
from sdops.core.portions import Room, read_unchecked
from sdops.core.precision import FORMATS, Raw, count_nonfinite, decode, encode
from sdops.core.retained import SAMPLE, Retained
from sdops.core.run import PIECE_BYTES
from sdops.core.source import splits
from sdops.core.spec import Spec
from sdops.core.taped import Taped
from sdops.errors import UsageError

if TYPE_CHECKING:
    from sdops.core.stream import Stream

CHAINS = 4  # tensors whose chains are kept: pieces of one come in a row, in several threads


class Engine(Protocol):
    """One way to compute merged tensors."""

    def splits(self) -> bool:
        """Whether threads may share a tensor."""

    def piece_bytes(self, step: Step) -> int:
        """Portions in which a step is computed."""

    def read_into(self, key: str, step: Step, start: int, buffer: memoryview) -> int:
        """Compute bytes of a merged tensor; return how many elements overflowed and were clamped."""

    def try_knobs(self, step: Step) -> None:
        """Raise an error if the method does not accept a step's knobs."""


class Merged:
    """The Source that a Plan describes.

    Args:
        plan: What to compute.
        method: How.
        seed: For random methods.
        memory: Bytes that whole-tensor methods may hold at the same time.
        sampled: Whether to measure what survives rounding.
        specs: The output's tensors, as the plan has them, if somebody holds them already.

    Attributes:
        overflows: Tensor -> number of elements that were too large for the output dtype and were clamped.
        retained: How much of each model's contribution survived rounding, measured on samples.
    """

    def __init__(
        self,
        plan: Plan,
        method: Method,
        *,
        seed: int = 0,
        memory: int = 1 << 30,
        sampled: bool = True,
        specs: Mapping[str, Spec] | None = None,
    ) -> None:
        self.name = plan.name
        self.specs: Mapping[str, Spec] = plan.steps.specs if specs is None else specs
        self.metadata: Mapping[str, str] = plan.metadata
        self.plan = plan
        self.method = method
        self.overflows: dict[str, int] = {}
        self.retained = Retained(plan.steps.keys_of("merge") if sampled else ())
        self._seed = seed
        self._memory = memory
        self._room = Room()
        self._lock = threading.Lock()
        self._sums: dict[Any, tuple[list[int], ExactSum]] = {}
        self._combined = Combined(method, self.retained)
        self._taped = Taped(method, self.retained, seed=seed)
        self._stream: Stream | None = None
        self._engines: dict[str, Engine] = {}
        self._may_chain = any(hasattr(source, name) for source in plan.steps.sources for name in ("link", "place"))
        self._chains: OrderedDict[str, Chain | None] = OrderedDict()

    def close(self) -> None:
        """Nothing to release: the inputs belong to whoever opened them."""

    @property
    def forks(self) -> bool:
        """Whether forked processes should do the work: on files, where numpy or torch take it in small portions.

        Compiled sums need none, and threads share what takes whole tensors or the whole model.
        """
        if any(hasattr(source, "piece_bytes") for source in self.plan.steps.sources):
            return False
        if self.method.execution == "linear":
            return native.library() is None
        return self.method.execution in ("elementwise", "gram", "ranked", "rows")

    def tally(self) -> tuple[dict[str, int], Any]:
        """What was counted in this process."""
        return self.overflows, self.retained.tally()

    def add(self, tally: tuple[dict[str, int], Any]) -> None:
        """Add what another process counted."""
        overflows, retained = tally
        for key, overflow in overflows.items():
            self._count(key, overflow)
        self.retained.add(retained)

    def piece_bytes(self, key: str) -> int:
        """Portions in which `key` is computed."""
        step = self.plan.steps[key]
        if step.action == "merge" and self.method.execution != "linear":
            return self.engine(key).piece_bytes(step)
        if step.action in ("cast", "merge"):
            return PIECE * (step.spec.nbytes // max(step.spec.numel, 1) or 1)
        return PIECE_BYTES

    def splits(self, key: str) -> bool:
        """Whether threads may share the tensor."""
        step = self.plan.steps[key]
        if not all(splits(item.source, item.key) for item in step.inputs):
            return False
        return step.action != "merge" or self.method.execution == "linear" or self.engine(key).splits()

    def check_knobs(self) -> None:
        """Try the method with every combination of knobs, so that it refuses bad ones at once; linear ones have been.

        Raises:
            UsageError: the method does not accept its knobs.
        """
        tried = set()
        for key, step in self.plan.steps.items():
            identity = tuple(sorted(step.knobs.items())), len(step.inputs)
            if step.action != "merge" or self.method.execution == "linear" or identity in tried:
                continue
            tried.add(identity)
            try:
                self.engine(key).try_knobs(step)
            except (ArithmeticError, ValueError, RuntimeError) as error:
                knobs = ", ".join(f"`{name}` {value}" for name, value in step.knobs.items())
                raise UsageError(
                    f"`{self.method.name}` cannot work with {knobs}: {error}",
                    hint=f"`sdops methods {self.method.name}` explains the knobs",
                ) from error

    def read_into(self, key: str, start: int, buffer: memoryview) -> None:
        """Compute bytes `[start, start + len(buffer))` of a tensor.

        Raises:
            FormatError: an input holds NaN or infinity.
        """
        step = self.plan.steps[key]
        if step.action == "copy":
            step.inputs[0].source.read_into(step.inputs[0].key, start, buffer)
        elif step.action == "value":
            buffer[:] = step.value[start : start + len(buffer)]
        elif step.action == "merge" and self.method.execution != "linear":
            self._count(key, self.engine(key).read_into(key, step, start, buffer))
        else:
            self._read_numpy(key, step, start, buffer)

    @property
    def remark(self) -> str:
        """What a method of the whole model found out about it, once it has run."""
        return self._stream.remark if self._stream else ""

    def engine(self, key: str) -> Engine:
        """What computes a merged tensor, unless the method is linear."""
        if key not in self._engines:
            self._engines[key] = self._choose(self.plan.steps[key])
        return self._engines[key]

    def _choose(self, step: Step) -> Engine:
        if self.method.execution == "gram":
            return self._combined
        if self.method.execution == "elementwise" and self._taped.can(step):
            return self._taped
        return self.stream()

    def stream(self) -> Stream:
        """The torch side, made when first needed: importing torch costs more than many a merge."""
        with self._lock:
            if self._stream is None:
                from sdops.core.stream import Stream

                self._stream = Stream(self.plan, self.method, self.retained, seed=self._seed, memory=self._memory)
        return self._stream

    def pour(self, key: str, start: int, stop: int, file: int, position: int) -> bool:
        """Compute bytes `[start, stop)` of a tensor right into a file, in compiled code.

        Args:
            key: The tensor.
            start, stop: Which bytes.
            file: The open file's descriptor.
            position: Where the tensor begins.

        Returns:
            Whether it is done; else the caller has to write all of them.

        Raises:
            ChangedError: an input was written to.
        """
        step = self.plan.steps[key]
        is_sum = step.action == "cast" or (step.action == "merge" and self.method.execution == "linear")
        chain = self._chain(key) if is_sum and self._may_chain else None
        if chain is None:
            return False
        raw = FORMATS[step.spec.dtype].raw
        size, rooms = np.dtype(raw).itemsize, self._room.parts([*chain.portions, POURED])
        if not chain.pour(range(start // size, stop // size), rooms, file, position + start):
            return False
        if start == 0 and self.retained.wants(key):
            written = np.empty(min(SAMPLE, stop // size), raw)
            if chain(0, written, rooms[:-1]):
                self._sample(step, written)
        return True

    def _read_numpy(self, key: str, step: Step, start: int, buffer: memoryview) -> None:
        """Casts and linear merges, in portions of at most PIECE elements."""
        out = np.frombuffer(buffer, FORMATS[step.spec.dtype].raw)
        first = start // out.itemsize
        for begin in range(0, len(out), PIECE):
            part = out[begin : begin + PIECE]
            if not self._chained(key, first + begin, part):
                raws = read_unchecked(step, first + begin, len(part), self._room)
                if step.action == "cast":
                    self._cast(key, step, raws[0], part)
                    continue
                self._sum(key, step, raws, part)
            if first + begin == 0 and self.retained.wants(key):
                self._sample(step, part[:SAMPLE])

    def link(self, key: str, links: Links) -> Link | None:
        """How a tensor is made of others, if that is a sum; see core.chain."""
        step = self.plan.steps[key]
        if step.action == "value" or (step.action == "merge" and self.method.execution != "linear"):
            return None
        inputs = [link(item.source, item.key, links) for item in step.inputs]
        if step.action == "copy":
            return inputs[0]
        if not {step.spec.dtype, *[one.dtype for one in inputs]} <= FORMATS.keys():
            return None
        if step.action == "cast":
            return Link(step.spec.dtype, None, ((Fraction(1), inputs[0]),))
        used, combine = self._combination(step, [one.dtype for one in inputs])
        terms = tuple((c, inputs[i]) for c, i in zip(combine.coefficients, used, strict=True))
        if [c for c, _ in terms] == [1] and terms[0][1].dtype == step.spec.dtype:
            return terms[0][1]
        return Link(step.spec.dtype, None, terms)

    def _chained(self, key: str, first: int, out: Raw) -> bool:
        """Compute elements through all sums that they come from; False if that has to be done one by one."""
        chain = self._chain(key) if self._may_chain else None
        return chain is not None and chain(first, out, self._room.buffers(len(chain.reads)))

    def _chain(self, key: str) -> Chain | None:
        with self._lock:  # threads ask for the pieces of a tensor at the same time: its chain is made once
            if key not in self._chains:
                self._chains[key] = chain_of(self, key)
                while len(self._chains) > CHAINS:
                    self._chains.popitem(last=False)
            return self._chains[key]

    def _sample(self, step: Step, out: Raw) -> None:
        """Account for the first elements of a tensor."""
        raws = read_unchecked(step, 0, len(out), self._room)
        used, combine = self._combination(step, [item.spec.dtype for item in step.inputs])
        self.retained.sample_linear(step, raws, dict(zip(used, combine.coefficients, strict=True)), out)

    def _cast(self, key: str, step: Step, raw: Raw, out: Raw) -> None:
        nan, infinite = count_nonfinite(raw, step.inputs[0].spec.dtype)
        if nan + infinite:
            raise nonfinite(step.inputs[0], nan, infinite)
        out[:], overflow = encode(decode(raw, step.inputs[0].spec.dtype), step.spec.dtype)
        self._count(key, overflow)

    def _sum(self, key: str, step: Step, raws: list[Raw], out: Raw) -> None:
        used, combine = self._combination(step, [item.spec.dtype for item in step.inputs])
        try:
            self._count(key, combine([raws[i] for i in used], out, Scratch.of_thread()))
        except NonFiniteError as error:
            item = step.inputs[used[error.index]]
            raise nonfinite(item, *count_nonfinite(raws[used[error.index]], item.spec.dtype)) from None

    def _combination(self, step: Step, dtypes: Sequence[str]) -> tuple[list[int], ExactSum]:
        """The exact sum for a step's knobs and inputs of some dtypes, and which have a coefficient other than zero."""
        identity = (id(step.knobs), *dtypes, step.spec.dtype)  # of a plan; its steps share them, and keep them
        if identity not in self._sums:
            exact: tuple[Fraction, ...] = coefficients(self.method.function, len(dtypes), step.knobs)
            used = [i for i, c in enumerate(exact) if c]
            combine = ExactSum([exact[i] for i in used], [dtypes[i] for i in used], step.spec.dtype)
            self._sums[identity] = used, combine
        return self._sums[identity]

    def _count(self, key: str, overflow: int) -> None:
        if overflow:
            with self._lock:
                self.overflows[key] = self.overflows.get(key, 0) + overflow
