"""From tensor names to patches: suffixes off, stems looked up, parts put together. Common to the dialects."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from sdops.core.patch import Patch, Target
from sdops.core.spec import Spec
from sdops.dialects._suffixes import SHARED, Split, split
from sdops.errors import FormatError

Settings = Mapping[str, float | int | bool | str]

_BUNDLE = re.compile(r"bundle_emb\.(?P<token>.+?)\.(?P<component>clip_l|clip_g|clip_h|t5xxl|string_to_param\.\*|.+)")

_WITH_ALPHA = ("lora", "lora_embedding", "loha", "lokr", "glora", "oft", "boft", "tlora")
# Family -> sets of parts of which each must be there in one of the ways given.
_NEEDED: Mapping[str, tuple[tuple[frozenset[str], ...], ...]] = {
    "lora": ((frozenset({"up"}),), (frozenset({"down"}),)),
    "loha": tuple((frozenset({part}),) for part in ("w1_a", "w1_b", "w2_a", "w2_b")),
    "lokr": tuple((frozenset({w}), frozenset({f"{w}_a", f"{w}_b"})) for w in ("w1", "w2")),
    "glora": tuple((frozenset({part}),) for part in ("a1", "a2", "b1", "b2")),
    "lora_embedding": ((frozenset({"a"}),), (frozenset({"b"}),)),
    "ia3": ((frozenset({"weight", "on_input"}), frozenset({"multiplier"})),),
    "oft": ((frozenset({"blocks"}), frozenset({"vectors"})),),
    "full": ((frozenset({"diff"}), frozenset({"diff_b"}), frozenset({"set"})),),
}


@dataclass(frozen=True, slots=True)
class Contents:
    """What is known of a file.

    Attributes:
        specs: Its tensors.
        metadata: Its header's text.
        config: `adapter_config.json` beside it, if there is one.
    """

    specs: Mapping[str, Spec]
    metadata: Mapping[str, str] = field(default_factory=dict)
    config: Mapping[str, Any] | None = None


@dataclass(slots=True)
class Reading:
    """What a file's names say.

    Attributes:
        patches: In the file's order.
        extras: Key -> what it is.
        unknown: Keys that are not understood.
        notes: Sentences for the user.
        problem: The first layer that is incomplete or there twice; for whoever settles that the names mean what they
            are taken to mean here.
    """

    patches: list[Patch] = field(default_factory=list)
    extras: dict[str, str] = field(default_factory=dict)
    unknown: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    problem: FormatError | None = None


def read_stems(
    specs: Mapping[str, Spec],
    stems: Mapping[str, Target],
    *,
    settings: Callable[[str], Settings] = lambda _stem: {},
    extra: Callable[[str], str | None] = lambda _key: None,
) -> Reading:
    """Patches of all keys whose stem is known.

    Args:
        specs: The file's tensors.
        stems: Stem -> what it changes.
        settings: Stem -> what is known of its patch besides tensors.
        extra: Key -> what it is, for keys that are no patches.

    Raises:
        FormatError: a file holds several PEFT adapters, or two tensors for one part of a layer.
    """
    reading = Reading()
    groups: dict[str, dict[str, Split]] = {}  # stem -> key -> its parts
    for key in specs:
        if (what := extra(key)) is not None:
            reading.extras[key] = what
            continue
        parts = split(key)
        if parts is None or parts.stem not in stems:
            reading.unknown.append(key)
        else:
            groups.setdefault(parts.stem, {})[key] = parts
    _check_one_adapter(groups.values())
    owners: dict[tuple[Target, str], str] = {}
    for stem, keys in groups.items():
        reading.problem = reading.problem or _with_magnitude(stem, keys.values())
        for family, names in _families(keys, specs, reading).items():
            before = owners.setdefault((stems[stem], family), stem)
            reading.problem = reading.problem or _incomplete(stem, family, names) or _twice(before, stem)
            reading.patches.append(Patch(stems[stem], family, names, settings(stem)))
    _note_repairs(groups.values(), reading)
    return reading


def _families(keys: Mapping[str, Split], specs: Mapping[str, Spec], reading: Reading) -> dict[str, dict[str, str]]:
    """The keys of one stem -> family -> part -> key. Keys that belong to none go to `unknown`."""
    found: dict[str, dict[str, str]] = {}
    own = [parts.family for parts in keys.values() if parts.family != SHARED]
    ia3 = any(parts.part == "on_input" for parts in keys.values())
    for key, parts in keys.items():
        family, part = parts.family, parts.part
        if family == SHARED:
            family = next((name for name in own if _may_have(name, part)), "")
        if family == "oft" and any(len(specs[k].shape) == 4 for k, p in keys.items() if p.part == "blocks"):
            family = "boft"
        if family in ("oft", "boft") and part == "lora_alpha":
            part = "constraint"
        if not family or (parts.part == "weight" and not ia3):
            reading.unknown.append(key)
        elif part in found.setdefault(family, {}):
            raise FormatError(
                f"`{found[family][part]}` and `{key}` are the same part of one layer",
                hint="two files seem to be mixed in this one; get it again from its author",
                keys=[found[family][part], key],
            )
        else:
            found[family][part] = key
    return found


def _may_have(family: str, part: str) -> bool:
    if part == "lora_alpha":
        return family in _WITH_ALPHA
    if part == "reshape":
        return family in ("lora", "full")
    return family in ("lora", "loha", "lokr")


def _incomplete(stem: str, family: str, parts: Mapping[str, str]) -> FormatError | None:
    """The error for a layer of which a part is missing."""
    for ways in _NEEDED.get(family, ()):
        if not any(way <= parts.keys() for way in ways):
            missing = " or ".join(" and ".join(f"`{part}`" for part in sorted(way)) for way in ways)
            there = ", ".join(f"`{key}`" for key in parts.values())
            return FormatError(
                f"`{stem}` is incomplete: {there} is there, its {missing} is not",
                hint="the file was not saved completely; get it again",
                stem=stem,
                family=family,
            )
    return None


def _with_magnitude(stem: str, parts: Iterable[Split]) -> FormatError | None:
    """The error for rotations with DoRA's magnitudes, of which there is no one meaning."""
    found = {(each.family, each.part) for each in parts}
    if not ({("oft", "vectors"), ("oft", "blocks")} & found and (SHARED, "dora_scale") in found):
        return None
    return FormatError(
        f"`{stem}` is OFT with DoRA (`dora_scale`), which no released program has: OneTrainer's pull request "
        "1335 is open, and the copies of it disagree on whether `dora_scale` is the size of the rows or a factor of it",
        hint="let the program that trained it write it into the model, and extract a LoRA: `sdops extract --base`",
        stem=stem,
    )


