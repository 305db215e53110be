"""W' = round(W + sum of changes) of all layers in one launch: LoRAs baked into weights.

    bake = Bake(weights, outs, [[LoRA(up, down, scale=0.5)], ...])
    bake.run([0.8])                       strengths of the LoRAs; outs are written from the pristine weights each time

A weight is read and written once, however many LoRAs act on it. Changes are made and added up in float32; W + change is
exact and rounded once. `out` may be the weight itself, which then changes for good.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ._registration import register
from ._tables import CODES, address_table, default_backend, device_of, same_device
from .changes import Change, Dense, LoKr, LoRA, matrices
from .reference import bake as bake_by_torch
from .reference import fp8_scale

__all__ = ["Bake", "bake"]

FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
PROGRAMS = 4  # per multiprocessor
# Of the weight: for plain LoRAs in half precision; for what needs registers; for several families on one matrix.
TILE, SMALL_TILE, MIXED_TILE = (64, 64), (32, 64), (16, 64)
RANKS = 16  # multiplied at once; 64 where all are high
HIDDEN = 32  # ranks up to which float32 products hide behind the weights' way through memory


@dataclass
class _Bucket:
    """Matrices that share a launch.

    Attributes:
        tensors: The tables of the kernel, by name.
        slots: The LoRA of each segment, for its strength.
        options: Constants of the kernel.
        kept: Tensors whose addresses are in the tables.
    """

    places: list[int]
    tensors: dict[str, Tensor]
    slots: Tensor
    tiles: int
    count: int
    options: dict[str, Any]
    kept: list[Any] = field(default_factory=list)


class Bake:
    """LoRAs on top of weights, planned once, run any number of times at any strengths.

    Args:
        weights: Matrices, or kernels of convolutions, of any strides: float16, bfloat16, float32, or fp8 with scales.
        outs: Where the results go, in the shapes of the weights; dtypes may differ.
        changes: For each weight what is added to it. A change's `slot` says which strength it has.
        scales: For fp8 weights their scales, float32: one number, or one per row. What is written gets new ones.
        keys: For rounding at random, per weight: two 32-bit numbers, and the random words are Philox4x32-10's.
        backend: `triton`, `torch`, or None: Triton where there is a GPU.

    Attributes:
        scales: For fp8 results, the scales that were written, per weight.

    Raises:
        ValueError: shapes, dtypes or devices do not fit.
    """

    def __init__(
        self,
        weights: Sequence[Tensor],
        outs: Sequence[Tensor],
        changes: Sequence[Sequence[Change]],
        *,
        scales: Sequence[Tensor | None] | None = None,
        keys: Sequence[tuple[int, int]] | None = None,
        backend: str | None = None,
    ) -> None:
        self.weights, self.outs = list(weights), list(outs)
        self.changes = [list(each) for each in changes]
        self.read_scales = list(scales) if scales else [None] * len(self.weights)
        self.keys = keys
        self._check()
        self.device = same_device([*self.weights, *self.outs]) if self.weights else torch.device("cpu")
        self.backend = backend or default_backend(self.device)
        self.scales: list[Tensor | None] = [
            torch.ones_like(scale) if scale is not None and out.dtype in FP8 else None
            for scale, out in zip(self.read_scales, self.outs, strict=True)
        ]
        self._buckets: list[_Bucket] = []
        self._copies: list[tuple[Tensor, Tensor]] = []  # contiguous stand-ins of results that no stride describes
        if self.backend == "triton":
            self._plan()

    def run(self, strengths: Sequence[float] = ()) -> None:
        """Write the results.

        Args:
            strengths: By slot; what is missing is 1.
        """
        if self.backend == "torch":
            for place in range(len(self.weights)):
                self._by_torch(place, strengths)
            return
        for bucket in self._buckets:
            if not len(bucket.slots):
                continue
            chosen = torch.ones(max(len(strengths), int(bucket.slots.max()) + 1))
            chosen[: len(strengths)] = torch.tensor(strengths, dtype=torch.float32)
            bucket.tensors["numbers"][:, 1].copy_(chosen[bucket.slots], non_blocking=True)
        self.launch()

    def launch(self) -> None:
        """The launches alone, at the strengths of the last run: for timing and for CUDA graphs."""
        for bucket in self._buckets:
            if bucket.options["OUT"] > 2:
                bucket.tensors["most"].zero_()
                self._launch(bucket, measure=True)
                self._rescale(bucket)
            self._launch(bucket, measure=False)
        for out, copy in self._copies:
            out.copy_(copy)

    def _by_torch(self, place: int, strengths: Sequence[float]) -> None:
        chosen = [
            replace(change, strength=strengths[change.slot] if change.slot < len(strengths) else 1.0)
            for change in self.changes[place]
        ]
        key = self.keys[place] if self.keys else None
        out, scale = bake_by_torch(
            self.weights[place], chosen, self.outs[place].dtype, scale=self.read_scales[place], key=key
        )
        self.outs[place].copy_(out)
        if scale is not None and (own := self.scales[place]) is not None:
            own.copy_(scale.reshape(own.shape))

    def _launch(self, bucket: _Bucket, *, measure: bool) -> None:
        from ._bake_kernels import bake_tiles

        programs = min(bucket.tiles, device_of(self.device) * PROGRAMS)
        share = -(-bucket.tiles // programs)
        bake_tiles[(-(-bucket.tiles // share),)](
            *(
                bucket.tensors[name]
                for name in ("problems", "segments", "numbers", "keys", "scales", "fresh", "most", "first")
            ),
            bucket.count,
            bucket.tiles,
            share,
            **bucket.options,
            MEASURE=measure,
            num_warps=4,
            num_stages=2,
            enable_fp_fusion=False,
        )

    def _rescale(self, bucket: _Bucket) -> None:
        """New scales: the largest magnitude becomes the largest code."""
        found = bucket.tensors["most"].view(torch.float32)
        dtype = next(dtype for dtype, code in CODES.items() if code == bucket.options["OUT"])
        fresh = bucket.tensors["fresh"]
        fresh.copy_(fp8_scale(found, dtype))
        position = 0
        for place in bucket.places:
            own = self.scales[place]
            if own is not None:
                own.copy_(fresh[position : position + own.numel()].reshape(own.shape))
                position += own.numel()

    def _check(self) -> None:
        if not len(self.weights) == len(self.outs) == len(self.changes) == len(self.read_scales):
            raise ValueError(
                f"{len(self.weights)} weights, {len(self.outs)} results, changes of {len(self.changes)} weights"
            )
        for place, (weight, out) in enumerate(zip(self.weights, self.outs, strict=True)):
            if weight.shape != out.shape or weight.dtype not in CODES or out.dtype not in CODES:
                raise ValueError(
                    f"weight {place}: {weight.dtype} {list(weight.shape)}, result {out.dtype} {list(out.shape)}"
                )
            if (weight.dtype in FP8) != (self.read_scales[place] is not None):
                raise ValueError(f"weight {place}: fp8 weights have scales, others have none")
            if out.dtype in FP8 and weight.dtype not in FP8:
                raise ValueError(f"weight {place}: only fp8 weights can be written as fp8")
            for change in self.changes[place]:
                change.check(tuple(weight.shape))

    # ------------------------------------------------------------------------------------------------------ planning

    def _plan(self) -> None:
        kinds: dict[tuple[Any, ...], list[tuple[Any, ...]]] = {}
        for place, (weight, out) in enumerate(zip(self.weights, self.outs, strict=True)):
            if not weight.numel():
                continue
            target = out
            made = matrices(weight, out, self.changes[place])
            if made is None:  # no stride describes both: a contiguous copy does
                target = torch.empty_like(out, memory_format=torch.contiguous_format)
                self._copies.append((out, target))
                made = matrices(weight.contiguous(), target, self.changes[place])
            assert made is not None  # noqa: S101 - contiguous tensors are matrices
            base, result, changes = made
            factor = common_dtype(changes)
            whole = are_aligned([base, result], changes)
            mask = kinds_of(changes) | 16 * any(change.gain is not None for change in changes)
            high = min((change.rank for change in changes), default=0) >= 64
            kind = (CODES[base.dtype], CODES[result.dtype], CODES[factor], mask, whole, high)
            kinds.setdefault(kind, []).append((place, base, result, changes))
        self._buckets = [self._bucket(kind, found) for kind, found in kinds.items()]

    def _bucket(self, kind: tuple[Any, ...], found: list[tuple[Any, ...]]) -> _Bucket:
        base_code, out_code, factor_code, mask, whole, high = kind
        factor = next(dtype for dtype, code in CODES.items() if code == factor_code)
        tile = TILE if mask <= 1 and factor != torch.float32 and whole else SMALL_TILE
        if (mask & 15).bit_count() > 1:
            tile = MIXED_TILE
        problems, numbers, slots, keys, first = [], [], [], [], [0]
        segments, kept = list[list[int]](), list[Any]()
        scales = list[Tensor]()
        position = 0
        for place, base, result, changes in found:
            begin = len(segments)
            for change in changes:
                entry, used = change.entry(factor)
                segments.append(entry)
                numbers.append([change.scale, 1.0])
                slots.append(change.slot)
                kept.append(used)
            rows, columns = base.shape
            scale = self.read_scales[place]
            step = int(scale is not None and scale.numel() > 1)
            problems.append(
                [
                    *(base.data_ptr(), result.data_ptr(), base.stride(0), result.stride(0)),
                    *(rows, columns, begin, len(segments), position, step),
                ]
            )
            if scale is not None:
                scales.append(scale.reshape(-1).float())
                position += scale.numel()
            keys.append(self.keys[place] if self.keys else (0, 0))
            first.append(first[-1] + -(-rows // tile[0]) * -(-columns // tile[1]))
            kept += [base, result]
        options = {
            "BASE": base_code,
            "OUT": out_code,
            "FACTOR": factor_code,
            "KINDS": mask,
            "ALIGNED": whole,
            "RANDOM": self.keys is not None,
            "BM": tile[0],
            "BN": tile[1],
            **product_options([change for *_, changes in found for change in changes], self.device, high=high),
        }
        read = torch.cat(scales) if scales else torch.ones(1, device=self.device)
        tensors = {
            "problems": address_table(problems, self.device),
            "segments": address_table(segments or [[0] * 14], self.device),
            "numbers": torch.tensor(numbers or [[0.0, 0.0]], dtype=torch.float32).to(self.device),
            "keys": address_table(keys, self.device),
            "scales": read,
            "fresh": torch.ones_like(read),
            "most": torch.zeros_like(read, dtype=torch.int32),
            "first": torch.tensor(first, dtype=torch.int32).to(self.device),
        }
        places = [place for place, *_ in found]
        return _Bucket(places, tensors, torch.tensor(slots, dtype=torch.long), first[-1], len(found), options, kept)


def kinds_of(changes: Sequence[Change]) -> int:
    """Bit k: one of them is of kind k."""
    return sum(1 << kind for kind in {change.kind for change in changes})


def common_dtype(changes: Sequence[Change]) -> torch.dtype:
    """In which the factors are multiplied: float16 or bfloat16 if all are, else float32, which is exact for both."""
    dtypes = {tensor.dtype for change in changes for tensor in change.tensors()}
    if any(isinstance(change, (LoKr, Dense)) for change in changes):
        return torch.float32
    return dtypes.pop() if len(dtypes) == 1 and dtypes <= {torch.float16, torch.bfloat16} else torch.float32


def are_aligned(weights: Sequence[Tensor], changes: Sequence[Change]) -> bool:
    """Whether all rows begin at multiples of 16 bytes, whatever dtype."""
    ok = all(x.data_ptr() % 16 == 0 and x.stride(0) % 16 == 0 and x.shape[1] % 16 == 0 for x in weights)
    return ok and all(tensor.data_ptr() % 16 == 0 for change in changes for tensor in change.rows())


def product_options(changes: Sequence[Change], device: torch.device, *, high: bool) -> dict[str, Any]:
    """How the kernels multiply factors; `high`: all ranks are at least 64."""
    highest = max((change.rank for change in changes), default=0)
    nvidia = device.type == "cuda" and torch.version.hip is None
    return {
        "WIDE": device.type == "cpu",
        "PRECISION": "tf32x3" if nvidia and highest > HIDDEN else "ieee",
        "BR": 64 if high else RANKS,
    }


def bake(
    weights: Sequence[Tensor], changes: Sequence[Sequence[Change]], strengths: Sequence[float] = ()
) -> list[Tensor]:
    """The weights with their changes, in their dtypes: see `Bake`."""
    outs = [torch.empty_like(weight) for weight in weights]
    Bake(weights, outs, changes).run(strengths)
    return outs


def _op(weights: list[Tensor], outs: list[Tensor], ups: list[Tensor], downs: list[Tensor], scales: list[float]) -> None:
    changes = [[LoRA(up, down, scale)] for up, down, scale in zip(ups, downs, scales, strict=True)]
    Bake(weights, outs, changes).run()


register("bake", "(Tensor[] weights, Tensor(a!)[] outs, Tensor[] ups, Tensor[] downs, float[] scales) -> ()", _op)
