"""What every verb returns: one object with a face for people, one for scripts and one for pipes.

    str(report)           the human text, as the command line shows it
    report.as_dict()      plain values, what `--json` prints
    report.result         one line per thing made or looked at, what `--quiet` prints

Names that come out of files may hold anything. They are kept verbatim in `data` and escaped in every text.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any
from unicodedata import east_asian_width

from sdops.standin import shown

SCHEMA = 1  # of as_dict(); raised when a field changes its meaning or goes away

Style = Callable[[str, str], str]  # (kind, text) -> text; kinds: heading, dim, heat0 ... heat4
HEAT = "·░▒▓█"  # shades of a heat map, coldest first

# progress(label, total_bytes) is a context that gives `advance(nbytes)`, to be called from any thread.
Progress = Callable[[str, int], AbstractContextManager[Callable[[int], None]]]


@contextmanager
def silent(label: str, total: int) -> Iterator[Callable[[int], None]]:
    """The progress of callers who want none."""
    del label, total
    yield _ignore


def _ignore(nbytes: int) -> None:
    del nbytes


def plain(kind: str, text: str) -> str:
    """The style of texts without colour."""
    del kind
    return text


@dataclass(slots=True)
class Section:
    """A table, or with no `columns` a list of name-value pairs or lines.

    Attributes:
        heading: Printed above; empty for none.
        columns: Column titles; those that end in `>` are aligned right.
        rows: Cells; fewer cells than columns are fine.
        detail: Shown only when asked for more (`-v`).
        heat: Runs of HEAT characters are shades of a heat map; styled `heat0` (coldest) to `heat4`.
    """

    heading: str
    rows: Sequence[Sequence[str]]
    columns: Sequence[str] = ()
    detail: bool = False
    heat: bool = False


@dataclass(slots=True)
class Report:
    """The outcome of a verb.

    Attributes:
        verb: Name of the verb, which is also the command's.
        data: Facts in plain values, ready for JSON.
        sections: The human text.
        result: The quiet text: paths, names, digests; one a line.
        warnings: What the user should know, one sentence each, without a full stop.
        hints: Commands to type next.
        failed: Whether what was looked at is not in order (`verify` found damage): exit code 1.
    """

    verb: str
    data: dict[str, Any] = field(default_factory=dict)
    sections: list[Section] = field(default_factory=list)
    result: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    hints: list[str] = field(default_factory=list)
    failed: bool = False

    def as_dict(self) -> dict[str, Any]:
        """Schema number, verb, the data and the warnings."""
        found: dict[str, Any] = _shown({"schema": SCHEMA, "verb": self.verb, **self.data, "warnings": self.warnings})
        return found

    def text(self, *, detail: bool = False, style: Style = plain) -> str:
        """The sections as text, without a line break at the end."""
        wanted = [section for section in self.sections if section.rows and (detail or not section.detail)]
        return "\n\n".join("\n".join(_lines(section, style)) for section in wanted)

    def __str__(self) -> str:
        return "\n".join([self.text(), *(f"warning: {printable(text)}" for text in self.warnings)])


def joined(verb: str, reports: Iterable[Report]) -> Report:
    """Reports on one file each as one report; `data["files"]` lists theirs, also when there is only one."""
    whole = Report(verb, {"files": []})
    for part in reports:
        whole.data["files"].append(part.data)
        whole.sections += part.sections
        whole.result += part.result
        whole.warnings += part.warnings
        whole.hints += [hint for hint in part.hints if hint not in whole.hints]
        whole.failed |= part.failed
    return whole


def printable(text: str) -> str:
    """`text` with whatever could move the cursor, change colour or reorder the line written as an escape.

    Files that stand in for others have those others' names.
    """
    text = shown(text)
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def _shown(value: Any) -> Any:
    """Plain values with the names of what stand-ins stand for."""
    if isinstance(value, str):
        return shown(value)
    if isinstance(value, dict):
        return {shown(key) if isinstance(key, str) else key: _shown(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_shown(part) for part in value]
    return value


def _lines(section: Section, style: Style) -> Iterator[str]:
    if section.heading:
        yield style("heading", printable(section.heading))
    rows = [[printable(cell) for cell in row] for row in section.rows]
    titles = [title.rstrip(">") for title in section.columns]
    right = [title.endswith(">") for title in section.columns]
    widths = _widths([titles, *rows])
    indent = "  " if section.heading else ""
    if titles and rows:
        yield indent + style("dim", _row(titles, widths, right))
    for row in rows:
        line = _row(row, widths, right)
        if not titles and len(row) > 1:  # a pair: the name stands out
            line = style("dim", line[: len(row[0])]) + line[len(row[0]) :]
        if section.heat:
            line = re.sub(f"[{HEAT}]+", lambda found: style(f"heat{HEAT.index(found[0][0])}", found[0]), line)
        yield indent + line


def _widths(rows: list[list[str]]) -> list[int]:
    """Display width of each column. A row of one cell is a line of its own and sets no width."""
    widths = [0] * max((len(row) for row in rows), default=0)
    for row in rows:
        for column, cell in enumerate(row if len(row) > 1 else ()):
            widths[column] = max(widths[column], _display_width(cell))
    return widths


def _row(cells: list[str], widths: list[int], right: list[bool]) -> str:
    padded = []
    for column, cell in enumerate(cells):
        space = " " * (widths[column] - _display_width(cell))
        padded.append(space + cell if column < len(right) and right[column] else cell + space)
    return "  ".join(padded).rstrip()


def _display_width(text: str) -> int:
    """Terminal cells: East Asian wide characters take two."""
    if text.isascii():
        return len(text)
    return sum(2 if east_asian_width(c) in "WF" else 1 for c in text)
