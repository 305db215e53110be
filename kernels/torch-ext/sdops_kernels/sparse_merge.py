"""base + scale sum_i w_i d_i over changes of which each model keeps some: DARE and TIES for many tensors at once.

    SparseMerge("ties", base, models, outs, density=0.2, weights=[1, 1]).run()

    dare_linear   d_i = m_i (x_i - base) / density, m_i = 1 with probability `density`, by Philox
    dare_ties     the same, of which those of the elected sign are added
    ties          d_i = x_i - base where it is among the model's `density` largest of the tensor, else 0; elected

What is kept is exact: equal magnitudes at the border are kept in order of their places.
Sources: https://arxiv.org/abs/2311.03099 (DARE), https://arxiv.org/abs/2306.01708 (TIES).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ._registration import register
from ._tables import CODES, address_table, default_backend, device_of, same_device, warps
from .reference import sparse_merge as merge_by_torch

__all__ = ["METHODS", "SparseMerge", "sparse_merge"]

METHODS = ("dare_linear", "dare_ties", "ties")
BLOCK = 1024
PROGRAMS = 8  # per multiprocessor
LEVELS = ((20, 2048), (10, 1024), (0, 1024))  # lowest bit and number of bins: 11 + 10 + 10 bits of the magnitude
BEFORE_ALL, BEHIND_ALL = 0x7FFFFFFF, -1
Keys = Sequence[Sequence[tuple[int, int]]]


@dataclass(frozen=True)
class _Bucket:
    places: list[int]
    tensors: dict[str, Tensor]
    chunks: int
    kept: list[int]  # how many elements each problem keeps
    options: dict[str, Any]


class SparseMerge:
    """A merge by DARE or TIES, planned once.

    Args:
        method: See above.
        base: The models' common ancestor: a list of tensors.
        models: Lists of tensors of the same shapes; float16, bfloat16 or float32, contiguous.
        outs: Where the results go.
        density: Share of the changes that is kept; one number, or one per tensor. TIES keeps at least one.
        weights: One per model; none = 1 for each.
        scale: Factor of the merged change.
        normalize: Divide by the sum of the weights that take part.
        keys: DARE: two 32-bit numbers per tensor and model, of which the mask is made.
        backend: `triton`, `torch`, or None: Triton where there is a GPU.

    Raises:
        ValueError: what is given does not fit.
    """

    def __init__(
        self,
        method: str,
        base: Sequence[Tensor],
        models: Sequence[Sequence[Tensor]],
        outs: Sequence[Tensor],
        *,
        density: float | Sequence[float],
        weights: Sequence[float] = (),
        scale: float = 1.0,
        normalize: bool = False,
        keys: Keys | None = None,
        backend: str | None = None,
    ) -> None:
        self.method, self.base, self.outs = method, list(base), list(outs)
        self.models = [list(each) for each in zip(*models, strict=True)]  # [tensors][N]
        self.density = list(density) if isinstance(density, Sequence) else [density] * len(self.outs)
        self.weights = list(weights) or [1.0] * len(models)
        self.scale, self.normalize, self.keys = scale, normalize, keys
        self._check(len(models))
        self.device = same_device([*self.outs, *self.base, *(x for each in self.models for x in each)])
        self.backend = backend or default_backend(self.device)
        self._buckets = self._plan() if self.backend == "triton" else []

    def run(self) -> None:
        """Write the results.

        Raises:
            ValueError: an input holds NaN or infinity, or the result would; the message names the tensor's place.
        """
        if self.backend == "torch":
            for place in range(len(self.outs)):
                self._by_torch(place)
        for bucket in self._buckets:
            self.launch(bucket)
            marked = bucket.tensors["marks"].nonzero()
            if len(marked):
                where = int(torch.searchsorted(bucket.tensors["first"], marked[0].int(), right=True)) - 1
                raise ValueError(f"tensor {bucket.places[where]} holds or becomes NaN or infinity")

    def _by_torch(self, place: int) -> None:
        result = merge_by_torch(
            self.method,
            self.base[place],
            self.models[place],
            density=self.density[place],
            weights=self.weights,
            scale=self.scale,
            normalize=self.normalize,
            keys=self.keys[place] if self.keys else None,
        )
        if not bool(torch.isfinite(result).all()):
            raise ValueError(f"tensor {place} holds or becomes NaN or infinity")
        out = self.outs[place]
        largest = torch.finfo(out.dtype).max
        out.copy_(result.to(out.dtype).clamp_(-largest, largest))

    def launch(self, bucket: _Bucket) -> None:
        """All passes over the tensors of a bucket."""
        from ._sparse_merge_kernels import merge_sparse

        if self.method == "ties":
            self._rank(bucket)
        grid, shared = self._shared(bucket)
        names = ("table", "numbers", "keys", "border", "before", "first", "marks")
        merge_sparse[(grid,)](
            *(bucket.tensors[name] for name in names),
            *shared,
            **bucket.options,
            RANDOM=self.method != "ties",
            ELECT=self.method != "dare_linear",
            NORMALIZE=self.normalize,
            num_warps=warps(),
            enable_fp_fusion=False,
        )

    def _shared(self, bucket: _Bucket) -> tuple[int, tuple[int, int, int]]:
        """The grid, and how the chunks are shared among programs."""
        share = -(-bucket.chunks // min(bucket.chunks, device_of(self.device) * PROGRAMS))
        return -(-bucket.chunks // share), (len(bucket.places), bucket.chunks, share)

    def _rank(self, bucket: _Bucket) -> None:
        """Borders of what is kept, and how many equal to them lie before each chunk."""
        from ._sparse_merge_kernels import count_magnitudes, count_ties

        tensors, options = bucket.tensors, {name: v for name, v in bucket.options.items() if name != "OUT"}
        models, rows = options["N"], len(bucket.places)
        grid, shared = self._shared(bucket)
        prefix = torch.zeros(rows, models, dtype=torch.int32, device=self.device)
        wanted = torch.tensor(bucket.kept, device=self.device)[:, None].expand(rows, models).clone()
        numel = tensors["table"][:, :1]
        inner = (wanted > 0) & (wanted < numel)
        place = torch.where(inner, wanted, torch.zeros_like(wanted))
        for level, (shift, bins) in enumerate(LEVELS):
            counts = torch.zeros(rows, models, bins, dtype=torch.int32, device=self.device)
            count_magnitudes[(grid, models)](
                tensors["table"],
                tensors["first"],
                prefix,
                counts,
                *shared,
                shift,
                **options,
                BINS=bins,
                WHOLE=level == 0,
                num_warps=warps(),
                enable_fp_fusion=False,
            )
            chosen, place = _locate(counts, place)
            prefix = (prefix * bins + chosen).int()
        outside = torch.where(wanted > 0, BEHIND_ALL, BEFORE_ALL)
        border = torch.where(inner, prefix.long(), outside).int()
        room = torch.where(inner, place, torch.zeros_like(place)).int()
        tensors["border"].copy_(torch.stack([border, room], 2))
        ties = torch.empty(bucket.chunks, models, dtype=torch.int32, device=self.device)
        count_ties[(grid,)](
            tensors["table"],
            tensors["first"],
            border,
            ties,
            *shared,
            **options,
            num_warps=warps(),
            enable_fp_fusion=False,
        )
        reached = torch.nn.functional.pad(ties.cumsum(0, dtype=torch.int64), (0, 0, 1, 0))  # [chunks + 1, N]
        first = tensors["first"].long()
        begin = reached[first[:-1]].repeat_interleave(first.diff(), 0)
        tensors["before"].copy_(reached[:-1] - begin)

    def _plan(self) -> list[_Bucket]:
        kinds: dict[tuple[Any, ...], list[int]] = {}
        for place, out in enumerate(self.outs):
            tensors = [out, self.base[place], *self.models[place]]
            if not out.numel():
                continue
            dtypes = {x.dtype for x in tensors[1:]}
            if len(dtypes) > 1:
                raise ValueError(f"tensor {place}: base and models have several dtypes; cast them to one")
            whole = out.numel() % 16 == 0 and all(x.data_ptr() % 16 == 0 for x in tensors)
            kinds.setdefault((CODES[dtypes.pop()], CODES[out.dtype], whole), []).append(place)
        return [self._bucket(places, *kind) for kind, places in kinds.items()]

    def _bucket(self, places: list[int], code: int, out_code: int, whole: bool) -> _Bucket:
        rows, numbers, keys, first, kept = [], [], [], [0], []
        for place in places:
            out, density = self.outs[place], self.density[place]
            inputs = (out, self.base[place], *self.models[place])
            rows.append([out.numel(), *(x.data_ptr() for x in inputs)])
            numbers.append([density, self.scale, sum(self.weights), *self.weights])
            keys.append(self.keys[place] if self.keys else [(0, 0)] * len(self.weights))
            kept.append(kept_count(out.numel(), density))
            first.append(first[-1] + -(-out.numel() // BLOCK))
        empty = torch.empty(first[-1] if self.method == "ties" else 1, len(self.weights), dtype=torch.int32)
        tensors = {
            "table": address_table(rows, self.device),
            "numbers": torch.tensor(numbers, dtype=torch.float32).to(self.device),
            "keys": torch.tensor(keys, dtype=torch.int64).to(self.device),
            "border": torch.zeros(len(places), len(self.weights), 2, dtype=torch.int32, device=self.device),
            "before": empty.to(self.device),
            "first": torch.tensor(first, dtype=torch.int32).to(self.device),
            "marks": torch.zeros(first[-1], dtype=torch.int32, device=self.device),
        }
        options = {"N": len(self.weights), "CODE": code, "OUT": out_code, "ALIGNED": whole, "BLOCK": BLOCK}
        return _Bucket(places, tensors, first[-1], kept, options)

    def _check(self, count: int) -> None:
        if self.method not in METHODS:
            raise ValueError(f"no method {self.method!r}; there are {', '.join(METHODS)}")
        if len(self.weights) != count or not len(self.density) == len(self.base) == len(self.models) == len(self.outs):
            raise ValueError("numbers of tensors, densities or weights differ")
        if self.method != "ties" and self.keys is None:
            raise ValueError(f"{self.method} needs keys for its masks")
        if any(not 0 <= density <= 1 for density in self.density):
            raise ValueError("a density is a share from 0 to 1")
        if self.normalize and self.method == "dare_linear" and abs(sum(self.weights)) < 1e-12:
            raise ValueError(f"the weights {self.weights} sum to zero")
        for place, out in enumerate(self.outs):
            for x in (out, self.base[place], *self.models[place]):
                if x.shape != out.shape or not x.is_contiguous() or CODES.get(x.dtype, 9) > 2:
                    raise ValueError(f"tensor {place}: {x.dtype} {list(x.shape)} beside {list(out.shape)}")


def kept_count(numel: int, density: float) -> int:
    """How many elements TIES keeps: the integer part, at least one unless the density is 0."""
    return min(numel, max(1, int(density * numel))) if density else 0


def sparse_merge(
    method: str, base: Sequence[Tensor], models: Sequence[Sequence[Tensor]], **options: Any
) -> list[Tensor]:
    """The merged tensors, in the base's dtypes: see `SparseMerge`."""
    outs = [torch.empty_like(tensor) for tensor in base]
    SparseMerge(method, base, models, outs, **options).run()
    return outs


