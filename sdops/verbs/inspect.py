"""What a model file is and what is in it, from its header and a few small tensors. No torch, no numpy."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from sdops.archs.detect import UNKNOWN, Component, Detection, component_of, detect, with_adapter
from sdops.core.patch import Adapter
from sdops.core.source import Source
from sdops.errors import FormatError
from sdops.formats import FileSource, open_source
from sdops.hub import located
from sdops.report import Progress, Report, Section, silent
from sdops.text import count, shorten, size
from sdops.verbs._adapter_peek import is_adapter, open_adapter_file
from sdops.verbs._each import FilePath, each_file
from sdops.verbs._inspect_personal import added
from sdops.verbs._traits import is_detail, metadata_order, prediction, quantisation
from sdops.verbs._values import PositionIds, position_ids

_NAME = 120  # characters of a tensor's name or a metadata value that are shown
_METADATA = 30  # entries that are shown without `-v`
_PERSONAL = (UNKNOWN, "embedding", "hypernetwork")  # families of which other verbs tell more
_LISTED = 50  # missing, extra or unclaimed keys that are listed with `-v`; the JSON has all


def inspect(
    *files: FilePath, keys: bool = False, hashes: bool = False, norms: bool = False, progress: Progress = silent
) -> Report:
    """Architecture, components and their completeness, dtypes, junk, metadata and oddities of model files.

    Args:
        files: Paths of files or folders.
        keys: List every tensor.
        hashes: Add the hashes, for which the whole file is read once.
        norms: Of adapters: measure the change of every block, and look for the marks of a clamped extraction.
        progress: Called as `progress(label, total_bytes)` while hashing.

    Raises:
        SdopsError: the only file cannot be read.
    """
    return each_file("inspect", files, lambda file: _one(Path(file), keys, hashes, norms, progress))


def _one(path: Path, keys: bool, hashes: bool, norms: bool, progress: Progress) -> Report:
    if not is_adapter(path):
        return _told(path, None, keys, hashes, norms, progress)
    from sdops.verbs._inspect_adapter import opened

    with opened(path) as adapter:
        return _told(path, adapter, keys, hashes, norms, progress)


def _told(
    path: Path, adapter: Adapter | str | None, keys: bool, hashes: bool, norms: bool, progress: Progress
) -> Report:
    """The report; of what looks like an adapter with that, or with why it cannot be read as one."""
    try:
        source = open_source(path) if adapter is None else open_adapter_file(path)
    except FormatError:
        return _without_model(path)
    try:
        detection = detect(source.specs)
        if isinstance(adapter, Adapter):
            detection = _claimed(detection, source, adapter)
        report = _report(source, detection, position_ids(source))
    finally:
        source.close()
    if detection.family in _PERSONAL and added(report, path):
        adapter = None
    if isinstance(adapter, Adapter):
        from sdops.verbs._inspect_adapter import add_adapter

        add_adapter(report, adapter, norms=norms, progress=progress)
    elif adapter is not None:
        report.warnings.append(adapter)
    if keys:
        report.data["keys"] = _key_facts(source, detection)
        report.sections.append(_key_table(source, detection))
    if hashes:
        from sdops.verbs.hash import hash_files

        hashed = hash_files(path, progress=progress)
        report.data["hashes"] = hashed.data["files"]
        report.sections += hashed.sections
    return report


def _claimed(detection: Detection, source: Source, adapter: Adapter) -> Detection:
    """What is in the file, with all that the adapter's dialect understands counted as the adapter."""
    from sdops.verbs._inspect_adapter import understood

    return with_adapter(detection, source.specs, understood(adapter))


def _without_model(path: Path) -> Report:
    """The report on a file without named tensors: a hypernetwork, a bare vector, a picture with an embedding.

    Raises:
        FormatError: it is none of these.
    """
    report = Report("inspect", {"file": str(path), "bytes": os.path.getsize(located(path)), "architecture": UNKNOWN})
    if not added(report, path):
        open_source(path)  # says what is wrong with it
    return report


def _report(source: FileSource, detection: Detection, ids: list[PositionIds]) -> Report:
    data: dict[str, Any] = {
        "file": str(source.path),
        "bytes": sum(os.path.getsize(file) for file in source.files),
        "parts": len(source.files),
        "tensors": len(source.specs),
        "architecture": detection.family,
        "title": detection.title,
        "layout": detection.layout,
        "variants": list(detection.variants),
        "prediction": prediction(source, detection),
        "quantised": quantisation(source, detection),
        "components": [_component(part) for part in detection.components],
        "junk": {kind: {"keys": len(keys), "bytes": _nbytes(source, keys)} for kind, keys in detection.junk.items()},
        "markers": list(detection.markers),
        "unclaimed": list(detection.unclaimed),
        "position_ids": {
            found.key: {"state": found.state, "dtype": found.dtype, "wrong": found.wrong} for found in ids
        },
        "metadata": dict(source.metadata),
    }
    report = Report("inspect", data=data, warnings=_warnings(source, detection, ids))
    report.result = [f"{source.path}: {'/'.join([detection.family, *detection.variants])}"]
    report.sections = [
        Section(str(source.path), _summary(data, ids)),
        _component_table(detection.components),
        *_metadata(source),
        *_details(detection),
    ]
    return report


