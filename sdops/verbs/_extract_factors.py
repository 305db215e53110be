"""The work of `extract`: factors of all layers, several at a time, put into a store."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sdops.core import ranks
from sdops.core.budget import Budget as Memory
from sdops.core.lowrank import Engine, Factors, decompose, residual, squared_norm
from sdops.core.patch import Patch, Target
from sdops.core.spec import Spec
from sdops.core.stream import TORCH_DTYPES
from sdops.verbs._extract_difference import Difference, difference
from sdops.verbs._extract_pairs import Pair
from sdops.verbs._extract_store import Place, Store

MEMORY = 384 << 20  # bytes that the work on layers may hold at the same time, unless a single one needs more
BATCH = 16  # with a budget, so many layers do not know of each other: results must not depend on who is faster
USUAL_RANK = 32
HEADER = 400  # bytes of a file's header that name the three tensors of a layer, about


@dataclass(frozen=True, slots=True)
class Wish:
    """What the user wants to keep; see `extract`. At most one of the rules is given, none means the noise floor."""

    rank: int | None = None
    conv_rank: int | None = None
    te_rank: int | None = None
    energy: float | None = None
    ratio: float | None = None
    absolute: float | None = None
    quantile: float | None = None
    budget: int | None = None
    max_rank: int | None = None
    engine: Engine = "auto"
    dtype: str = "F16"
    seed: int = 0

    def fixed(self, pair: Pair) -> int | None:
        """The rank that was asked for layers of this kind."""
        special = {"conv": self.conv_rank, "te": self.te_rank}.get(pair.kind)
        return self.rank if special is None else special

    def looks_at_noise(self, pair: Pair) -> bool:
        """Whether the rank of this layer depends on rounding noise."""
        others = (self.fixed(pair), self.energy, self.ratio, self.absolute, self.quantile)
        return all(rule is None for rule in others)

    def rule(self, pair: Pair, change: Difference, floor: float) -> ranks.Rule:
        """How many singular values of a layer to keep.

        Args:
            pair: The layer.
            change: Its difference.
            floor: Singular values that are too small for the budget.
        """
        most = min(break_even(pair), self.max_rank or break_even(pair))
        cap = ranks.fixed(most)
        if (rank := self.fixed(pair)) is not None:
            return ranks.fixed(min(rank, most))
        if self.energy is not None:
            return ranks.lowest(ranks.energy(self.energy), cap)
        if self.ratio is not None:
            return ranks.lowest(ranks.ratio(self.ratio), cap)
        if self.absolute is not None:
            return ranks.lowest(ranks.absolute(self.absolute), cap)
        if self.quantile is not None:
            return ranks.quantile(self.quantile, most)
        noise = ranks.noise_floor(change.tuned_noise, change.tuned_noise + change.base_noise)
        if self.budget is not None:
            return ranks.lowest(noise, ranks.absolute(floor), ranks.fixed(min(most, break_even(pair) - 1)))
        return ranks.lowest(noise, cap)


def break_even(pair: Pair) -> int:
    """The lowest rank whose factors have as many numbers as the layer itself, or more."""
    rows, columns = pair.matrix
    return -(-rows * columns // (rows + columns))


@dataclass(frozen=True, slots=True)
class Layer:
    """What became of a layer.

    Attributes:
        pair: The layer.
        rank: 0 if it was left out.
        dense: Whether the change itself is kept, because factors would be larger.
        energy: ||tuned - base||_F^2.
        residual: The same of what the adapter does not hold, measured with the rounded factors.
        weight: ||base||_F^2.
        values: The singular values that are kept; none of a dense layer.
        places: Of `up` transposed and `down`, or of the change.
    """

    pair: Pair
    rank: int
    dense: bool
    energy: float
    residual: float
    weight: float
    values: tuple[float, ...] = ()
    places: tuple[Place, ...] = ()

    @property
    def captured(self) -> float:
        """Share of the energy that is kept."""
        return 1 - self.residual / self.energy if self.energy else 1.0

    @property
    def change(self) -> float:
        """||tuned - base|| / ||base||."""
        return math.sqrt(self.energy / self.weight) if self.weight else float(self.energy > 0)

    def cut(self, rank: int) -> Layer:
        """The layer with its leading values alone; what they leave out is orthogonal to them."""
        if rank >= self.rank or self.dense:
            return self
        lost = math.fsum(value**2 for value in self.values[rank:])
        return replace(self, rank=rank, residual=self.residual + lost, values=self.values[:rank])


def factorise(
    layers: Sequence[Pair], wish: Wish, store: Store, jobs: int, advance: Callable[[int], None]
) -> list[Layer]:
    """Factors of all layers, in the order given. The result does not depend on the number of threads.

    Args:
        layers: Weights.
        wish: What to keep.
        store: Receives the factors.
        jobs: Threads.
        advance: Called with the number of bytes just read.

    Raises:
        FormatError: a value is NaN or infinite.
    """
    torch.set_num_threads(1)  # our own threads share the cores
    memory = Memory(MEMORY)

    def work(pair: Pair, floor: float = 0.0) -> Layer:
        with memory.hold(_needed(pair, wish)):
            layer = _factorise(pair, wish, store, floor)
        advance(pair.nbytes)
        return layer

    with ThreadPoolExecutor(jobs) as pool:
        try:
            if wish.budget is None:
                order = sorted(range(len(layers)), key=lambda i: -layers[i].nbytes)  # the longest work first
                futures = {i: pool.submit(work, layers[i]) for i in order}
                return [futures[i].result() for i in range(len(layers))]
            return _within_budget(layers, wish, pool, work)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _within_budget(
    layers: Sequence[Pair], wish: Wish, pool: ThreadPoolExecutor, work: Callable[[Pair, float], Layer]
) -> list[Layer]:
    """Ranks by the budget for the whole model: parameters, as many as fit into the bytes."""
    room = max((wish.budget or 0) - HEADER * len(layers), 0)
    budget = ranks.Budget(room // TORCH_DTYPES[wish.dtype].itemsize)
    made: list[Layer] = []
    for begin in range(0, len(layers), BATCH):
        batch = layers[begin : begin + BATCH]
        done = list(pool.map(work, batch, [budget.floor(sum(pair.matrix)) for pair in batch]))
        for layer in done:
            budget.add(layer.values, sum(layer.pair.matrix))
        made += done
    return [layer.cut(rank) for layer, rank in zip(made, budget.ranks(), strict=True)]


def _needed(pair: Pair, wish: Wish) -> int:
    """Bytes that a layer's work holds."""
    rows, columns = pair.matrix
    numbers = rows * columns
    low = wish.fixed(pair) is not None and wish.engine in ("auto", "krylov")
    return 4 * numbers * (7 if wish.engine == "exact" else 1 if low else 2) + 24 * min(rows, columns) ** 2


