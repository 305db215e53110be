"""The names that a template with braces stands for, as the tables of names on the shelves write them."""

from __future__ import annotations

import re
from collections.abc import Mapping


def alternatives(template: str, ranges: Mapping[str, int], width: int = 0) -> list[str]:
    """`a.{0-2}.{q,k}` -> a.0.q, a.0.k, a.1.q ...; `{D}` counts to `ranges["D"]` - 1; numbers have `width` digits."""
    names = [""]
    for index, piece in enumerate(re.split(r"[{}]", template)):  # odd pieces stood between braces
        choices = _choices(piece, ranges, width) if index % 2 else [piece]
        names = [name + choice for name in names for choice in choices]
    return names


def _choices(text: str, ranges: Mapping[str, int], width: int) -> list[str]:
    choices: list[str] = []
    for item in text.split(","):
        first, dash, last = item.partition("-")
        if item in ranges:
            choices += [str(number).zfill(width) for number in range(ranges[item])]
        elif dash and first.isdigit() and last.isdigit():
            choices += [str(number).zfill(width) for number in range(int(first), int(last) + 1)]
        else:
            choices.append(item.zfill(width) if item.isdigit() else item)
    return choices
