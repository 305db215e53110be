"""The work of `extract` on a GPU: layers of one shape are factored together, while threads read the next ones.

Only where the rank is given; rules that look at all singular values or at rounding noise are the CPU's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import torch
from torch import Tensor

from sdops.core import accel
from sdops.core.stream import TORCH_DTYPES
from sdops.verbs._extract_difference import Difference, difference
from sdops.verbs._extract_factors import Layer, Wish, break_even, factorise
from sdops.verbs._extract_pairs import Pair
from sdops.verbs._extract_store import Store

BATCH = 1 << 30  # bytes of differences that are factored together


def factorise_on_device(
    layers: Sequence[Pair], wish: Wish, store: Store, jobs: int, advance: Callable[[int], None], device: str
) -> list[Layer]:
    """As `factorise`, with factors made on a device; layers that are kept whole are made by the CPU.

    Raises:
        FormatError: a value is NaN or infinite.
    """
    whole = [pair for pair in layers if _rank(pair, wish) >= break_even(pair)]
    made = {id(pair): layer for pair, layer in zip(whole, factorise(whole, wish, store, jobs, advance), strict=True)}
    batches = list(_batches([pair for pair in layers if id(pair) not in made], wish))
    with ThreadPoolExecutor(jobs) as pool:
        reading = [pool.submit(difference, pair, noise=False) for pair in batches[0]] if batches else []
        for number, batch in enumerate(batches):
            changes = [future.result() for future in reading]
            following = batches[number + 1] if number + 1 < len(batches) else []
            reading = [pool.submit(difference, pair, noise=False) for pair in following]
            for pair, layer in zip(batch, _factored(batch, changes, wish, store, device), strict=True):
                made[id(pair)] = layer
                advance(pair.nbytes)
    return [made[id(pair)] for pair in layers]


def _rank(pair: Pair, wish: Wish) -> int:
    fixed = wish.fixed(pair)
    assert fixed is not None  # noqa: S101 - `extract` has seen to that
    return min(fixed, wish.max_rank or fixed)


def _batches(layers: Sequence[Pair], wish: Wish) -> list[list[Pair]]:
    """Layers of one shape and rank, as many as a batch may hold."""
    kinds: dict[tuple[int, ...], list[Pair]] = {}
    for pair in layers:
        kinds.setdefault((*pair.matrix, _rank(pair, wish)), []).append(pair)
    found = []
    for (rows, columns, _), own in kinds.items():
        at_once = max(1, BATCH // (rows * columns * 4))
        found += [own[begin : begin + at_once] for begin in range(0, len(own), at_once)]
    return found


def _factored(
    batch: Sequence[Pair], changes: Sequence[Difference], wish: Wish, store: Store, device: str
) -> list[Layer]:
    """Factors of layers of one shape, rounded and put into the store."""
    matrices = [change.values.to(device, non_blocking=True) for change in changes]
    rank, dtype = _rank(batch[0], wish), TORCH_DTYPES[wish.dtype]
    layers = []
    found = accel.kernels().low_rank(matrices, rank, seed=wish.seed)
    for pair, change, matrix, factors in zip(batch, changes, matrices, found, strict=True):
        empty = Layer(pair, 0, False, factors.energy, factors.energy, change.weight)
        if not factors.energy:
            layers.append(empty)
            continue
        up, down = factors.up.to(dtype), factors.down.to(dtype)
        left = _squared(torch.addmm(matrix, up.float(), down.float(), alpha=-1))
        places = store.put(up.T.cpu()), store.put(down.cpu())
        values = tuple(factors.values[: up.shape[1]].tolist())
        layers.append(replace(empty, rank=up.shape[1], residual=left, values=values, places=places))
    return layers


def _squared(values: Tensor) -> float:
    return float(torch.linalg.vector_norm(values, dtype=torch.float64).square())