def _locate(counts: Tensor, place: Tensor) -> tuple[Tensor, Tensor]:
    """The bin that holds a place, from the highest bin on, and the place in it: [..., BINS], [...] -> [...], [...]."""
    reached = counts.flip(-1).cumsum(-1, dtype=torch.int64)
    index = (reached <= place[..., None]).sum(-1).clamp_(max=counts.shape[-1] - 1)
    before = torch.where(index > 0, reached.gather(-1, (index - 1).clamp_(min=0)[..., None])[..., 0], 0)
    return counts.shape[-1] - 1 - index, place - before


def _op(
    method: str,
    base: list[Tensor],
    models: list[Tensor],
    outs: list[Tensor],
    weights: list[float],
    densities: list[float],
    scale: float,
    normalize: bool,
    keys: list[int],
) -> None:
    count = len(weights)
    lists = [models[i * len(base) : (i + 1) * len(base)] for i in range(count)]
    pairs = list(zip(keys[::2], keys[1::2], strict=True))
    own = [pairs[place * count : (place + 1) * count] for place in range(len(base))] if pairs else None
    options: dict[str, Any] = {"density": densities, "weights": weights, "scale": scale, "normalize": normalize}
    SparseMerge(method, base, lists, outs, keys=own, **options).run()


register(
    "sparse_merge",
    "(str method, Tensor[] base, Tensor[] models, Tensor(a!)[] outs, float[] weights, float[] densities, float scale,"
    " bool normalize, int[] keys) -> ()",
    _op,
)
