"""What a conversion tells: every tensor of the input and of the output is accounted for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from sdops.report import Report, Section
from sdops.text import count, duration, size

if TYPE_CHECKING:
    from sdops.verbs._convert_checkpoint import Conversion

SHOWN = 3


def planned(conversion: Conversion) -> Report:
    """What is known without reading tensors."""
    draft, cast = conversion.draft, conversion.cast
    made = {key: entry.made for key, entry in draft.tensors.items() if key not in draft.invented}
    relaid = [key for key, each in made.items() if not each.is_whole and key not in cast]
    copied = [key for key in made if key not in cast and made[key].is_whole]
    report = Report("convert", result=[str(conversion.sink.path)])
    report.data = {
        "output": str(conversion.sink.path),
        "to": conversion.wish.to,
        "family": conversion.detection.family,
        "taken": dict(draft.taken),
        "tensors": {
            "copied": len(copied),
            "reshaped": len(relaid),
            "cast": len(cast),
            "set_aside": len(draft.aside),
            "returned": len(draft.returned),
            "dropped": len(draft.dropped),
            "invented": len(draft.invented),
        },
        "reshaped": relaid,
        "set_aside": list(draft.aside),
        "returned": draft.returned,
        "dropped": dict(draft.dropped),
        "invented": dict(draft.invented),
        "write_bytes": conversion.sink.nbytes,
        "exact_header": bool(draft.header),
    }
    report.sections = [Section(str(conversion.sink.path), _rows(conversion, len(copied), len(relaid)))]
    report.sections.append(_listed("Dropped", draft.dropped))
    report.sections.append(_listed("Set aside", {key: entry.component for key, entry in draft.aside.items()}))
    report.warnings = [*conversion.warnings, *draft.notes]
    return report


def done(conversion: Conversion, seconds: float, counts: Mapping[str, Any]) -> Report:
    """The same when the output is there, with what became of the values."""
    report = planned(conversion)
    overflow = {key: each.overflow for key, each in counts.items() if each.overflow}
    strange = {key: each.nan + each.infinite for key, each in counts.items() if each.nan or each.infinite}
    report.data |= {"seconds": round(seconds, 3), "overflows": overflow, "not_finite": strange}
    speed = conversion.sink.nbytes / max(seconds, 1e-9)
    report.sections[0].rows = [*report.sections[0].rows, ["time", f"{duration(seconds)}, {size(round(speed))}/s"]]
    if overflow:
        report.warnings.append(
            f"{count(sum(overflow.values()), 'value')} of {count(len(overflow), 'tensor')} were too large for the new "
            f"dtype and were clamped, first in `{next(iter(overflow))}`; `--dtype bf16` holds them"
        )
    if strange:
        report.warnings.append(
            f"NaN or infinity from before: {count(sum(strange.values()), 'value')} in {count(len(strange), 'tensor')}, "
            f"first in `{next(iter(strange))}`"
        )
    return report


def _rows(conversion: Conversion, copied: int, relaid: int) -> list[list[str]]:
    draft = conversion.draft
    rows = [
        ["from", f"{conversion.name}  ({conversion.detection.title})"],
        *(["taken", f"{component} of {donor}"] for component, donor in draft.taken.items()),
        ["copied", count(copied, "tensor")],
        ["reshaped", f"{count(relaid, 'tensor')}: split, joined, turned or in another shape; no number changes"],
        *_casts(conversion.cast),
        ["set aside", f"{count(len(draft.aside), 'tensor')} that the folder cannot hold, in sdops_extra.safetensors"],
        ["returned", f"{count(len(draft.returned), 'tensor')} from sdops_extra.safetensors"],
        *_grouped("dropped", draft.dropped),
        *_grouped("invented", draft.invented),
    ]
    empty = {"reshaped": relaid, "set aside": draft.aside, "returned": draft.returned}
    rows = [row for row in rows if row[0] not in empty or empty[row[0]]]
    if draft.header:
        rows.append(["header", "as it was, byte for byte"])
    written = draft.tensors.keys() | draft.invented.keys()
    return [*rows, ["size", f"{size(conversion.sink.nbytes)} in {count(len(written), 'tensor')}"]]


def _casts(cast: Mapping[str, tuple[str, str]]) -> list[list[str]]:
    """One line per pair of types."""
    return [["cast", f"{count(n, 'tensor')} from {old} to {new}"] for (old, new), n in Counter(cast.values()).items()]


def _grouped(label: str, reasons: Mapping[str, str]) -> list[list[str]]:
    """One line per reason, with the first names."""
    rows = []
    for why, number in Counter(reasons.values()).items():
        names = [key for key, reason in reasons.items() if reason == why]
        shown = ", ".join(names[:SHOWN]) + (", ..." if number > SHOWN else "")
        rows.append([label, f"{count(number, 'tensor')}, {why}: {shown}"])
    return rows


def _listed(heading: str, keys: Mapping[str, str]) -> Section:
    return Section(heading, [[key, why] for key, why in keys.items()], detail=True)
