"""Which singular values of an adapter's layers to keep, as the user asks for it. No torch until a rule is made."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from sdops.errors import UsageError

if TYPE_CHECKING:
    from sdops.core.ranks import Rule

RULES = ("rank", "energy", "frobenius", "ratio", "absolute", "quantile", "budget")  # of which one may be given
_SHARES = ("energy", "frobenius", "ratio", "quantile")


def checked(**given: float | None) -> dict[str, float]:
    """The wishes that were given.

    Raises:
        UsageError: two rules exclude each other, or a number is out of range.
    """
    wishes = {name: value for name, value in given.items() if value is not None}
    rules = [name for name in RULES if name in wishes]
    if len(rules) > 1:
        raise UsageError(f"`--{rules[0]}` and `--{rules[1]}` exclude each other", hint="give one rule for the ranks")
    for name, value in wishes.items():
        option = f"--{name.replace('_', '-')}"
        if name in _SHARES and not 0 <= value <= 1:
            raise UsageError(f"`{option}` is a share from 0 to 1, not {value:g}", hint=f"e.g. `{option} 0.9`")
        if "rank" in name and (value < 1 or value != int(value)):
            raise UsageError(f"`{option}` is a whole number from 1, not {value:g}", hint=f"e.g. `{option} 16`")
        if name in ("absolute", "budget") and not value >= 0:
            raise UsageError(f"`{option}` cannot be {value:g}", hint="it is a number from 0")
    return wishes


def rule_for(kind: str, wishes: Mapping[str, float]) -> Rule:
    """How many singular values of a layer to keep.

    Args:
        kind: `linear`, `conv` (larger than 1x1) or `te` (of a text encoder).
        wishes: As `checked` returns them. Without a rule, all values are kept that are not zero.
    """
    from sdops.core import ranks
    from sdops.verbs._adapter_changes import LOSSLESS

    special = {"conv": "conv_rank", "te": "te_rank"}.get(kind, "")
    limits = [int(wishes[name]) for name in ("max_rank",) if name in wishes]
    cap = [ranks.fixed(limit) for limit in limits]
    if special in wishes:
        return ranks.lowest(ranks.fixed(int(wishes[special])), LOSSLESS, *cap)
    if "quantile" in wishes:
        return ranks.quantile(wishes["quantile"], limits[0] if limits else None)
    makers: dict[str, Callable[[float], Rule]] = {
        "rank": lambda value: ranks.fixed(int(value)),
        "energy": ranks.energy,
        "frobenius": ranks.frobenius,
        "ratio": ranks.ratio,
        "absolute": ranks.absolute,
    }
    chosen = [make(wishes[name]) for name, make in makers.items() if name in wishes]
    return ranks.lowest(*chosen, LOSSLESS, *cap)


def words(wishes: Mapping[str, float]) -> str:
    """The rule as the command line spells it."""
    said = [f"{name.replace('_', '-')} {value:g}" for name, value in wishes.items()]
    return ", ".join(said) or "all that are not zero"
