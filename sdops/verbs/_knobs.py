"""A method's knobs as the user gave them: known names, dials read, numbers in their ranges."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from sdops.archs.blocks import block_slots
from sdops.archs.detect import Detection
from sdops.card import Card, Knob
from sdops.core.dial import parse_dial
from sdops.errors import UsageError
from sdops.text import suggest


def check_knobs(card: Card, knobs: Mapping[str, Any]) -> None:
    """Refuse knobs that the method does not have.

    Raises:
        UsageError: with a suggestion.
    """
    known = {knob.name for knob in card.knobs}
    for name in knobs:
        if name not in known:
            guess = suggest(name, known)
            raise UsageError(
                f"`{card.name.replace('_', '-')}` has no knob `{name}`"
                + (f"; did you mean `{guess}`?" if guess else ""),
                hint=f"`sdops methods {card.name.replace('_', '-')}` explains its knobs",
                method=card.name,
                knob=name,
            )


def parse_knobs(card: Card, knobs: Mapping[str, Any], first: Detection, models: int) -> dict[str, Any]:
    """All knobs of the method with defaults filled in; float ones as dials.

    Args:
        card: The method.
        knobs: What the user gave.
        first: The first model, whose blocks and components dials name.
        models: How many there are, the base not counted.

    Raises:
        UsageError: a value cannot be read, is outside its knob's range, or there is not one per model.
    """
    slots = block_slots(first)
    components = [component.name for component in first.components]
    parsed: dict[str, Any] = {}
    for knob in card.knobs:
        value = knobs.get(knob.name, knob.default)
        if knob.type == "float":
            value = parse_dial(value, knob=knob.name, default=knob.default, slots=slots, components=components)
            _check_range(knob, [value.default, *value.blocks.values(), *(rule.value for rule in value.rules)])
        elif knob.type == "floats":
            value = tuple(float(v) for v in value)
            _check_range(knob, value)
            _check_count(knob, value, models)
        elif knob.type == "int":
            _check_range(knob, [value])
        elif knob.choices and value not in knob.choices:
            raise UsageError(f"`{knob.name}` cannot be `{value}`", hint=f"choose one of {', '.join(knob.choices)}")
        parsed[knob.name] = value
    return parsed


def _check_range(knob: Knob, values: Iterable[float]) -> None:
    low, between, high = knob.range.partition(" to ")
    wanted = f"between {low} and {high}" if between else knob.range
    for value in values:
        if not knob.allows(value):
            hint = f"choose `{knob.name}` {wanted}"
            raise UsageError(f"`{knob.name}` is {value:g}", hint=hint, knob=knob.name, value=value)


def _check_count(knob: Knob, values: tuple[float, ...], models: int) -> None:
    if values and len(values) != models:
        raise UsageError(
            f"`{knob.name}` has {len(values)} numbers for {models} models",
            hint="give one number per model in the order of the files; the base has none",
            knob=knob.name,
        )
