"""The tables of this folder: read, checked for shape of content, and spelled out into key names.

A file describes one family (`others.toml`: several that are only named). Its `[[component]]` tables say

    name, kind    what it is: `unet`, `vae`, `clip_l` ...; model | control | vae | text_encoder | adapter | other
    layout        how its keys are spelled: ldm, sgm, bfl, sai, comfy, native, diffusers, hf, openclip
    prefixes      what may stand before its keys in a file; "" is the component alone
    need          lines `key` or `key [shape]` that must all hold (`*` = any size); `one_of`: at least one must hold.
                  A key may have wildcards as file names do; that costs a look at all keys, but survives a missing one
    lack          keys that must not be there; likewise
    hint          as `need`, but only breaks a tie between tables that fit equally well
    keys          templates of all keys, for completeness; without them a component is recognised by name only
    optional      templates of keys that may be there
    ends          the component is every key that ends so (adapters); `ends_too`: those beside them
    max_keys      only files with at most so many keys are considered
    flat          a part of the names that some files leave out (`text_model.`)
    slots, blocks the ordered merge slots, and lines `SLOT name...`: which names (and all below them) belong to it;
                  `@vae` stands for a whole other component
    values        purpose = key: what can only be told from values
    variant       tables `name`, `need`, `lack`, `with`, `without`, `ranges`, `loose` (more keys than listed are fine)
    like          "family/name/layout": take over from the first such table what is not given here

`[modelspec]` gives the architecture in the words of ModelSpec: by variant, and `default` for all others.

Templates: `{q,k,v}` and `{0-11}` list alternatives, `{D}` counts from 0 to `ranges.D` - 1, and `<part>` at the end of a
line stands for the lines of `parts.part`. In a slot name numbers have two digits, and slot and names run in step.
A name that begins with `/` is not prefixed. Nothing here is code: a family is added by adding a file.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any

from sdops.core.template import alternatives
from sdops.core.toml_tables import read_toml

FOLDER = Path(__file__).parent
FLAT = "-flat"  # ends the name of a layout that leaves out a part of the names
KINDS = ("model", "control", "adapter", "vae", "text_encoder", "other")  # what a file is called after, in this order


@dataclass(frozen=True, slots=True)
class Need:
    """A key that must be there, and its shape where that matters; None = any size."""

    name: str
    shape: tuple[int | None, ...] | None

    @classmethod
    def parse(cls, line: str) -> Need:
        """`conv_in.weight [320,*,3,3]` or just a name."""
        name, _, shape = line.partition(" ")
        if not shape:
            return cls(name, None)
        return cls(name, tuple(None if size == "*" else int(size) for size in shape.strip("[]").split(",")))


@dataclass(frozen=True)
class Variant:
    """A deviation from the table that holds it."""

    name: str
    need: tuple[Need, ...] = ()
    lack: tuple[str, ...] = ()
    added: str = ""
    removed: str = ""
    ranges: dict[str, int] = field(default_factory=dict)
    loose: bool = False


@dataclass(frozen=True, eq=False)
class Table:
    """One `[[component]]`, with what it takes over from its family filled in."""

    family: str
    title: str
    name: str
    kind: str
    layout: str
    prefixes: tuple[str, ...] = ("",)
    need: tuple[Need, ...] = ()
    one_of: tuple[Need, ...] = ()
    lack: tuple[str, ...] = ()
    hint: tuple[Need, ...] = ()
    keys: str = ""
    optional: str = ""
    ends: tuple[str, ...] = ()
    ends_too: tuple[str, ...] = ()
    max_keys: int = 0
    flat: str = ""
    strip: str = ""
    slots: str = ""
    blocks: str = ""
    values: dict[str, str] = field(default_factory=dict)
    ranges: dict[str, int] = field(default_factory=dict)
    parts: dict[str, str] = field(default_factory=dict)
    modelspec: dict[str, str] = field(default_factory=dict)
    variants: tuple[Variant, ...] = ()

    def expected(self, variants: tuple[Variant, ...] = ()) -> list[str]:
        """All key names, without prefix, of the component in these variants."""
        ranges = self.ranges_of(variants)
        removed = {name for variant in variants for name in self._spell(variant.removed, ranges)}
        added = [name for variant in variants for name in self._spell(variant.added, ranges)]
        return [name for name in self._spell(self.keys, ranges) if name not in removed] + added

    def ranges_of(self, variants: tuple[Variant, ...]) -> dict[str, int]:
        """How far the named ranges count in these variants."""
        ranges = dict(self.ranges)
        for variant in variants:
            ranges |= variant.ranges
        return ranges

    def optional_names(self) -> list[str]:
        """Key names that may be there."""
        return self._spell(self.optional, self.ranges)

    @cached_property
    def plain_names(self) -> list[str]:
        """`expected()` without variants, made once."""
        return self.expected()

    def _spell(self, templates: str, ranges: dict[str, int]) -> list[str]:
        names = expand(templates, ranges, self.parts)
        return [name.removeprefix(self.strip) for name in names] if self.strip else names


def expand(templates: str, ranges: dict[str, int], parts: dict[str, str]) -> list[str]:
    """The names that templates, one a line, stand for."""
    names: list[str] = []
    for line in templates.split():
        head, _, part = line.partition("<")
        if part:
            tails = expand(parts[part.removesuffix(">")], ranges, parts)
            names += [name + tail for name in alternatives(head, ranges) for tail in tails]
        else:
            names += alternatives(line, ranges)
    return names


@cache
def tables() -> tuple[Table, ...]:
    """Every component of every family, read once per process."""
    rows = [row for path in sorted(FOLDER.glob("*.toml")) for row in read(path)]
    by_name = {f"{row['family']}/{row['name']}/{row['layout']}": row for row in reversed(rows)}  # the first one stays
    built: list[Table] = []
    for row in rows:
        table = _table(_filled(row, by_name))
        built.append(table)
        if table.flat:
            built.append(_flattened(table))
    return tuple(built)


def read(path: Path) -> list[dict[str, Any]]:
    """The component tables of one file, each with the family's id, title, ranges and parts."""
    document = read_toml(path)
    shared = {"family": path.stem, "title": document["title"], "parts": document.get("parts", {})}
    shared["modelspec"] = document.get("modelspec", {})
    return [shared | component for component in document["component"]]


