"""Measure products of LoRA factors up @ down (core/product.py) on one core, beside the same by numpy's matrix library.

    python tools/bench_product.py --rounds 20

sdops adds up in float64, in one order on every processor; the library multiplies in float32, in an order of its own.
Factors and results fit the second-level cache, as they do where products are made. The best of all rounds counts.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from time import perf_counter

import numpy as np

from sdops.core import native
from sdops.core.blas import one_thread
from sdops.core.product import Product, Term, multiply

ELEMENTS = 1 << 15
RANKS, COLUMNS = (4, 16, 64, 128), (320, 1280, 5120)


def best(work: Callable[[], object], rounds: int) -> float:
    """Nanoseconds for each element."""
    found = float("inf")
    for _ in range(rounds):
        begin = perf_counter()
        for _ in range(8):
            work()
        found = min(found, perf_counter() - begin)
    return found / (8 * ELEMENTS) * 1e9


def measure(rank: int, columns: int, rounds: int) -> tuple[float, float]:
    """Nanoseconds an element by sdops, and by the library."""
    rng, rows = np.random.default_rng(0), -(-ELEMENTS // columns)
    up = rng.standard_normal((rows, rank)).astype(np.float32)
    down = rng.standard_normal((rank, columns)).astype(np.float32)
    product, out = Product(columns, lambda *_: [Term(0, up, down)]), np.empty((rows, columns), np.float32)
    own = best(lambda: multiply(product, 0, out.reshape(-1)[:ELEMENTS]), rounds)
    return own, best(lambda: np.matmul(up, down, out=out), rounds)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    options = parser.parse_args()
    print("compiled" if native.library() else "numpy")
    with one_thread():
        for rank in RANKS:
            for columns in COLUMNS:
                own, other = measure(rank, columns, options.rounds)
                print(f"rank {rank:3}, {columns:4} columns: {own:.2f} ns an element, {own / other:.1f} x the library")


if __name__ == "__main__":
    main()
