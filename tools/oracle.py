"""The share of elements that a weighted sum of two fp16 models rounded wrongly, against exact arithmetic.

    python tools/oracle.py A B MERGED --alpha 0.3 [--elements N]

The exact result of an element is a + alpha (b - a), rounded once to fp16. What `alpha = 0.3` means is a matter of
definition: the float nearest to 0.3 (what sdops promises), the double nearest to it, or 0.3 itself. The models differ
by a few units in the last place, so that the results often lie at or beside a tie, where this matters. So `wrong`
counts for each of the three, and `wrong_for_all` those elements that are right by none of them.

The low bits of a product and of a sum of doubles are known exactly (Dekker, Numer. Math. 18, 1971), so that a result
exactly between two fp16 numbers is told from one that is near; some elements are redone in rational arithmetic.
"""

from __future__ import annotations

import argparse
import json
from fractions import Fraction
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np

SPLIT = float(2**27 + 1)
CHECKED = 2000  # elements per reading of alpha that rational arithmetic confirms


def rounded(a: np.ndarray, b: np.ndarray, alpha: Fraction) -> np.ndarray:
    """a + alpha (b - a) for fp16 arrays, exact and rounded once to nearest even."""
    coefficient = float(alpha)
    rest = float(alpha - Fraction(coefficient))  # what of alpha no double holds
    x, d = a.astype(np.float64), b.astype(np.float64) - a.astype(np.float64)  # the difference is exact
    high, low = _product(coefficient, d)
    total, error = _sum(x, high)
    error += low + rest * d
    near = total.astype(np.float16)
    offset = total - near.astype(np.float64)
    other = np.nextafter(near, np.where(offset > 0, np.inf, -np.inf).astype(np.float16))
    is_tie = (offset != 0) & (other.astype(np.float64) - total == offset) & np.isfinite(other)
    wanted = np.where(error > 0, np.maximum(near, other), np.minimum(near, other))
    return np.where(is_tie & (error != 0), wanted, near)


def _product(c: float, d: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """c d = high + low exactly (Dekker, with Veltkamp's splitting)."""
    high = c * d
    c1 = SPLIT * c - (SPLIT * c - c)
    d1 = SPLIT * d - (SPLIT * d - d)
    return high, ((c1 * d1 - high) + c1 * (d - d1) + (c - c1) * d1) + (c - c1) * (d - d1)


def _sum(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """a + b = total + error exactly (Knuth)."""
    total = a + b
    t = total - a
    return total, (a - (total - t)) + (b - t)


def check(a: np.ndarray, b: np.ndarray, alpha: Fraction, result: np.ndarray) -> None:
    """Redo some elements with fractions: no neighbour may be nearer, and of two equally near the even one is right.

    Raises:
        AssertionError: this program is wrong.
    """
    for x, y, z in zip(a[:CHECKED], b[:CHECKED], result[:CHECKED], strict=True):
        exact = Fraction(float(x)) + alpha * (Fraction(float(y)) - Fraction(float(x)))
        distance = abs(Fraction(float(z)) - exact)
        for side in (np.float16(np.inf), np.float16(-np.inf)):
            neighbour = np.nextafter(z, side)
            gap = abs(Fraction(float(neighbour)) - exact) if np.isfinite(neighbour) else distance + 1
            even = int(z.view(np.uint16)) % 2 == 0
            assert distance < gap or (distance == gap and even), (x, y, z)


def compare(paths: list[Path], alpha: str, elements: int) -> dict[str, Any]:
    """Count the wrong ones among about `elements` elements, taken from all tensors alike."""
    a, b, merged = (Tensors(path) for path in paths)
    keys = [key for key in a.halves if key in b.halves]
    strange = [key for key in keys if merged.halves.get(key) != a.halves[key]]
    readings = {
        "float32": Fraction(float(np.float32(alpha))),
        "double": Fraction(float(alpha)),
        "decimal": Fraction(alpha),
    }
    total, wrong, wrong_for_all = 0, dict.fromkeys(readings, 0), 0
    for key in [key for key in keys if key not in strange]:
        size = a.halves[key]
        count = min(size, max(elements // len(keys), 1))
        first = crc32(key.encode()) % (size - count + 1)
        x, y, z = (tensors.read(key, first, count) for tensors in (a, b, merged))
        differs = {}
        for name, reading in readings.items():
            result = rounded(x, y, reading)
            if total < CHECKED:
                check(x, y, reading, result)
            differs[name] = z != result
            wrong[name] += int(differs[name].sum())
        total += count
        wrong_for_all += int(np.all(list(differs.values()), axis=0).sum())
    return {"elements": total, "wrong": wrong, "wrong_for_all": wrong_for_all, "tensors_not_comparable": len(strange)}


class Tensors:
    """The fp16 tensors of a safetensors file. `halves`: name -> number of elements."""

    def __init__(self, path: Path) -> None:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        found = {key: info["data_offsets"] for key, info in header.items() if info["dtype"] == "F16"}
        self.path = path
        self.starts = {key: 8 + length + begin for key, (begin, _) in found.items()}
        self.halves = {key: (end - begin) // 2 for key, (begin, end) in found.items()}

    def read(self, key: str, first: int, count: int) -> np.ndarray:
        """Elements [first, first + count) of a tensor."""
        return np.fromfile(self.path, np.float16, count, offset=self.starts[key] + 2 * first)


def main() -> None:
    """The command line; prints one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs=3, metavar="FILE")
    parser.add_argument("--alpha", default="0.3")
    parser.add_argument("--elements", type=int, default=20_000_000)
    options = parser.parse_args()
    print(json.dumps(compare(options.files, options.alpha, options.elements)))


if __name__ == "__main__":
    main()
