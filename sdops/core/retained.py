"""How much of a merge survives rounding, estimated on the first elements of tensors, all of them or a fair choice.

Rounding swallows a small alpha: most weights of a bf16 model do not move at all when 1 % of a difference is added.
For a wanted change w of the first model and the change d that was written, <d, w> / <w, w> is 1 when nothing is lost
and 0 when nothing arrived. For one model's contribution w_i the other contributions are taken for granted:
1 + <d - w, w_i> / <w_i, w_i>. That makes sense where every model pulls towards itself (averages). Where one is
subtracted from another, single contributions are large and cancel; there only the change as a whole is measured.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping, Sequence
from fractions import Fraction
from hashlib import blake2b

import numpy as np

from sdops.core.plan import Step
from sdops.core.precision import Doubles, Raw, decode

SAMPLE = 4096  # elements per tensor
TENSORS = 500  # at most so many are looked at
WHOLE = -1  # stands for the change as a whole where others are model indices


class Retained:
    """Running sums of <d - w, w_i> and <w_i, w_i> over samples; safe to use from several threads.

    Args:
        keys: The tensors. Of many, those whose names have the lowest checksums are looked at: the same ones in every
            run, and neither weights nor biases, nor any block, more often than others.
    """

    def __init__(self, keys: Iterable[str]) -> None:
        ranked = sorted((blake2b(key.encode(errors="surrogateescape"), digest_size=8).digest(), key) for key in keys)
        self._keys = frozenset(key for _, key in ranked[:TENSORS])
        self._errors: dict[int, float] = {}
        self._squares: dict[int, float] = {}
        self._lock = threading.Lock()

    def wants(self, key: str) -> bool:
        """Whether the tensor is one of those that are looked at."""
        return key in self._keys

    def shares(self) -> dict[int, float]:
        """Model index, or WHOLE, -> share of the contribution that survived; what contributes nothing is left out."""
        return {i: 1 + self._errors[i] / square for i, square in sorted(self._squares.items()) if square}

    def tally(self) -> tuple[dict[int, float], dict[int, float]]:
        """The sums, to be added up in another process."""
        return self._errors, self._squares

    def add(self, tally: tuple[dict[int, float], dict[int, float]]) -> None:
        """Add the sums of another process."""
        with self._lock:
            for own, other in zip((self._errors, self._squares), tally, strict=True):
                for model, value in other.items():
                    own[model] = own.get(model, 0.0) + value

    def sample_linear(self, step: Step, raws: Sequence[Raw], weights: Mapping[int, Fraction], out: Raw) -> None:
        """Account for one tensor of sum_i c_i x_i.

        Args:
            step: Tells dtypes and which model each input is.
            raws: The inputs' leading elements.
            weights: Input index -> c_i.
            out: The written elements.
        """
        values = {i: decode(raws[i][:SAMPLE], step.inputs[i].spec.dtype) for i in {0, *weights}}
        change = decode(out[:SAMPLE], step.spec.dtype) - values[0]
        # sum_i c_i x_i - x_0 = sum_{i>0} c_i (x_i - x_0), if the c_i sum to 1
        if sum(weights.values()) == 1 and min(weights.values()) >= 0:
            wanted = {step.inputs[i].model: float(c) * (values[i] - values[0]) for i, c in weights.items() if i}
            self._add(wanted, change)
            if len(wanted) == 1:
                return
        total = np.sum([float(c) * values[i] for i, c in weights.items()], axis=0) - values[0]
        self._add({WHOLE: total}, change)

    def sample(self, first: Doubles, result: Doubles, out: Doubles) -> None:
        """Account for one tensor of a method that is not linear: the change as a whole."""
        self._add({WHOLE: result - first}, out - first)

    def _add(self, wanted: Mapping[int, Doubles], change: Doubles) -> None:
        error = change - np.sum(list(wanted.values()), axis=0)
        with self._lock:
            for model, contribution in wanted.items():
                self._errors[model] = self._errors.get(model, 0.0) + float(error @ contribution)
                self._squares[model] = self._squares.get(model, 0.0) + float(contribution @ contribution)
