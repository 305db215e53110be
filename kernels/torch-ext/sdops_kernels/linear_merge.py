"""sum_i c_i x_i of many tensors in one launch, rounded once: weighted sums, add difference, block weights.

    merge = LinearMerge([model_a, model_b], outs, [Fraction(3, 4), Fraction(1, 4)])
    merge.run()

A model is a list of tensors; coefficients are one per model, or one per model for every tensor. Results have the bits
of the exact sum rounded once to nearest, ties to even, whatever the order and the device.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ._registration import register
from ._tables import CODES, Device, address_table, default_backend, device_of, same_device, warps
from .exact import Coefficient, split_coefficient
from .reference import linear_merge as merge_by_torch

__all__ = ["LinearMerge", "Merged", "linear_merge"]

BLOCK = 1024  # elements of a chunk: with 4 warps, 16 bytes per thread and load
PROGRAMS = 8  # per multiprocessor
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
# Coefficients outside of this range (largest value, exponent of the lowest bit) are left to torch: errors of products
# could leave float32.
LARGEST, LOWEST_BIT = 2.0**60, -64


class Merged(NamedTuple):
    """What a run met.

    Attributes:
        clamped: Results that were too large for their dtype, per tensor.
        settled: Chunks that were done again in float64.
        redone: Tensors with elements that needed rational arithmetic.
    """

    clamped: dict[int, int]
    settled: int
    redone: int


@dataclass(frozen=True)
class _Bucket:
    """Problems that share a launch.

    Attributes:
        problems: Their places in the plan's lists.
        used: The inputs of each whose coefficient is not zero.
        table, coefficients, first: See the kernels.
        marks: One int32 per chunk.
        options: Constants of the kernel.
    """

    problems: list[int]
    used: list[list[int]]
    table: Tensor
    coefficients: Tensor
    first: Tensor
    marks: Tensor
    options: dict[str, Any]


class LinearMerge:
    """A merge of N models, planned once, run any number of times on the same tensors.

    Args:
        models: N lists of tensors: float16, bfloat16 or float32, contiguous, the t-th of equal shape in all lists.
        outs: Where the results go; may be the tensors of a model.
        coefficients: N numbers, or a list of N numbers per tensor. A float means the float32 next to it, a Fraction
            itself; its denominator must be a power of two, for sums of thirds have no end.
        exact: Correctly rounded; False sums in plain float32, which is wrong in the last place for some in a hundred.
        backend: `triton`, `torch`, or None: Triton where there is a GPU.

    Raises:
        ValueError: shapes, dtypes, devices or numbers do not fit.
    """

    def __init__(
        self,
        models: Sequence[Sequence[Tensor]],
        outs: Sequence[Tensor],
        coefficients: Sequence[Coefficient] | Sequence[Sequence[Coefficient]],
        *,
        exact: bool = True,
        backend: str | None = None,
    ) -> None:
        self.inputs = [list(each) for each in zip(*models, strict=False)]  # [tensors][N]
        self.outs = list(outs)
        self.coefficients = _per_tensor(coefficients, len(models), len(self.outs))
        self.exact = exact
        self._check(models)
        self.device = same_device([*self.outs, *(x for each in self.inputs for x in each)]) if outs else Device("cpu")
        self.backend = backend or default_backend(self.device)
        self._by_torch: list[int] = []
        self._buckets = self._sorted() if self.backend == "triton" else []
        if self.backend == "torch":
            self._by_torch = list(range(len(self.outs)))

    def run(self) -> Merged:
        """Write the sums.

        Raises:
            ValueError: an input holds NaN or infinity; the message names the tensor's place.
        """
        clamped: dict[int, int] = {}
        settled, redone = 0, 0
        for bucket in self._buckets:
            done, again = self._launch(bucket, clamped)
            settled += done
            for problem in again:
                self._run_torch(problem, clamped)
            redone += len(again)
        for problem in self._by_torch:
            self._run_torch(problem, clamped)
        return Merged({key: count for key, count in clamped.items() if count}, settled, redone)

    def launch(self) -> None:
        """The launches alone, without looking at what they could not decide: for timing and for CUDA graphs."""
        for bucket in self._buckets:
            self._first_pass(bucket)

    def _run_torch(self, problem: int, clamped: dict[int, int]) -> None:
        used = [i for i, c in enumerate(self.coefficients[problem]) if c]
        if not used:
            self.outs[problem].zero_()
            return
        inputs = [self.inputs[problem][i] for i in used]
        try:
            result, count = merge_by_torch(
                inputs, [self.coefficients[problem][i] for i in used], self.outs[problem].dtype
            )
        except ValueError:
            raise ValueError(f"an input of tensor {problem} holds NaN or infinity") from None
        self.outs[problem].copy_(result)
        clamped[problem] = count

    def _first_pass(self, bucket: _Bucket) -> None:
        from ._linear_merge_kernels import merge_chunks

        chunks = len(bucket.marks)
        programs = min(chunks, device_of(self.device) * PROGRAMS)
        share = -(-chunks // programs)
        merge_chunks[(-(-chunks // share),)](
            bucket.table,
            bucket.coefficients,
            bucket.first,
            bucket.marks,
            len(bucket.problems),
            chunks,
            share,
            EXACT=self.exact,
            **bucket.options,
            num_warps=warps(),
            enable_fp_fusion=False,
        )

    def _launch(self, bucket: _Bucket, clamped: dict[int, int]) -> tuple[int, list[int]]:
        """Both passes; how many chunks were settled, and which problems are left to torch."""
        self._first_pass(bucket)
        if not self.exact:
            return 0, []
        marked = bucket.marks.nonzero()[:, 0].int()
        if not len(marked):
            return 0, []
        from ._linear_merge_kernels import settle_chunks

        found = torch.zeros(len(marked), 3, dtype=torch.int32, device=self.device)
        options = {name: value for name, value in bucket.options.items() if name != "ALIGNED"}
        settle_chunks[(len(marked),)](
            bucket.table,
            bucket.coefficients,
            bucket.first,
            marked,
            found,
            len(bucket.problems),
            **options,
            num_warps=warps(),
            enable_fp_fusion=False,
        )
        places = torch.searchsorted(bucket.first, marked, right=True).sub_(1).tolist()
        again = set()
        for place, (left, foreign, over) in zip(places, found.tolist(), strict=False):
            problem = bucket.problems[place]
            if foreign:
                raise ValueError(f"an input of tensor {problem} holds NaN or infinity")
            clamped[problem] = clamped.get(problem, 0) + over
            if left:
                again.add(problem)
        return len(marked), sorted(again)

    def _sorted(self) -> list[_Bucket]:
        """Tensors by what the kernel must know when it is compiled."""
        kinds: dict[tuple[Any, ...], list[int]] = {}
        for problem, (inputs, out) in enumerate(zip(self.inputs, self.outs, strict=False)):
            if not out.numel():
                continue
            used = [i for i, c in enumerate(self.coefficients[problem]) if c]
            halves = [split_coefficient(self.coefficients[problem][i]) for i in used]
            if not used or not all(half and _in_range(half) for half in halves):
                self._by_torch.append(problem)
                continue
            tensors = [out, *(inputs[i] for i in used)]
            whole = out.numel() % 16 == 0 and all(x.data_ptr() % 16 == 0 for x in tensors)
            low = any(half is not None and half[1] for half in halves)
            kinds.setdefault((tuple(CODES[x.dtype] for x in tensors), low, whole), []).append(problem)
        return [self._bucket(problems, *kind) for kind, problems in kinds.items()]

    def _bucket(self, problems: list[int], codes: tuple[int, ...], low: bool, whole: bool) -> _Bucket:
        used = [[i for i, c in enumerate(self.coefficients[p]) if c] for p in problems]
        rows, numbers, first = [], [], [0]
        for problem, own in zip(problems, used, strict=False):
            out = self.outs[problem]
            rows.append([out.numel(), out.data_ptr(), *(self.inputs[problem][i].data_ptr() for i in own)])
            numbers.append([split_coefficient(self.coefficients[problem][i]) for i in own])
            first.append(first[-1] + -(-out.numel() // BLOCK))
        options = {
            "N": len(codes) - 1,
            "DTYPES": sum(code * 5**i for i, code in enumerate(codes[1:])),
            "OUT": codes[0],
            "LOW": low,
            "ALIGNED": whole,
            "BLOCK": BLOCK,
        }
        return _Bucket(
            problems,
            used,
            address_table(rows, self.device),
            torch.tensor(numbers, dtype=torch.float32).to(self.device),
            torch.tensor(first, dtype=torch.int32).to(self.device),
            torch.zeros(first[-1], dtype=torch.int32, device=self.device),
            options,
        )

    def _check(self, models: Sequence[Sequence[Tensor]]) -> None:
        for c in {c for row in self.coefficients for c in row if isinstance(c, Fraction)}:
            if c.denominator & (c.denominator - 1):
                raise ValueError(f"the denominator of {c} is no power of two; a float means the float32 next to it")
        if any(len(model) != len(self.outs) for model in models) or not models:
            raise ValueError(f"{len(self.outs)} results, but models of {[len(model) for model in models]} tensors")
        for place, (inputs, out) in enumerate(zip(self.inputs, self.outs, strict=False)):
            for x in (out, *inputs):
                if x.shape != out.shape or x.dtype not in DTYPES or not x.is_contiguous():
                    raise ValueError(
                        f"tensor {place}: {x.dtype} {list(x.shape)} beside {out.dtype} {list(out.shape)}; "
                        "wanted: equal shapes, contiguous, float16, bfloat16 or float32"
                    )


def linear_merge(
    models: Sequence[Sequence[Tensor]], coefficients: Sequence[Coefficient] | Sequence[Sequence[Coefficient]]
) -> list[Tensor]:
    """The merged tensors, in the dtypes of the first model: see `LinearMerge`."""
    outs = [torch.empty_like(tensor) for tensor in models[0]]
    LinearMerge(models, outs, coefficients).run()
    return outs


def _per_tensor(
    coefficients: Sequence[Coefficient] | Sequence[Sequence[Coefficient]], models: int, tensors: int
) -> list[list[Coefficient]]:
    rows: Iterable[Sequence[Any]] = (
        coefficients if coefficients and isinstance(coefficients[0], Sequence) else [coefficients] * tensors  # type: ignore[assignment]
    )
    found = [list(row) for row in rows]
    if len(found) != tensors or any(len(row) != models for row in found):
        raise ValueError(f"{models} coefficients wanted, or {models} for each of {tensors} tensors")
    return found


def _in_range(halves: tuple[float, float]) -> bool:
    for half in halves:
        if half and (abs(half) > LARGEST or Fraction(half).denominator > 2**-LOWEST_BIT):
            return False
    return True


def _op(inputs: list[Tensor], outs: list[Tensor], coefficients: list[float]) -> None:
    count = len(coefficients)
    models = [inputs[i * len(outs) : (i + 1) * len(outs)] for i in range(count)]
    LinearMerge(models, outs, coefficients).run()


register("linear_merge", "(Tensor[] inputs, Tensor(a!)[] outs, float[] coefficients) -> ()", _op)
