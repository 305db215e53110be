"""Which pictures a step sees: a function of the seed and the number of the step, so that a run can go on anywhere.

An epoch has every sample once. Samples of one size are put in a random order and cut into batches; the last batch of a
size is filled with its first samples, so that every batch is full; the batches of all sizes are put in a random order.
No torch.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

Box = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Sample:
    """A picture as it is seen.

    Attributes:
        picture: Its number in the folder.
        box: Width and height that it is brought to.
        mirrored: Whether it is the mirror image.
    """

    picture: int
    box: Box
    mirrored: bool = False


@dataclass(frozen=True)
class Plan:
    """The order of all samples.

    Attributes:
        samples: Of one epoch.
        batch: Samples at a time, over all processes.
        seed: Decides the order.
    """

    samples: tuple[Sample, ...]
    batch: int
    seed: int

    @property
    def batches(self) -> int:
        """Number of batches in an epoch."""
        return len(self._epoch(0))

    def at(self, number: int) -> tuple[Sample, ...]:
        """The samples of batch `number`, counted from 0 over all epochs."""
        epoch, position = divmod(number, self.batches)
        return self._epoch(epoch)[position]

    def _epoch(self, epoch: int) -> Sequence[tuple[Sample, ...]]:
        return _epoch(self, epoch)


@lru_cache(maxsize=2)
def _epoch(plan: Plan, epoch: int) -> Sequence[tuple[Sample, ...]]:
    chance = random.Random(f"{plan.seed} {epoch}")  # noqa: S311 -- no secret
    groups: dict[Box, list[Sample]] = {}
    for sample in plan.samples:
        groups.setdefault(sample.box, []).append(sample)
    batches: list[tuple[Sample, ...]] = []
    for _, group in sorted(groups.items()):
        chance.shuffle(group)
        full = -(-len(group) // plan.batch) * plan.batch
        filled = [group[index % len(group)] for index in range(full)]
        batches += [tuple(filled[start : start + plan.batch]) for start in range(0, full, plan.batch)]
    chance.shuffle(batches)
    return batches


def varied(caption: str, chance: random.Random, *, dropout: float, shuffle: bool, keep: int) -> str:
    """A caption as one sample has it: left out, or its tags in another order.

    Args:
        caption: Tags between commas, or any text.
        chance: Where the dice come from.
        dropout: Share of samples without caption.
        shuffle: Whether tags change places.
        keep: So many stay in front.
    """
    if dropout and chance.random() < dropout:
        return ""
    if not shuffle:
        return caption
    tags = [tag.strip() for tag in caption.split(",")]
    rest = tags[keep:]
    chance.shuffle(rest)
    return ", ".join(tags[:keep] + rest)