def _factorise(pair: Pair, wish: Wish, store: Store, floor: float) -> Layer:
    change = difference(pair, noise=wish.looks_at_noise(pair))
    found = decompose(
        change.values,
        wish.rule(pair, change, floor),
        engine=wish.engine,
        guess=min(wish.fixed(pair) or USUAL_RANK, break_even(pair)),
        seed=wish.seed,
        name=str(pair.target),
    )
    energy = found.spectrum.energy
    if found.rank == 0:
        return Layer(pair, 0, False, energy, energy, change.weight)
    dtype = TORCH_DTYPES[wish.dtype]
    if found.rank >= break_even(pair):
        kept = change.values.to(dtype)
        place = store.put(kept)  # first: in float32 it is the change itself
        left = squared_norm(change.values.sub_(kept))
        return Layer(pair, found.rank, True, energy, left, change.weight, (), (place,))
    up, down = found.up.to(dtype), found.down.to(dtype)
    left = residual(change.values, up, down)
    places = store.put(up.T), store.put(down)
    return Layer(pair, found.rank, False, energy, left, change.weight, _values(found), places)


def _values(found: Factors) -> tuple[float, ...]:
    return tuple(found.spectrum.values[: found.rank].tolist())


def small(pairs: Iterable[Pair], wish: Wish, store: Store) -> list[Layer]:
    """Changes of norms and biases, as they are; those that are no more than rounding are left out."""
    made = []
    for pair in pairs:
        change = difference(pair)
        energy = squared_norm(change.values)
        if energy <= (change.tuned_noise + change.base_noise) * len(change.values):
            made.append(Layer(pair, 0, False, energy, energy, change.weight))
            continue
        kept = change.values.to(TORCH_DTYPES[wish.dtype])
        left = squared_norm(change.values - kept.float())
        made.append(Layer(pair, 1, True, energy, left, change.weight, (), (store.put(kept),)))
    return made


def patches(layers: Iterable[Layer], wish: Wish, store: Store) -> tuple[Patch, ...]:
    """Name the tensors of all layers that are kept, and say what they change."""
    made: list[Patch] = []
    dense: dict[Target, dict[str, str]] = {}
    for layer in layers:
        target, shape = layer.pair.target, layer.pair.shape
        if layer.rank and layer.dense:
            part = "diff" if layer.pair.part == "weight" else "diff_b"
            key = f"{target}.{part}"
            store.name_tensor(key, Spec(wish.dtype, shape), layer.places[0])
            if target not in dense:
                made.append(Patch(target, "full", dense.setdefault(target, {})))
            dense[target][part] = key
        elif layer.rank:
            made.append(Patch(target, "lora", _name_factors(layer, wish.dtype, store)))
    return tuple(made)


def _name_factors(layer: Layer, dtype: str, store: Store) -> dict[str, str]:
    """`up` [o, r], `down` [r, i]; of convolutions [o, r, 1, 1] and [r, i, kh, kw]; alpha = r, so the scale is 1."""
    target, shape, rank = layer.pair.target, layer.pair.shape, layer.rank
    up, down = layer.places
    store.name_tensor(f"{target}.up", Spec(dtype, (shape[0], rank, *[1] * len(shape[2:]))), up, transposed=True)
    store.name_tensor(f"{target}.down", Spec(dtype, (rank, *shape[1:])), down)
    alpha: Tensor = torch.tensor(float(rank))
    store.name_tensor(f"{target}.alpha", Spec("F32", ()), store.put(alpha))
    return {"up": f"{target}.up", "down": f"{target}.down", "lora_alpha": f"{target}.alpha"}
