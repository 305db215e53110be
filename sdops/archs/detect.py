"""What a file is, told from its keys and shapes alone.

Every component (UNet, VAE, text encoder ...) is found by itself, wherever it stands in the file, by the tables of this
folder; the file is called after the most telling one. First come tables that fit exactly; if much is left over, tables
of which most keys are there (a damaged, cut or resized model); what then remains goes to the component under whose
prefix it stands, to the junk, or is reported as unclaimed. "unknown" is an answer; nothing here raises.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field, replace

from sdops.archs.junk import is_marker, is_position_ids, junk_kind
from sdops.archs.matching import Match, exact_matches, near_matches
from sdops.archs.quantised import Quantised, quantised
from sdops.archs.tables import KINDS, Table, tables
from sdops.core.spec import Spec

UNKNOWN = "unknown"
OTHER = "other"  # the component of keys that no component claims
MARKER = "marker"
_FEW = 16  # so many left-over keys are not worth a search for a damaged component
_EMA_KEYS = 100  # more keys of a moving average than this: the whole UNet is there twice


@dataclass(frozen=True)
class Component:
    """One part of a model, as found in a file.

    `keys` are all keys it claims, `missing` those its table expects in vain, `extra` those its table does not know.
    `expected` is None where only the name of a component is known; then `missing` and `extra` are empty.
    """

    name: str
    title: str
    kind: str
    family: str
    layout: str
    prefix: str
    variants: tuple[str, ...]
    keys: tuple[str, ...]
    expected: int | None
    missing: tuple[str, ...]
    extra: tuple[str, ...]
    dtypes: dict[str, int]  # dtype -> number of tensors
    nbytes: int
    evidence: tuple[str, ...]
    table: Table = field(repr=False)
    ranges: dict[str, int] = field(repr=False)

    @property
    def found(self) -> int:
        """How many of the expected keys are there."""
        return (self.expected or 0) - len(self.missing)

    @property
    def complete(self) -> bool | None:
        """Whether all expected keys are there; None where it is not known what to expect."""
        return None if self.expected is None else not self.missing


@dataclass(frozen=True, eq=False)  # compared by identity, so that what is worked out from it can be cached
class Detection:
    """What is in a file. `family` is a family's id or "unknown"; `layout` is that of the component it is called after.

    `needs_values` names keys whose values would tell more: `prediction` (SD2: v or epsilon), `zero_terminal_snr`
    (the last of `alphas_cumprod` is 0), `position_ids` (the first such key; `position_ids` has all).
    """

    family: str
    title: str
    layout: str
    variants: tuple[str, ...]
    components: tuple[Component, ...]
    unclaimed: tuple[str, ...]
    junk: dict[str, tuple[str, ...]]  # kind -> keys
    markers: tuple[str, ...]
    quantised: dict[str, Quantised]  # weight -> how it is stored
    position_ids: tuple[str, ...]
    needs_values: dict[str, str]  # purpose -> key
    owners: dict[str, str] = field(repr=False)  # key -> component name, kind of junk, or "marker"

    @property
    def main(self) -> Component | None:
        """The component that the file is called after."""
        return _main(self.components)

    @property
    def modelspec(self) -> str:
        """The architecture in the words of ModelSpec; empty if it has none or cannot be told."""
        words = self.main.table.modelspec if self.main else {}
        return next((words[name] for name in self.variants if name in words), words.get("default", ""))

    def component(self, name: str) -> Component | None:
        """The component of this name, if the file has it."""
        return next((part for part in self.components if part.name == name), None)


def component_of(detection: Detection, key: str) -> str:
    """The component a key belongs to; for junk its kind (`ema`, `schedule` ...), `marker`, else "other"."""
    return detection.owners.get(key, OTHER)


# What was asked last, and the answers; files of a recipe are of few kinds: models, and LoRAs in between.
_latest: deque[tuple[Mapping[str, Spec], Detection]] = deque(maxlen=2)


def detect(specs: Mapping[str, Spec]) -> Detection:
    """Recognise the components of a file from its keys, dtypes and shapes.

    The models of a merge, and the results of a recipe's steps, mostly have the same names and sizes: what was found
    last is the answer for them, too.
    """
    asked = dict(specs)
    for known, found in tuple(_latest):
        if known == asked and list(known) == list(asked):
            return found
    found = _detect(asked)
    _latest.append((asked, found))
    return found


def with_adapter(found: Detection, specs: Mapping[str, Spec], understood: AbstractSet[str]) -> Detection:
    """The same of a file that a reader of adapters opened: what it understood belongs to the adapter.

    Ends of names that models have, too, do not tell an adapter here: `.weight` of (IA)^3, `.up.weight` of XLabs.
    """
    if understood.isdisjoint(found.unclaimed):
        return found
    own = next((part for part in found.components if part.table.ends), None)
    table = own.table if own else next(table for table in tables() if table.ends)
    keys = [key for key in specs if component_of(found, key) == table.name]
    keys += [key for key in found.unclaimed if key in understood]
    adapter = _adapter(table, keys, specs, own.evidence if own else (f"`{keys[0]}` is there",))
    parts = (*(part for part in found.components if part is not own), adapter)
    main = _main(parts)
    return replace(
        found,
        family=main.family if main else UNKNOWN,
        title=main.title if main else found.title,
        layout=main.layout if main else UNKNOWN,
        components=parts,
        unclaimed=tuple(key for key in found.unclaimed if key not in understood),
        owners=found.owners | dict.fromkeys(keys, adapter.name),
    )


def _detect(specs: Mapping[str, Spec]) -> Detection:
    packed = quantised(specs)
    matches = exact_matches(specs)
    claims = _Claims(specs, matches, packed)
    if len(claims.unclaimed) > _FEW and (near := near_matches(specs, matches)):
        matches += near
        claims = _Claims(specs, matches, packed)
    parts = [_component(match, claims.keys[index], specs, claims) for index, match in enumerate(matches)]
    parts += [_adapter(table, keys, specs, _evidence(table, keys)) for table, keys in claims.adapters]
    return _detection(specs, tuple(part for part in parts if part.keys), claims, packed)


class _Claims:
    """Who gets which key.

    Attributes:
        keys: per match, the keys it claims, in the order of the file.
        sides: keys of scales and the like, which belong to their weight's component.
        adapters: adapter tables and the keys that end as theirs do.
        junk, markers, unclaimed: the rest.
    """

    def __init__(self, specs: Mapping[str, Spec], matches: list[Match], packed: dict[str, Quantised]) -> None:
        self.listed = self._listed(specs, matches)
        self.sides = {side: weight for weight, how in packed.items() for side in how.sides}
        self.by_prefix = sorted(enumerate(matches), key=lambda item: -len(item[1].prefix))
        self.keys: list[list[str]] = [[] for _ in matches]
        self.junk: dict[str, list[str]] = {}
        self.markers: list[str] = []
        self.unclaimed: list[str] = []
        for key in specs:
            self._place(key)
        self.adapters = self._take_adapters()

    @staticmethod
    def _listed(specs: Mapping[str, Spec], matches: list[Match]) -> dict[str, int]:
        """The match whose table lists the key; the first one, should there be two."""
        listed: dict[str, int] = {}
        for index, match in enumerate(matches):
            for key in (*match.expected, *match.optional):
                if key in specs:
                    listed.setdefault(key, index)
        return listed

    def _place(self, key: str) -> None:
        owner = self.listed.get(key)
        if owner is None and key in self.sides:
            owner = self._owner(self.sides[key])
        elif owner is None and is_marker(key):
            self.markers.append(key)
            return
        elif owner is None and (kind := junk_kind(key)):
            self.junk.setdefault(kind, []).append(key)
            return
        elif owner is None:
            owner = self._owner(key)
        (self.unclaimed if owner is None else self.keys[owner]).append(key)

    def _owner(self, key: str) -> int | None:
        """The match that lists the key, or else the one with the longest prefix under which it stands."""
        if key in self.listed:
            return self.listed[key]
        return next((index for index, match in self.by_prefix if match.claims(key)), None)

    def _take_adapters(self) -> list[tuple[Table, list[str]]]:
        """Take what ends as adapters do from what nobody claims."""
        taken: list[tuple[Table, list[str]]] = []
        for table in (table for table in tables() if table.ends):
            if any(key.endswith(table.ends) for key in self.unclaimed):
                ends = table.ends + table.ends_too
                taken.append((table, [key for key in self.unclaimed if key.endswith(ends)]))
                self.unclaimed = [key for key in self.unclaimed if not key.endswith(ends)]
        return taken


def _component(match: Match, keys: list[str], specs: Mapping[str, Spec], claims: _Claims) -> Component:
    table = match.table
    missing: tuple[str, ...] = ()
    extra: tuple[str, ...] = ()
    if match.expected:
        missing = tuple(key for key in match.expected if key not in specs)
        known = {*match.expected, *match.optional, *claims.sides}
        loose = any(variant.loose for variant in match.variants)
        extra = () if loose else tuple(key for key in keys if key not in known and not is_position_ids(key))
    return Component(
        table.name,
        table.title,
        table.kind,
        table.family,
        table.layout,
        match.prefix,
        variants=tuple(variant.name for variant in match.variants) + (("unusual-widths",) if match.resized else ()),
        keys=tuple(keys),
        expected=len(match.expected) if match.expected else None,
        missing=missing,
        extra=extra,
        dtypes=_dtypes(keys, specs),
        nbytes=sum(specs[key].nbytes for key in keys),
        evidence=match.evidence,
        table=table,
        ranges=table.ranges_of(match.variants),
    )


def _evidence(table: Table, keys: list[str]) -> tuple[str, ...]:
    return (f"`{next(key for key in keys if key.endswith(table.ends))}` is there",)


def _adapter(table: Table, keys: list[str], specs: Mapping[str, Spec], evidence: tuple[str, ...]) -> Component:
    return Component(
        table.name,
        table.title,
        table.kind,
        table.family,
        table.layout,
        prefix="",
        variants=(),
        keys=tuple(keys),
        expected=None,
        missing=(),
        extra=(),
        dtypes=_dtypes(keys, specs),
        nbytes=sum(specs[key].nbytes for key in keys),
        evidence=evidence,
        table=table,
        ranges={},
    )


def _dtypes(keys: Iterable[str], specs: Mapping[str, Spec]) -> dict[str, int]:
    return dict(Counter(specs[key].dtype for key in keys).most_common())


def _detection(
    specs: Mapping[str, Spec], parts: tuple[Component, ...], claims: _Claims, packed: dict[str, Quantised]
) -> Detection:
    main = _main(parts)
    owners = {key: kind for kind, keys in claims.junk.items() for key in keys}
    owners |= dict.fromkeys(claims.markers, MARKER) | {key: part.name for part in parts for key in part.keys}
    position_ids = tuple(key for key in specs if is_position_ids(key))
    return Detection(
        family=main.family if main else UNKNOWN,
        title=main.title if main else "Unknown",
        layout=main.layout if main else UNKNOWN,
        variants=(main.variants if main else ()) + _marks(claims.junk, packed),
        components=parts,
        unclaimed=tuple(claims.unclaimed),
        junk={kind: tuple(keys) for kind, keys in claims.junk.items()},
        markers=tuple(claims.markers),
        quantised=packed,
        position_ids=position_ids,
        needs_values=_needs_values(specs, main, position_ids),
        owners=owners,
    )


def _main(parts: tuple[Component, ...]) -> Component | None:
    return min(parts, key=lambda part: KINDS.index(part.kind), default=None)


def _marks(junk: dict[str, list[str]], packed: dict[str, Quantised]) -> tuple[str, ...]:
    """Variants that any family may have: a moving average, quantised weights."""
    ema = ("ema",) if len(junk.get("ema", ())) > _EMA_KEYS else ()
    return ema + tuple(sorted({how.kind for how in packed.values()}))


def _needs_values(specs: Mapping[str, Spec], main: Component | None, position_ids: tuple[str, ...]) -> dict[str, str]:
    wanted: dict[str, str] = {}
    if main:
        named = {purpose: main.prefix + name for purpose, name in main.table.values.items()}
        wanted |= {purpose: key for purpose, key in named.items() if key in specs}
    if "alphas_cumprod" in specs:
        wanted["zero_terminal_snr"] = "alphas_cumprod"
    if position_ids:
        wanted["position_ids"] = position_ids[0]
    return wanted
