"""The tables of this folder, read in either direction, by names alone.

    made_of("flux1", "transformer", "bfl", "diffusers", keys)   what a file with these keys becomes in another layout
    aliases("flux1", "transformer")                             module names of any layout -> the canonical layout's

A file holds `[[component]]` tables, each of which pairs two layouts of a component:

    name, layouts   the layouts left and right of the equals signs, called as in `archs/`; one alone is only listed
    canonical       the layout in which adapters are told; the left one if not given
    modules         equations between modules; they hold for `.weight` and `.bias`
    tensors         equations between whole keys
    ranges, parts   as in `archs/`: `{D}` counts from 0 to `ranges.D` - 1, `<part>` stands for `parts.part`
    flat            what some files leave out of the right names (`text_model.`): one more layout, called `RIGHT-flat`
    variant         tables `name`, `need`, `ranges`: these ranges instead, if any key of `need` is there
    like            "family/name/left layout": take over from that table what is not given here

`equations.py` tells how the lines are read. Of two lines about one tensor, the first that fits the keys holds.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

from sdops.core.toml_tables import read_toml
from sdops.errors import MismatchError
from sdops.layouts.equations import Equation, Part, Recipe, Share, parse

__all__ = ["Part", "Table", "aliases", "layouts", "made_of", "modules", "tables"]

FOLDER = Path(__file__).parent


@dataclass(frozen=True, slots=True)
class Variant:
    """A deviation from the table that holds it: other ranges."""

    name: str
    need: tuple[str, ...]
    ranges: dict[str, int]


@dataclass(frozen=True, eq=False)
class Table:
    """One `[[component]]`: a component in two layouts."""

    family: str
    name: str
    layouts: tuple[str, str]
    canonical: str
    modules: str = ""
    tensors: str = ""
    flat: str = ""
    strip: str = ""
    ranges: dict[str, int] = field(default_factory=dict)
    parts: dict[str, str] = field(default_factory=dict)
    variants: tuple[Variant, ...] = ()

    def equations(self, variant: str = "") -> list[Equation]:
        """All equations between tensors, in the order of the file."""
        ranges = dict(self.ranges)
        for each in self.variants:
            if each.name == variant:
                ranges |= each.ranges
        found = parse(self.tensors, ranges, self.parts)
        for module in parse(self.modules, ranges, self.parts):
            found += module.of(".weight"), module.of(".bias")
        if self.strip:
            found = [replace(each, right=tuple(n.removeprefix(self.strip) for n in each.right)) for each in found]
        return found

    def variant_of(self, keys: frozenset[str]) -> str:
        """The variant that has these keys."""
        return next((each.name for each in self.variants if not keys.isdisjoint(each.need)), "")


def made_of(
    family: str, component: str, source: str, target: str, keys: Iterable[str]
) -> Mapping[str, tuple[Part, ...]]:
    """What the tensors of one layout of a component become in another.

    Args:
        family: As in `archs/`. Text encoders and VAEs are found under any family.
        component: As in `archs/`.
        source: The layout that is read.
        target: The layout wanted.
        keys: The keys of the source, without prefix.

    Returns:
        Target key -> the parts that make it, one below the other along dim 0. A source key that is in no part is not
        known here, or lacks its companions (q without k and v): the caller compares.

    Raises:
        MismatchError: The shelf has no equations between these layouts.
    """
    present = frozenset(keys)
    table = _between(family, component, source, target)
    made: dict[str, tuple[Part, ...]] = {}
    used: set[tuple[str, Share | None]] = set()
    for name, parts in _recipes(table, source, table.variant_of(present)):
        rows = parts[0].key, parts[0].share
        if name not in made and rows not in used and all(part.key in present for part in parts):
            made[name] = parts
            used.add(rows)
    return made


def layouts(family: str, component: str) -> tuple[str, ...]:
    """All layouts of a component that the shelf knows, the canonical one first; none if it knows nothing of it."""
    rows = _of(family, component)
    return tuple(
        dict.fromkeys([table.canonical for table in rows] + [name for table in rows for name in table.layouts])
    )


@cache
def modules(family: str, component: str, variant: str = "") -> tuple[str, ...]:
    """The names of all modules with a weight, in the canonical layout, as `a.b.c` without `.weight`.

    Without `variant` those of all variants are given.
    """
    keys = [part.key for _, parts in _from_canonical(family, component, variant) for part in parts]
    return tuple(dict.fromkeys(key.removesuffix(".weight") for key in keys if key.endswith(".weight")))


@cache
def aliases(family: str, component: str, variant: str = "") -> Mapping[str, Part]:
    """Module names of all other layouts -> what they are in the canonical layout: module, share of its rows, operation.

    All names are without `.weight`. One may be the same in both layouts, or be another module in each (Wan's norms). A
    module that is fused in the other layout only (OpenCLIP's `in_proj`) has none. Without `variant` the names of all
    variants are given; the depth decides what `norm1_context.linear` in block 23 of SD3 means: see `3.5-large`.
    """
    found: dict[str, Part] = {}
    for name, parts in _from_canonical(family, component, variant):
        part, end = parts[0], ".weight"
        if len(parts) == 1 and name.endswith(end) and part.key.endswith(end):
            found.setdefault(name.removesuffix(end), part._replace(key=part.key.removesuffix(end)))
    return found


def _from_canonical(family: str, component: str, variant: str) -> list[Recipe]:
    """How the tensors of all other layouts are made of those of the canonical layout."""
    found: list[Recipe] = []
    for table in _of(family, component):
        if table.canonical in table.layouts:
            for each in [variant] if variant else ["", *(other.name for other in table.variants)]:
                found += _recipes(table, table.canonical, each)
    return found


def _between(family: str, component: str, source: str, target: str) -> Table:
    for table in _of(family, component):
        if table.layouts in ((source, target), (target, source)):
            return table
    known = " ".join(layouts(family, component)) or "none"
    raise MismatchError(
        f"no way from layout `{source}` to `{target}` for `{component}` of `{family}`",
        hint=f"layouts of it that can be converted: {known}",
        family=family,
        component=component,
    )


@cache
def _recipes(table: Table, source: str, variant: str) -> tuple[Recipe, ...]:
    forward = source == table.layouts[0]
    equations = table.equations(variant)
    return tuple(recipe for each in equations for recipe in (each.forward() if forward else each.backward()))


def forget() -> None:
    """Let go of all equations, some megabytes; they are made again when somebody asks."""
    for made in (modules, aliases, _recipes):
        made.cache_clear()


def _of(family: str, component: str) -> list[Table]:
    """The tables of a component: the family's own, else those that families share."""
    rows = [table for table in tables() if table.name == component]
    return [table for table in rows if table.family == family] or [
        table for table in rows if table.family in ("vae", "text_encoder")
    ]


@cache
def tables() -> tuple[Table, ...]:
    """Every table of every file, read once per process."""
    rows = [row for path in sorted(FOLDER.glob("*.toml")) for row in read(path)]
    by_name = {f"{row['family']}/{row['name']}/{row['layouts'][0]}": row for row in rows}
    built: list[Table] = []
    for row in rows:
        model = by_name[row["like"]] if "like" in row else {}
        table = _table(model | row | {"parts": model.get("parts", {}) | row["parts"]})
        built.append(table)
        if table.flat:
            built.append(replace(table, layouts=(table.layouts[0], f"{table.layouts[1]}-flat"), strip=table.flat))
    return tuple(built)


def read(path: Path) -> list[dict[str, Any]]:
    """The component tables of one file, each with its family and its parts."""
    document = read_toml(path)
    return [{"family": path.stem, "parts": document.get("parts", {})} | row for row in document["component"]]


def _table(row: dict[str, Any]) -> Table:
    fields = {name: value for name, value in row.items() if name != "like"}
    names = fields.pop("layouts")
    variants = tuple(Variant(each["name"], tuple(each["need"]), each["ranges"]) for each in fields.pop("variant", ()))
    fields = {"canonical": names[0]} | fields | {"layouts": (names[0], names[-1]), "variants": variants}
    return Table(**fields)
