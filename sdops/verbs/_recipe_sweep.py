"""Sweeps: a recipe built for every combination of some parameters' values.

alpha=0.1:0.9:0.1        from 0.1 to 0.9 in steps of 0.1, both ends included
alpha=0.1,0.5,0.9        these
alpha=0.1  alpha=0.5     the same, one after the other; the way for texts with commas
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from decimal import Decimal
from itertools import product
from math import prod

from sdops.errors import UsageError
from sdops.verbs._recipe_check import Checked, check_recipe
from sdops.verbs._recipe_text import Parameter, Recipe, Scalar, read_value, wrong

MOST_CELLS = 1000

_NUMBER = r"\s*([+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)\s*"
_RANGE = re.compile(rf"{_NUMBER}:{_NUMBER}:{_NUMBER}")


def read_settings(recipe: Recipe, words: Sequence[str]) -> dict[str, object]:
    """`NAME=VALUE` texts as values of the parameters' types; a list where there are several.

    Raises:
        UsageError: a text has no `=`, or its value is of another type than the parameter.
    """
    found: dict[str, list[object]] = {}
    ranges: set[str] = set()  # one value of which is a sweep, too
    for word in words:
        name, equals, text = word.partition("=")
        if not equals:
            raise UsageError(f"`--set {word}` sets nothing", hint="`--set NAME=VALUE`")
        name = name.strip().replace("-", "_")
        one = recipe.parameters.get(name)
        found.setdefault(name, []).extend([text] if one is None else _values(one, text))
        ranges |= {name} if one is not None and _is_number(one) and ":" in text else set()
    return {name: values[0] if len(values) == 1 and name not in ranges else values for name, values in found.items()}


def _is_number(one: Parameter) -> bool:
    return isinstance(one.default, int | float) and not isinstance(one.default, bool)


def _values(one: Parameter, text: str) -> Iterator[Scalar]:
    """The values that a text stands for."""
    if _is_number(one) and ":" in text:
        yield from (read_value(one, number) for number in _steps(one, text))
    elif _is_number(one) or one.choices:
        yield from (read_value(one, part) for part in text.split(","))
    else:
        yield read_value(one, text)


def _steps(one: Parameter, text: str) -> Iterator[str]:
    """Decimal numbers, so that 0.1:0.9:0.1 ends with 0.9."""
    path = f"parameters.{one.name}"
    span = _RANGE.fullmatch(text)
    if span is None:
        raise wrong(path, f"`{text}` is no range", "FIRST:LAST:STEP, e.g. 0.1:0.9:0.1")
    try:
        start, end, by = map(Decimal, span.groups())
        number = int((end - start) / by) if by else -1
    except ArithmeticError:  # thousands of digits
        number = -1
    if number < 0 or (end - start) * by < 0:
        raise wrong(path, f"`{text}` never ends", "a step that leads from the first to the last, e.g. 0.1:0.9:0.1")
    if number > MOST_CELLS:
        raise wrong(path, f"`{text}` has too many values", f"at most {MOST_CELLS:,}")
    yield from (f"{(start + by * i).normalize():f}" for i in range(number + 1))


def cells(recipe: Recipe, settings: Mapping[str, object]) -> list[tuple[dict[str, Scalar], Checked]]:
    """All combinations, the last parameter changing first, and the recipe with each.

    Raises:
        UsageError: a value does not fit, there are too many, or a step asks for an output of its own.
    """
    lists = {
        name: list(dict.fromkeys(value)) if isinstance(value, list | tuple) else [value]
        for name, value in settings.items()
    }
    number = prod(len(values) for values in lists.values())
    if number > MOST_CELLS:
        raise UsageError(f"{number:,} combinations are too many", hint=f"at most {MOST_CELLS:,}")
    asked = next((step for step in recipe.steps if "output" in step.arguments), None)
    if asked is not None:
        raise wrong(f"{asked.path}.output", "names one file, but a sweep makes many", "leave `output` out for sweeps")
    found = []
    for values in product(*lists.values()):
        one = dict(zip(lists, values, strict=True))
        checked = check_recipe(recipe, one)
        found.append(({name: checked.values[name] for name in one}, checked))
    return found
