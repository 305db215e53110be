"""The tensors of a component in another layout, and what is left over."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

from sdops.archs.junk import is_position_ids
from sdops.core.assembled import Made, joined, rows
from sdops.errors import MismatchError
from sdops.verbs._convert_select import Chosen

if TYPE_CHECKING:
    from sdops.layouts.tables import Part


@dataclass(frozen=True, slots=True)
class Laid:
    """A component in a layout.

    Attributes:
        tensors: Name without prefix -> how it is made.
        left: Names, in the layout that was read, that have no place in the new one.
        unknown: Those of `left` that nobody knows.
    """

    tensors: dict[str, Made]
    left: list[str]
    unknown: list[str]


def lay_out(chosen: Chosen, layout: str, drop: Sequence[str] = ()) -> Laid:
    """Spell a component in a layout.

    Args:
        chosen: The component.
        layout: As in archs; its own one changes nothing.
        drop: Patterns of names, in the new layout, that there is no place for.

    Raises:
        MismatchError: there is no way from the one to the other, or a tensor's shape does not allow it.
    """
    part = chosen.part
    if layout == part.layout:
        tensors = {name: rows(chosen.source, key) for name, key in chosen.read.items() if not _matches(name, drop)}
        whole: Collection[str] = tensors
    else:
        tensors, whole = _spelled(chosen, layout, drop)
    left = [name for name in chosen.read if name not in whole]
    extra = set(part.extra)
    unknown = [name for name in left if chosen.read[name] in extra or (part.expected is None and not drop)]
    return Laid(tensors, left, [name for name in unknown if not is_position_ids(name)])


def _spelled(chosen: Chosen, layout: str, drop: Sequence[str]) -> tuple[dict[str, Made], set[str]]:
    """The tensors in another layout, and which names of this one are used up."""
    from sdops.layouts.tables import made_of

    part = chosen.part
    recipes = made_of(part.family, part.name, part.layout, layout, chosen.read)
    recipes = {name: parts for name, parts in recipes.items() if not _matches(name, drop)}
    tensors = {
        name: joined([rows(chosen.source, chosen.read[each.key], each.share, each.operation) for each in parts])
        for name, parts in recipes.items()
    }
    return tensors, _whole(recipes.values())


def check_fit(old: Chosen, new: Chosen, donor: str) -> None:
    """Refuse a component of another file whose sizes are not those of the one it replaces.

    Raises:
        MismatchError: naming the first tensor that differs.
    """
    own, other = (lay_out(each, new.part.layout).tensors for each in (old, new))
    for name, made in other.items():
        if name in own and own[name].spec.shape != made.spec.shape:
            raise MismatchError(
                f"the {new.name} of `{donor}` does not fit: `{name}` is {list(made.spec.shape)} there, "
                f"{list(own[name].spec.shape)} in the model",
                hint=f"`sdops inspect {donor}` shows what it is for",
                key=name,
            )


def _whole(recipes: Iterable[tuple[Part, ...]]) -> set[str]:
    """The tensors of which all rows are read."""
    used: dict[str, int] = {}  # rows; shares of one tensor have one total
    totals: dict[str, int] = {}
    for part in (part for parts in recipes for part in parts):
        start, stop, total = part.share or (0, 1, 1)
        used[part.key] = used.get(part.key, 0) + stop - start
        totals[part.key] = total
    return {key for key, rows in used.items() if rows >= totals[key]}


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)
