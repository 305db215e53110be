"""What a merge of LoRAs is asked to do, checked before any file is opened. No torch, no numpy."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sdops.card import find, method_name, names
from sdops.errors import UsageError
from sdops.text import count

METHODS = {
    "concat": "the sum of the LoRAs, exact: factors side by side, then without what is zero",
    "svd": "the sum, cut to --rank: the best approximation of that rank",
    "ties": "trim, elect signs, average, in the common directions of all (TIES)",
    "dare": "drop numbers at random and scale up the others, in the common directions of all (DARE)",
    "knots": "TIES on the aligned right factors (KnOTS)",
    "orthogonal": "every LoRA acts only on inputs that those before it do not react to",
}
DTYPES = ("keep", "fp32", "fp16", "bf16")
_CHECKPOINTS = "weighted-sum"  # the default for checkpoints; LoRAs are summed
_DENSITIES = {"ties": 0.2, "knots": 0.2, "dare": 0.5}
_KNOWN = ("base", "dtype", "seed", "weights", "blocks", "rank", "density", "to", "strip_training_metadata")


@dataclass(frozen=True, slots=True)
class Wish:
    """What is to be done; see `merge_adapters`. Weights and blocks have one entry per file."""

    method: str
    weights: tuple[float, ...]
    blocks: tuple[str, ...]
    rank: int | None
    density: float
    dtype: str
    seed: int


def request(method: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """Of the options of `merge`, those for LoRAs.

    Args:
        method: As the user named it.
        given: All options and knobs, also those that have their defaults.

    Raises:
        UsageError: an option was given that means nothing for LoRAs.
    """
    is_card = method_name(method) in names() and method not in METHODS
    defaults = {knob.name: knob.default for knob in find(method).knobs} if method_name(method) in names() else {}
    found: dict[str, Any] = {"method": method}
    for name, value in given.items():
        if value is None or value in ((), False, "error") or value == defaults.get(name, ...):
            continue
        if name == "density":
            found[name] = _number(name, value)
        elif name in _KNOWN:
            found[name] = value
        elif str(value) != str(defaults.get(name, ...)):
            option = f"--{name.replace('_', '-')}"
            hint = "`--weights 0.7,0.3` weighs LoRAs" if is_card else "`sdops merge --help` tells what is for LoRAs"
            raise UsageError(f"`{option}` is for checkpoints, not for LoRAs", hint=hint, option=name)
    return found


def _number(name: str, value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        raise UsageError(f"`{name}` is one number for LoRAs, not `{value}`", hint=f"e.g. `--{name} 0.5`") from None


def checked(
    number: int,
    method: str,
    weights: Sequence[float],
    blocks: Sequence[str],
    rank: int | None,
    density: float | None,
    dtype: str,
    seed: int,
) -> Wish:
    """The request for `number` files.

    Raises:
        UsageError: it makes no sense.
    """
    method = "concat" if method.replace("_", "-") == _CHECKPOINTS else method
    if method not in METHODS:
        raise UsageError(
            f"`{method}` is no way to merge LoRAs", hint=f"there are {', '.join(METHODS)}; concat is their plain sum"
        )
    if weights and len(weights) != number:
        raise UsageError(f"{count(len(weights), 'weight')} for {count(number, 'file')}", hint="give one for each file")
    if not all(math.isfinite(weight) for weight in weights):
        raise UsageError("a weight is not a finite number", hint="e.g. `--weights 0.7,-0.3`")
    if len(blocks) not in (0, 1, number):
        raise UsageError(
            f"`--blocks` is given {len(blocks)} times for {count(number, 'file')}",
            hint="once for all, or once for each",
        )
    if density is not None and not 0 < density <= 1:
        raise UsageError(f"`density` is a share above 0, up to 1, not {density:g}", hint="e.g. `--density 0.5`")
    if rank is not None and rank < 1:
        raise UsageError(f"`rank` must be at least 1, not {rank}", hint="e.g. `--rank 32`")
    if dtype not in DTYPES:
        raise UsageError(f"`dtype` cannot be `{dtype}`", hint=f"choose one of {', '.join(DTYPES)}")
    given = tuple(float(weight) for weight in weights) or (1.0,) * number
    dials = tuple(blocks) * number if len(blocks) == 1 else tuple(blocks) or ("",) * number
    return Wish(method, given, dials, rank, _DENSITIES.get(method, 1.0) if density is None else density, dtype, seed)
