"""Files that personalisation leaves behind and that are no models: hypernetworks, custom diffusion, embeddings."""

from __future__ import annotations

from pathlib import Path

from sdops.archs.detect import UNKNOWN
from sdops.errors import SdopsError
from sdops.report import Report

_KEPT = ("Metadata", "More metadata")  # sections of `inspect` that stay


def personal(path: Path) -> Report | None:
    """The report of the verb that knows such a file; None if none does."""
    from sdops.verbs import _custom_inspect, _embed_inspect, _hypernet_inspect

    for look in (_hypernet_inspect.inspect, _custom_inspect.inspect, _embed_inspect.inspect):
        try:
            found = look(path)
        except SdopsError:
            continue
        found.data = found.data["files"][0]
        if not all(one["family"] == UNKNOWN for one in found.data.get("embeddings", [{"family": ""}])):
            return found  # one tensor of an odd width is a model in pieces rather than a word
    return None


def added(report: Report, path: Path) -> bool:
    """Put what such a verb knows of a file in place of the report's sections; False if none knows it."""
    found = personal(path)
    if found is None:
        return False
    report.data |= {"personal": {"verb": found.verb, **found.data}}
    metadata = [section for section in report.sections if section.heading in _KEPT]
    report.sections, report.result = [*found.sections, *metadata], found.result
    report.warnings += found.warnings
    return True