def _twice(before: str, stem: str) -> FormatError | None:
    """The error for two names of one layer."""
    if before == stem:
        return None
    return FormatError(
        f"`{before}` and `{stem}` are the same layer",
        hint="two files seem to be mixed in this one; get it again from its author",
        stems=[before, stem],
    )


def _check_one_adapter(groups: Iterable[Mapping[str, Split]]) -> None:
    adapters = sorted({parts.adapter for keys in groups for parts in keys.values() if parts.part in ("up", "down")})
    if len(adapters) > 1:
        shown = ", ".join(f"`{name or '(none)'}`" for name in adapters)
        raise FormatError(
            f"the file holds several adapters: {shown}",
            hint="save them one by one, e.g. with PEFT's `save_pretrained(selected_adapters=[...])`",
            adapters=adapters,
        )


def _note_repairs(groups: Iterable[Mapping[str, Split]], reading: Reading) -> None:
    repaired = [key for keys in groups for key, parts in keys.items() if parts.repaired]
    if repaired:
        reading.notes.append(
            f"{len(repaired)} names like `{repaired[0]}` come from a broken converter and were repaired"
        )


def bundled(key: str) -> str | None:
    """What a key of a bundled embedding is: `embedding COMPONENT TOKEN`."""
    found = _BUNDLE.fullmatch(key)
    return f"embedding {found['component']} {found['token']}" if found else None


def share_of(keys: Collection[str], fits: Callable[[str], object]) -> float:
    """Which share of the keys fits."""
    return sum(bool(fits(key)) for key in keys) / max(len(keys), 1)