def _component(part: Component) -> dict[str, Any]:
    return {
        "name": part.name,
        "kind": part.kind,
        "architecture": part.family,
        "layout": part.layout,
        "prefix": part.prefix,
        "variants": list(part.variants),
        "keys": len(part.keys),
        "expected": part.expected,
        "missing": list(part.missing),
        "extra": list(part.extra),
        "dtypes": part.dtypes,
        "bytes": part.nbytes,
        "evidence": list(part.evidence),
    }


def _summary(data: dict[str, Any], ids: list[PositionIds]) -> list[list[str]]:
    """The name-value pairs at the top; only what there is."""
    parts = f" in {count(data['parts'], 'file')}" if data["parts"] > 1 else ""
    junk = ", ".join(f"{kind} {found['keys']:,} ({size(found['bytes'])})" for kind, found in data["junk"].items())
    rows = [
        ["architecture", UNKNOWN if data["architecture"] == UNKNOWN else f"{data['title']} ({data['architecture']})"],
        ["variants", ", ".join(data["variants"])],
        ["layout", "" if data["layout"] in ("any", UNKNOWN) else data["layout"]],
        ["size", f"{size(data['bytes'])}{parts}, {count(data['tensors'], 'tensor')}"],
        ["prediction", "; ".join(data["prediction"])],
        ["quantised", "; ".join(data["quantised"])],
        *(["position ids", f"{found} ({shorten(found.key, _NAME)})"] for found in ids),
        ["markers", ", ".join(shorten(key, _NAME) for key in data["markers"][:8])],
        ["junk", junk],
        ["unclaimed", count(len(data["unclaimed"]), "key") if data["unclaimed"] else ""],
    ]
    return [row for row in rows if row[1]]


def _component_table(parts: Iterable[Component]) -> Section:
    rows = []
    for part in parts:
        keys = f"{part.found:,} of {part.expected:,}" if part.expected else f"{len(part.keys):,}"
        missing = f"{len(part.missing):,}" if part.missing else ""
        extra = f"{len(part.extra):,}" if part.extra else ""
        rows.append([part.name, part.layout, keys, missing, extra, _dtypes(part), size(part.nbytes)])
    return Section("Components", rows, ("component", "layout", "keys>", "missing>", "extra>", "dtypes", "size>"))


def _dtypes(part: Component) -> str:
    """`F16`, or with several the number of tensors of each."""
    if len(part.dtypes) == 1:
        return next(iter(part.dtypes))
    ordered = sorted(part.dtypes.items(), key=lambda item: -item[1])
    return ", ".join(f"{dtype} {number:,}" for dtype, number in ordered)


def _metadata(source: Source) -> list[Section]:
    """Metadata in two sections: what people look for, and the many details that programs write."""
    order = sorted(source.metadata, key=metadata_order)
    first = [key for key in order if not is_detail(key)][:_METADATA]
    plain, more = (
        [[shorten(key, _NAME), shorten(source.metadata[key], _NAME)] for key in keys]
        for keys in (first, [key for key in order if key not in first])
    )
    if more:
        plain.append([f"{count(len(more), 'more entry')}, shown with `-v`"])
    return [Section("Metadata", plain), Section("More metadata", more, detail=True)]


def _details(detection: Detection) -> list[Section]:
    """Shown with `-v`: how the components were recognised and which keys are odd."""
    evidence = [[part.name, line] for part in detection.components for line in part.evidence]
    lists = {"Unclaimed keys": detection.unclaimed}
    for part in detection.components:
        lists[f"Missing keys of {part.name}"] = part.missing
        lists[f"Extra keys of {part.name}"] = part.extra
    sections = [Section("Evidence", evidence, detail=True)]
    for heading, keys in lists.items():
        rows = [[shorten(key, _NAME)] for key in keys[:_LISTED]]
        if len(keys) > _LISTED:
            rows.append([f"... and {len(keys) - _LISTED:,} more"])
        sections.append(Section(heading, rows, detail=True))
    return sections


def _warnings(source: FileSource, detection: Detection, ids: list[PositionIds]) -> list[str]:
    name = source.path.name
    found = list(source.warnings)
    found += [f"`{entry.key}` in `{name}` is {entry}" for entry in ids if entry.state != "ok"]
    lacking = [part for part in detection.components if part.missing]
    return found + [f"`{name}` lacks {count(len(part.missing), 'key')} of its {part.name}" for part in lacking]


def _key_facts(source: Source, detection: Detection) -> dict[str, Any]:
    return {
        key: {"dtype": spec.dtype, "shape": list(spec.shape), "component": component_of(detection, key)}
        for key, spec in source.specs.items()
    }


def _key_table(source: Source, detection: Detection) -> Section:
    rows = [
        [shorten(key), spec.dtype, "x".join(map(str, spec.shape)), size(spec.nbytes), component_of(detection, key)]
        for key, spec in source.specs.items()
    ]
    return Section("Keys", rows, ("key", "dtype", "shape", "size>", "component"))


def _nbytes(source: Source, keys: Iterable[str]) -> int:
    return sum(source.specs[key].nbytes for key in keys)
