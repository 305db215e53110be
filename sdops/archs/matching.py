"""Which tables fit a file: exactly, or nearly."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

from sdops.archs.tables import Need, Table, Variant, tables
from sdops.core.spec import Spec

MOST = 0.7  # share of a table's keys that must be there for a component to be recognised without its needs
_PACKED = frozenset({"U8", "I8", "F4"})  # quantised: the 2-D shape in the file says nothing of the weight's


@dataclass(frozen=True)
class Match:
    """A table recognised behind a prefix. `expected` and `optional` are full key names."""

    table: Table
    prefix: str
    variants: tuple[Variant, ...]
    expected: tuple[str, ...]
    optional: tuple[str, ...]
    roots: frozenset[str]  # first parts of the names, to tell foreign keys where there is no prefix
    evidence: tuple[str, ...]
    resized: bool = False

    def claims(self, key: str) -> bool:
        """Whether a key that the table does not list stands where the component's keys stand."""
        if not key.startswith(self.prefix):
            return False
        return bool(self.prefix) or not self.expected or key.split(".", 1)[0] in self.roots


def exact_matches(specs: Mapping[str, Spec]) -> list[Match]:
    """The tables whose needs all hold."""
    return _best(specs, _exact(specs))


def near_matches(specs: Mapping[str, Spec], taken: Iterable[Match]) -> list[Match]:
    """The tables of which most keys are there although a need does not hold, where nothing else was found."""
    return _best(specs, _near(specs, {_place(match) for match in taken}))


def _exact(specs: Mapping[str, Spec]) -> Iterable[Match]:
    for table in tables():
        if table.ends or (table.max_keys and len(specs) > table.max_keys):
            continue
        for prefix in table.prefixes:
            if _fits(specs, prefix, table):
                yield _match(specs, prefix, table)


def _near(specs: Mapping[str, Spec], taken: set[tuple[str, str]]) -> Iterable[Match]:
    for table in tables():
        if not table.keys:
            continue
        sample = table.plain_names[::8]  # saves looking up 2,000 names of every table that is not meant
        for prefix in table.prefixes:
            if _share(specs, [prefix + name for name in sample]) < MOST / 2:
                continue
            wrong = _wrong_sizes(specs, prefix, table.need)
            if wrong is None or any(_find(specs, prefix, Need(name, None)) for name in table.lack):
                continue
            match = _match(specs, prefix, table)
            if _share(specs, match.expected) >= MOST and _place(match) not in taken:
                yield replace(match, resized=wrong > 0)


def _match(specs: Mapping[str, Spec], prefix: str, table: Table) -> Match:
    variants = tuple(variant for variant in table.variants if _fits(specs, prefix, variant))
    names = table.expected(variants)
    return Match(
        table,
        prefix,
        variants,
        expected=tuple([prefix + name for name in names]),
        optional=tuple([prefix + name for name in table.optional_names()]),
        roots=frozenset(name.split(".", 1)[0] for name in names),
        evidence=tuple(_say(specs, prefix, need) for need in table.need),
    )


def _place(match: Match) -> tuple[str, str]:
    """There is one component per prefix and kind; text encoders may stand side by side."""
    table = match.table
    return match.prefix, table.name if table.kind == "text_encoder" else table.kind


def _best(specs: Mapping[str, Spec], matches: Iterable[Match]) -> list[Match]:
    """Of the tables that fit in one place, the one that explains the file best."""
    places: dict[tuple[str, str], list[Match]] = {}
    for match in matches:
        places.setdefault(_place(match), []).append(match)
    return [
        max(rivals, key=lambda match: _merit(specs, match)) if rivals[1:] else rivals[0] for rivals in places.values()
    ]


def _merit(specs: Mapping[str, Spec], match: Match) -> tuple[float, ...]:
    """Overlap of the table's keys with the file's (roughly), sizes that agree, hints that hold, overlap (exactly)."""
    expected = set(match.expected)
    there = sum(key in specs for key in match.expected)
    here = sum(key in expected or match.claims(key) for key in specs)
    overlap = there / (len(expected) + here - there) if expected else 0.0
    wrong = _wrong_sizes(specs, match.prefix, match.table.need)
    hints = sum(_find(specs, match.prefix, hint) is not None for hint in match.table.hint)
    return round(overlap, 1), -(wrong or 0), hints, overlap


def _share(specs: Mapping[str, Spec], keys: Sequence[str]) -> float:
    return sum(key in specs for key in keys) / len(keys)


# -------------------------------------------------------------------------------------------------- needs and shapes


def _fits(specs: Mapping[str, Spec], prefix: str, rule: Table | Variant) -> bool:
    """Whether everything that a table or variant asks for holds. Variants are told by sizes: no guessing there."""
    trust_packed = isinstance(rule, Table)

    def holds(need: Need) -> bool:
        return _find(specs, prefix, need, trust_packed) is not None

    if not all(map(holds, rule.need)) or any(holds(Need(name, None)) for name in rule.lack):
        return False
    return not isinstance(rule, Table) or not rule.one_of or any(map(holds, rule.one_of))


def _find(specs: Mapping[str, Spec], prefix: str, need: Need, trust_packed: bool = True) -> str | None:
    """The key that satisfies a need."""
    name = need.name[1:] if need.name.startswith("/") else prefix + need.name
    if "*" in name:
        head = name[: name.index("*")].partition("[")[0]  # a plain comparison first: most keys are not meant
        keys: Iterable[str] = [key for key in specs if key.startswith(head) and fnmatchcase(key, name)]
    else:
        keys = [name] if name in specs else []
    return next((key for key in keys if _has_shape(specs[key], need.shape, trust_packed)), None)


def _has_shape(spec: Spec, shape: tuple[int | None, ...] | None, trust_packed: bool = True) -> bool:
    """Whether the shape is as wanted; of a packed weight it cannot be known, then `trust_packed`."""
    if shape is None:
        return True
    if spec.dtype in _PACKED and len(shape) == 2:
        return trust_packed
    same_rank = len(spec.shape) == len(shape)
    return same_rank and all(want in (None, size) for want, size in zip(shape, spec.shape, strict=True))


def _wrong_sizes(specs: Mapping[str, Spec], prefix: str, needs: tuple[Need, ...]) -> int | None:
    """How many sizes of the needed keys that are there differ; None where even the number of dimensions does."""
    wrong = 0
    for need in needs:
        spec = specs.get(prefix + need.name)
        if spec is None or _has_shape(spec, need.shape) or need.shape is None:
            continue
        if len(spec.shape) != len(need.shape):
            return None
        wrong += sum(want not in (None, size) for want, size in zip(need.shape, spec.shape, strict=True))
    return wrong


def _say(specs: Mapping[str, Spec], prefix: str, need: Need) -> str:
    key = _find(specs, prefix, need)
    if key is not None:
        return f"`{key}` is {_brackets(specs[key].shape)}" if need.shape else f"`{key}` is there"
    name = prefix + need.name
    if name not in specs:
        return f"`{name}` is missing"
    return f"`{name}` is {_brackets(specs[name].shape)} where {_brackets(need.shape or ())} is usual"


def _brackets(shape: tuple[int | None, ...]) -> str:
    return f"[{','.join('*' if size is None else str(size) for size in shape)}]"
