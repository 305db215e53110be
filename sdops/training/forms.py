"""How a layer is changed: the family, its rank, and the shapes of its parts. No torch.

LoKr is w1 [a, c] (x) w2 [b, d k] for a weight [a b, c d, k], w2 in two factors where its rank saves numbers.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod, sqrt

DORA = "dora_scale"
# Family -> parts that begin as zeros, so that the whole changes nothing.
ZERO = {"lora": ("up",), "loha": ("w2_a",), "lokr": ("w2", "w2_a")}


@dataclass(frozen=True)
class Form:
    """How a layer is changed.

    Attributes:
        family: lora, loha or lokr.
        rank: Of it.
        lora_alpha: The change is scaled by this / rank, or / sqrt(rank).
        use_rslora: Whether the root is taken.
        dora: Whether lengths are learnt apart.
        dropout: Share of the inputs that the adapter does not see.
        factor: LoKr: largest size of the small factor.
    """

    family: str
    rank: int
    lora_alpha: float
    use_rslora: bool = False
    dora: bool = False
    dropout: float = 0.0
    factor: int = 8

    @property
    def scale(self) -> float:
        """alpha / r or alpha / sqrt(r)."""
        return self.lora_alpha / (sqrt(self.rank) if self.use_rslora else self.rank)

    def shapes(self, weight: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        """The parts of a layer whose weight has this shape, in order."""
        rows, columns, ones = weight[0], prod(weight[1:]), (1,) * (len(weight) - 2)
        rank = self.rank
        if self.family == "lora":
            found: dict[str, tuple[int, ...]] = {"up": (rows, rank, *ones), "down": (rank, *weight[1:])}
        elif self.family == "loha":
            found = {"w1_a": (rows, rank), "w1_b": (rank, columns), "w2_a": (rows, rank), "w2_b": (rank, columns)}
        else:
            a, c = _divisor(rows, self.factor), _divisor(weight[1], self.factor)
            saves = rank < max(rows // a, weight[1] // c) / 2
            large = {"w2_a": (rows // a, rank), "w2_b": (rank, columns // c)}
            found = {"w1": (a, c), **(large if saves else {"w2": (rows // a, columns // c)})}
        return found | ({DORA: (rows, 1, *ones)} if self.dora else {})


def _divisor(size: int, most: int) -> int:
    """The largest divisor up to `most`."""
    return next(number for number in range(min(most, size), 0, -1) if size % number == 0)
