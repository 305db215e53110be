"""Random numbers that depend on the seed, the tensor's name, the model and the element, and on nothing else.

Philox4x32-10 (Salmon et al., Parallel Random Numbers: As Easy as 1, 2, 3, 2011) turns a counter and a key
into four 32-bit words. Element `i` of a tensor takes word `i % 4` of counter `i // 4`, so any chunk of a
tensor can be filled on its own: chunk size, order, threads and device do not change a mask. Triton's
`tl.randint4x(key, counter)` gives the same words.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from sdops.core import native
from sdops.core.precision import Doubles

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

ROUNDS = 10
MULTIPLIERS = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
KEY_STEPS = 0x9E3779B9, 0xBB67AE85  # golden ratio, sqrt(3) - 1
LOW_32 = 0xFFFFFFFF

# Counters per call: the working set, some 1 MB, stays in the cache.
BLOCK = 16384


def philox(counter: NDArray[np.uint32], key: tuple[int, int]) -> tuple[NDArray[np.uint32], ...]:
    """Philox4x32-10: four counter words (4, n) and two key words give four random words, (n,) each."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(ROUNDS):
        # 32 x 32 -> 64-bit products, seen as pairs of words (low, high).
        first = np.multiply(c0, MULTIPLIERS[0], dtype=np.uint64).astype("<u8", copy=False).view("<u4")
        second = np.multiply(c2, MULTIPLIERS[1], dtype=np.uint64).astype("<u8", copy=False).view("<u4")
        c0, c2 = second[1::2] ^ c1, first[1::2] ^ c3
        c0 ^= np.uint32(k0)
        c2 ^= np.uint32(k1)
        c1, c3 = second[0::2], first[0::2]
        k0, k1 = (k0 + KEY_STEPS[0]) & LOW_32, (k1 + KEY_STEPS[1]) & LOW_32
    return c0, c1, c2, c3


@dataclass(frozen=True)
class Noise:
    """The random numbers of one tensor.

    Args:
        seed: The user's `--seed`.
        key: Name of the tensor.
        offset: Flat index, in the whole tensor, of the first element of the chunk at hand.
    """

    seed: int
    key: str
    offset: int = 0

    def at(self, offset: int) -> Noise:
        """The same tensor's numbers for the chunk that starts at flat index `offset`."""
        return replace(self, offset=offset)

    def uniform(self, model: int, like: Tensor, stream: int = 0) -> Tensor:
        """Uniform float32 in [0, 1), multiples of 2^-24, in the shape and on the device of `like`.

        Args:
            model: Index of the model; every model has numbers of its own.
            like: The chunk to fill: the elements offset .. offset + numel of the tensor in row-major order.
            stream: Tells apart several draws of one method for the same elements.
        """
        import torch

        flat = self.words(model, like.numel(), stream)
        flat >>= np.uint32(8)
        values = flat.astype(np.float32)
        values *= np.float32(2.0**-24)
        return torch.from_numpy(values).reshape(like.shape).to(like.device)

    def normal(self, model: int, like: Tensor, stream: int = 0) -> Tensor:
        """Standard normal float32 by Box and Muller in float64; arguments as in `uniform`.

        Words (0, 1) and (2, 3) of a counter make a pair each:
            r = sqrt(-2 ln((w0 + 1) / 2^32)),   t = 2 pi w1 / 2^32,   (r cos t, r sin t)
        """
        import torch

        start, lead = divmod(self.offset, 4)
        values = np.empty((-(-(lead + like.numel()) // 4), 4), dtype=np.float32)
        if not native.normal(key_words(self.seed, self.key, model, stream), start, values):
            words, _ = self._words(model, stream, like.numel())
            values = _box_muller(words.reshape(-1, 2)).reshape(-1, 4)
        return torch.from_numpy(values.reshape(-1)[lead : lead + like.numel()]).reshape(like.shape).to(like.device)

    def words(self, model: int, numel: int, stream: int = 0) -> NDArray[np.uint32]:
        """Random words for the `numel` elements from `offset` on, (numel,); needs no torch."""
        words, lead = self._words(model, stream, numel)
        return words.reshape(-1)[lead : lead + numel]

    def _words(self, model: int, stream: int, numel: int) -> tuple[NDArray[np.uint32], int]:
        """Words (groups, 4) of all counters that the chunk touches; position of its first element in them."""
        start, lead = divmod(self.offset, 4)
        groups = -(-(lead + numel) // 4)
        key = key_words(self.seed, self.key, model, stream)
        words = np.empty((groups, 4), dtype=np.uint32)
        if native.philox(key, start, words):
            return words, lead
        for done in range(0, groups, BLOCK):
            block = np.arange(start + done, start + min(done + BLOCK, groups), dtype=np.uint64)
            counter = np.zeros((4, len(block)), dtype=np.uint32)
            counter[0] = block & np.uint64(LOW_32)
            counter[1] = block >> np.uint64(32)
            for lane, values in enumerate(philox(counter, key)):
                words[done : done + BLOCK, lane] = values
        return words, lead


def key_words(seed: int, key: str, model: int, stream: int) -> tuple[int, int]:
    """Two 32-bit key words out of everything that a mask may depend on."""
    text = "\0".join((str(seed), str(model), str(stream), key))
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:8], "little")


def _box_muller(pairs: NDArray[np.uint32]) -> NDArray[np.float32]:
    """Pairs of words (n, 2) -> normal numbers (n, 2), by the single operations of exact.c.

    Libraries' logarithms, sines and cosines depend on the processor. log2 u = e + 2 / ln 2 artanh((m - 1) / (m + 1))
    for u = 2^e m with 1/2 <= m^2 < 2; the angle is some quarters of the circle and a rest of at most 45 degrees.
    """
    one, root_half = np.uint64(1023 << 52), np.uint64(0x3FE6A09E667F3BCD)
    bits = ((pairs[:, 0] + 1.0) * 2.0**-32).view(np.uint64)
    exponent = (bits + (one - root_half)) >> np.uint64(52)
    m = (bits - (exponent << np.uint64(52)) + one).view(np.float64)
    t = (m - 1) / (m + 1)
    artanh = t * (2 / math.log(2)) * _series(t * t, [1 / k for k in range(1, 14, 2)])
    radius = np.sqrt(-2 * math.log(2) * ((exponent.astype(np.float64) - 1023) + artanh))
    quarter = (pairs[:, 1] + np.uint32(1 << 29)) >> np.uint32(30)
    z = (pairs[:, 1] - (quarter << np.uint32(30))).view(np.int32) * (2 * math.pi / 2**32)
    sine = _series(z * z, [(-1) ** k / math.factorial(2 * k + 1) for k in range(7)]) * z
    cosine = _series(z * z, [(-1) ** k / math.factorial(2 * k) for k in range(8)])
    x, y = np.where(quarter & 1, sine, cosine), np.where(quarter & 1, cosine, sine)
    x, y = np.where((quarter + np.uint32(1)) & 2, -x, x), np.where(quarter & 2, -y, y)
    return np.stack([radius * x, radius * y], axis=1).astype(np.float32)


def _series(x: Doubles, factors: list[float]) -> Doubles:
    """sum_k factors[k] x^k."""
    total = np.full_like(x, factors[-1])
    for factor in reversed(factors[:-1]):
        total = total * x + factor
    return total
