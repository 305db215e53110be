"""Reads every tensor of a model file and says what is damaged."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdops import standin
from sdops.core.hashing import digests
from sdops.core.source import Source
from sdops.formats import FileSource, open_source
from sdops.report import Progress, Report, Section, silent
from sdops.text import count, shorten, size
from sdops.verbs._each import FilePath, each_file
from sdops.verbs._values import PositionIds, position_ids
from sdops.verbs.hash import OF_TENSORS, stored_hashes

if TYPE_CHECKING:
    from sdops.verbs._scan import Tally

_ROWS = 20  # of a table of findings; the JSON has all of them


def verify(*files: FilePath, progress: Progress = silent) -> Report:
    """Check structure, values and stored hashes of model files.

    Damage is: a structure that is not as the format says, NaN or infinite values, broken position ids, a stored
    hash that is not that of the tensors. Subnormal fp16 values and tensors of zeros are told, not blamed.

    Args:
        files: Paths.
        progress: Called as `progress(label, total_bytes)`.

    Raises:
        SdopsError: the only file cannot be read at all, or changes while it is read.
    """
    return each_file("verify", files, lambda file: _one(Path(file), progress))


def _one(path: Path, progress: Progress) -> Report:
    from sdops.verbs._scan import scan

    source = open_source(path)
    try:
        standin.prepare(source.files)
        tallies = scan(source, progress)
        ids = position_ids(source)
        stored = _stored(source, progress)
        source.check_unchanged()
        return _report(path, source, tallies, ids, stored)
    finally:
        source.close()


def _stored(source: FileSource, progress: Progress) -> dict[str, dict[str, Any]]:
    """Stored hashes of the tensors and their state; the file is hashed only if it holds any.

    The third, `sshs_legacy_hash`, depends on metadata that people edit: no sign of damage.
    """
    if len(source.files) != 1 or not any(key in source.metadata for key in OF_TENSORS):
        return {}
    (file,) = source.files
    found = stored_hashes(file, digests(file, progress, fresh=True))
    return {key: entry for key, entry in found.items() if key in OF_TENSORS}


def _report(
    path: Path,
    source: Source,
    tallies: dict[str, Tally],
    ids: list[PositionIds],
    stored: dict[str, dict[str, Any]],
) -> Report:
    damage = _damage(source, tallies, ids, stored)
    zero = [key for key, tally in tallies.items() if not (tally.top or tally.nan or tally.inf)]
    zero = [key for key in zero if source.specs[key].numel]
    total = sum(spec.nbytes for spec in source.specs.values())
    report = Report("verify", failed=bool(damage))
    report.data = {
        "file": str(path),
        "damaged": bool(damage),
        "damage": [f"{what}: {finding}" for what, finding in damage],
        "tensors": len(source.specs),
        "bytes": total,
        "all_zero": zero,
        "subnormal": sum(tally.subnormal for tally in tallies.values()),
        "position_ids": {found.key: found.state for found in ids},
        "stored_hashes": {key: entry["state"] for key, entry in stored.items()},
        "floats": {key: _facts(tally, source.specs[key].dtype) for key, tally in tallies.items()},
    }
    report.result = [f"{path}: {'damaged' if damage else 'ok'}"]
    report.sections = [Section(str(path), _summary(report.data, source))]
    if damage:
        more = [["", f"... and {len(damage) - _ROWS} more"]] if len(damage) > _ROWS else []
        rows = [[shorten(what, 80), finding] for what, finding in damage[:_ROWS]] + more
        report.sections.append(Section("Damage", rows, columns=("where", "what")))
    report.sections.append(Section("Tensors of zeros", [[key] for key in zero], ("tensor",), detail=True))
    report.warnings = [f"`{found.key}` in `{path.name}` is {found}" for found in ids if found.state == "float"]
    return report


def _damage(
    source: Source, tallies: dict[str, Tally], ids: list[PositionIds], stored: dict[str, dict[str, Any]]
) -> list[tuple[str, str]]:
    """What is wrong: where and what."""
    damage = []
    for key, tally in tallies.items():
        if tally.nan or tally.inf:
            parts = [f"{tally.nan:,} NaN"] * bool(tally.nan) + [f"{tally.inf:,} infinite"] * bool(tally.inf)
            damage.append((key, f"{' and '.join(parts)} of {source.specs[key].numel:,}"))
    damage += [(found.key, str(found)) for found in ids if found.state == "broken"]
    hashes = {"differs": "is not the hash of the tensors", "empty": "is the hash of nothing"}
    damage += [(key, hashes[entry["state"]]) for key, entry in stored.items() if entry["state"] in hashes]
    return damage


def _summary(data: dict[str, Any], source: Source) -> list[list[str]]:
    rows = [["state", "damaged" if data["damaged"] else "ok"]]
    rows.append(["read", f"{count(data['tensors'], 'tensor')}, {size(data['bytes'])}"])
    largest = max(data["floats"].items(), key=lambda item: item[1]["max_abs"], default=None)
    if largest:
        rows.append(["largest value", f"{largest[1]['max_abs']:.6g} in {shorten(largest[0], 80)}"])
    if data["subnormal"]:
        halves = sum(spec.numel for spec in source.specs.values() if spec.dtype == "F16")
        rows.append(["fp16 subnormals", f"{data['subnormal']:,} ({data['subnormal'] / halves:.2%})"])
    if data["all_zero"]:
        rows.append(["all zero", count(len(data["all_zero"]), "tensor")])
    rows += [["position ids", f"{state} ({shorten(key, 80)})"] for key, state in data["position_ids"].items()]
    rows += [[key, state] for key, state in data["stored_hashes"].items()]
    return rows


def _facts(tally: Tally, dtype: str) -> dict[str, float]:
    from sdops.verbs._scan import magnitude_value

    facts = {"max_abs": magnitude_value(tally.top, dtype), "nan": tally.nan, "inf": tally.inf}
    return facts | {"subnormal": tally.subnormal} if dtype == "F16" else facts
