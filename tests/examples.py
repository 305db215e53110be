"""Runs the examples in a module's docstring."""

from __future__ import annotations

from types import ModuleType

import sdops
from sdops.report import Report


def run(module: ModuleType) -> list[Report]:
    """All indented lines that call sdops, in the current folder."""
    lines = [line.strip() for line in (module.__doc__ or "").splitlines() if line.startswith("    sdops.")]
    found = [eval(line, {"sdops": sdops}) for line in lines]
    assert len(found) == len(module.__all__)
    assert all(isinstance(report, Report) and str(report) for report in found)
    return found
