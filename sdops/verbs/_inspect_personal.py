"""Files that personalisation leaves behind and that are no models: hypernetworks, custom diffusion, embeddings."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

from sdops.archs.detect import UNKNOWN
from sdops.errors import SdopsError
from sdops.hub import located
from sdops.report import Report
from sdops.verbs._personal_files import verb_for

_KEPT = ("Metadata", "More metadata")  # sections of `inspect` that stay


def personal(path: Path) -> Report | None:
    """The report of the verb that knows such a file; None if none does.

    Raises:
        SdopsError: the file is damaged.
    """
    verb = verb_for(located(path))
    if not verb:
        return None
    found: Report = import_module(f"sdops.verbs._{verb}_inspect").inspect(path)  # numpy
    found.data = found.data["files"][0]
    if all(one["family"] == UNKNOWN for one in found.data.get("embeddings", [{"family": ""}])):
        return None  # one tensor of an odd width is a model in pieces rather than a word
    return found


def added(report: Report, path: Path) -> bool:
    """Put what such a verb knows of a file in place of the report's sections; False if none knows it.

    Raises:
        SdopsError: the file is damaged, and there is no report yet that could say so.
    """
    try:
        found = personal(path)
    except SdopsError as error:
        if not report.sections:
            raise
        report.warnings.append(error.message)
        found = None
    if found is None:
        return False
    report.data |= {"personal": {"verb": found.verb, **found.data}}
    metadata = [section for section in report.sections if section.heading in _KEPT]
    report.sections, report.result = [*found.sections, *metadata], found.result
    report.warnings += found.warnings
    return True