def _filled(row: dict[str, Any], by_name: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """A row with everything that it takes over from the row it is `like`."""
    if "like" not in row:
        return row
    model = _filled(by_name[row["like"]], by_name)
    own = {key: value for key, value in row.items() if key != "like"}
    return model | own | {"parts": model["parts"] | own["parts"]}


def _table(row: dict[str, Any]) -> Table:
    fields = dict(row)
    variants = tuple(_variant(variant) for variant in fields.pop("variant", ()))
    for name in ("need", "one_of", "hint"):
        fields[name] = tuple(map(Need.parse, fields.get(name, ())))
    for name in ("prefixes", "lack", "ends", "ends_too"):
        if name in fields:
            fields[name] = tuple(fields[name])
    return Table(variants=variants, **fields)


def _variant(row: dict[str, Any]) -> Variant:
    fields = dict(row)
    added, removed = fields.pop("with", ""), fields.pop("without", "")
    need, lack = tuple(map(Need.parse, fields.pop("need", ()))), tuple(fields.pop("lack", ()))
    return Variant(need=need, lack=lack, added=added, removed=removed, **fields)


def _flattened(table: Table) -> Table:
    """The same component, spelled without the part of its names that some files leave out."""

    def cut(needs: tuple[Need, ...]) -> tuple[Need, ...]:
        return tuple(Need(need.name.removeprefix(table.flat), need.shape) for need in needs)

    def cut_names(names: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(name.removeprefix(table.flat) for name in names)

    variants = [replace(each, need=cut(each.need), lack=cut_names(each.lack)) for each in table.variants]
    return replace(
        table,
        layout=table.layout + FLAT,
        need=cut(table.need),
        hint=cut(table.hint),
        lack=cut_names(table.lack),
        variants=tuple(variants),
        flat="",
        strip=table.flat,
    )
