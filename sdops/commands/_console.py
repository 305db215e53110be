"""The only writer: the result goes to stdout, the talk to stderr, and colour is decided here.

Whatever is written to a terminal passes through `printable`, so that a tensor name cannot move the cursor.
"""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Lock
from typing import TextIO

from sdops import settings
from sdops.report import Report, plain, printable, silent
from sdops.text import duration, size

_CODES = {
    "heading": "1",
    "name": "36",
    "dim": "2",
    "warning": "33",
    "error": "1;31",
    "heat0": "2",
    "heat1": "34",
    "heat2": "36",
    "heat3": "33",
    "heat4": "31",
}
_STEP = 0.1  # a progress line is due every tenth of the work ...
_QUIET_SECONDS, _LONG_SECONDS = 2.0, 30.0  # ... but not sooner than, and at the latest after so many seconds
_REDRAW_SECONDS = 0.1


class Console:
    """How one run of the command line talks. Configured once, by the options that every command has."""

    def __init__(self) -> None:
        self.json = False
        self.quiet = False
        self.verbose = False
        self.color = "auto"
        self.bars = True
        for stream in (sys.stdout, sys.stderr):
            if reconfigure := getattr(stream, "reconfigure", None):
                reconfigure(errors="backslashreplace")  # a narrow code page shows escapes instead of failing

    def show(self, report: Report) -> int:
        """Write a verb's report in the chosen form; returns the exit code."""
        if self.json:
            self._out(json.dumps(report.as_dict(), indent=2, allow_nan=False))
        elif self.quiet:
            self._out("\n".join(printable(line) for line in report.result))
        else:
            self._out(report.text(detail=self.verbose, style=self._style(sys.stdout)))
        for text in report.warnings:
            self.warning(text)
        if report.hints and not self.quiet:
            self._err("")
            for text in report.hints:
                self.hint(text)
        return 1 if report.failed else 0

    def result(self, text: str) -> None:
        """Write text made by sdops itself (a completion script) to stdout as it is."""
        self._out(text)

    def note(self, text: str) -> None:
        """What happens or happened; left out with `--quiet`."""
        if not self.quiet:
            self._err(self._quoted(text))

    def hint(self, text: str) -> None:
        """The next command to type; left out with `--quiet`."""
        if not self.quiet:
            self._labelled("hint", "name", text)

    def warning(self, text: str) -> None:
        """Something the user should know, although the work goes on."""
        self._labelled("warning", "warning", text)

    def error(self, message: str, hint: str | None = None) -> None:
        """Why the command failed, and below it what to do."""
        self._labelled("error", "error", message)
        if hint:
            self._err("")
            self._labelled("hint", "name", hint)

    @contextmanager
    def progress(self, label: str, total: int) -> Iterator[Callable[[int], None]]:
        """Show work on `total` bytes; gives `advance(nbytes)`, cheap and safe to call from any thread."""
        if self.quiet or not self.bars:
            with silent(label, total) as advance:
                yield advance
        elif sys.stderr.isatty():
            with _bar(label, total, color=self._coloured(sys.stderr)) as advance:
                yield advance
        else:
            yield _Lines(label, total, self._err).advance

    def _labelled(self, label: str, kind: str, text: str) -> None:
        self._err(f"{self._style(sys.stderr)(kind, label + ':')} {self._quoted(text)}")

    def _quoted(self, text: str) -> str:
        """Escaped, and with what stands in backticks in colour."""
        style = self._style(sys.stderr)
        lines = "\n".join(printable(line) for line in text.split("\n"))
        return re.sub(r"`[^`]+`", lambda found: style("name", found[0]), lines)

    def _style(self, stream: TextIO) -> Callable[[str, str], str]:
        if not self._coloured(stream):
            return plain
        return lambda kind, text: f"\x1b[{_CODES[kind]}m{text}\x1b[0m"

    def _coloured(self, stream: TextIO) -> bool:
        if self.color != "auto":
            return self.color == "always"
        wish = settings.colour_wish()
        return stream.isatty() if wish is None else wish

    def _out(self, text: str) -> None:
        if text:
            sys.stdout.write(text + "\n")
            sys.stdout.flush()

    def _err(self, text: str) -> None:
        sys.stderr.write(text + "\n")
        sys.stderr.flush()


class _Lines:
    """Progress for logs: a plain line now and then."""

    def __init__(self, label: str, total: int, write: Callable[[str], None]) -> None:
        self._label, self._total, self._write = label, total, write
        self._done = 0
        self._lock = Lock()
        self._begin = self._last = time.monotonic()
        self._due = _STEP * total

    def advance(self, nbytes: int) -> None:
        with self._lock:
            self._done += nbytes
            now = time.monotonic()
            waited = now - self._last
            if waited >= _LONG_SECONDS or (self._done >= self._due and waited >= _QUIET_SECONDS):
                self._write(self._line(now - self._begin))
                self._last = now
                self._due = self._done + _STEP * self._total

    def _line(self, seconds: float) -> str:
        speed = max(1.0, self._done / seconds)
        left = duration(max(0, self._total - self._done) / speed)
        share = self._done / self._total if self._total else 1.0
        return (
            f"{self._label}: {share:.0%}, {size(self._done)} of {size(self._total)}, "
            f"{size(round(speed))}/s, {left} left"
        )


@contextmanager
def _bar(label: str, total: int, *, color: bool) -> Iterator[Callable[[int], None]]:
    """A bar on the terminal that goes away when the work is done."""
    from rich.console import Console as Terminal
    from rich.markup import escape
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(compact=True),
    )
    terminal = Terminal(stderr=True, no_color=not color)
    with Progress(*columns, console=terminal, transient=True) as bars:
        task = bars.add_task(escape(printable(label)), total=total)
        lock, done, shown = Lock(), 0, 0.0

        def advance(nbytes: int) -> None:
            nonlocal done, shown
            with lock:
                done += nbytes
                now = time.monotonic()
                if now - shown < _REDRAW_SECONDS and done < total:
                    return
                shown = now
            bars.update(task, completed=done)

        yield advance
