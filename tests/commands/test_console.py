"""What goes where, and in which form."""

from __future__ import annotations

import io
import json
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from sdops.commands import _console
from sdops.commands._console import Console
from sdops.report import Report, Section


class Terminal(io.StringIO):
    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


@pytest.fixture
def report():
    return Report(
        "try",
        data={"files": [{"name": "a\x1b[31m"}]},
        sections=[
            Section("a\x1b[31m", [["architecture", "SDXL"], ["size", "6.94 GB"]]),
            Section("Components", [["unet", "1,680"], ["vae", "248"]], columns=("component", "keys>")),
            Section("Evidence", [["[/foo] \x1b]0;title\x07"]], detail=True),
        ],
        result=["a\x1b[31m: sdxl"],
        warnings=["`a` has \x07 bells"],
        hints=["`sdops verify a`"],
    )


HUMAN = """\
a\\x1b[31m
  architecture  SDXL
  size          6.94 GB

Components
  component   keys
  unet       1,680
  vae          248
"""


def test_human(report, capsys):
    assert Console().show(report) == 0
    out, err = capsys.readouterr()
    assert out == HUMAN
    assert err == "warning: `a` has \\x07 bells\n\nhint: `sdops verify a`\n"


def test_verbose_adds_the_details(report, capsys):
    console = Console()
    console.verbose = True
    console.show(report)
    assert capsys.readouterr().out == HUMAN + "\nEvidence\n  [/foo] \\x1b]0;title\\x07\n"


def test_json(report, capsys):
    console = Console()
    console.json = True
    console.show(report)
    out, err = capsys.readouterr()
    assert out.isascii()
    assert "\x1b" not in out
    assert json.loads(out) == {
        "schema": 1,
        "verb": "try",
        "files": [{"name": "a\x1b[31m"}],
        "warnings": ["`a` has \x07 bells"],
    }
    assert "warning" in err


def test_quiet(report, capsys):
    console = Console()
    console.quiet = True
    console.show(report)
    assert capsys.readouterr() == ("a\\x1b[31m: sdxl\n", "warning: `a` has \\x07 bells\n")


def test_the_python_face_is_the_human_text(report):
    assert str(report) == HUMAN + "warning: `a` has \\x07 bells"


def test_wide_characters_keep_columns_aligned():
    rows = [["模型", "1"], ["model", "2"]]
    assert Report("x", sections=[Section("", rows)]).text() == "模型   1\nmodel  2"


@pytest.mark.parametrize(
    ("terminal", "color", "environment", "coloured"),
    [
        (True, "auto", {}, True),
        (True, "auto", {"NO_COLOR": "1"}, False),
        (True, "auto", {"TERM": "dumb"}, False),
        (True, "never", {}, False),
        (False, "auto", {}, False),
        (False, "auto", {"FORCE_COLOR": "1"}, True),
        (False, "always", {"NO_COLOR": "1"}, True),
    ],
)
def test_colour(terminal, color, environment, coloured, report, monkeypatch):
    stream = Terminal() if terminal else io.StringIO()
    monkeypatch.setattr(sys, "stdout", stream)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    console = Console()
    console.color = color
    console.show(report)
    assert ("\x1b[" in stream.getvalue()) is coloured
    assert "\\x1b[31m" in stream.getvalue()


def test_a_narrow_code_page_gets_escapes(monkeypatch):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="cp1252"))
    Console().show(Report("x", sections=[Section("模型…", [["a"]])]))
    assert raw.getvalue().splitlines()[0] == b"\\u6a21\\u578b\x85"


def test_progress_off_a_terminal_is_silent_when_short_and_plain_lines_when_long(capsys, monkeypatch):
    console = Console()
    with console.progress("merging", 1000) as advance:
        for _ in range(100):
            advance(10)
    assert capsys.readouterr().err == ""

    clock = iter(np.arange(0, 1000, 0.3))
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    with console.progress("merging", 10_000_000_000) as advance:
        for _ in range(100):
            advance(100_000_000)
    out, err = capsys.readouterr()
    assert out == ""
    lines = err.splitlines()
    assert len(lines) == 10  # 100 calls in 30 s
    assert lines[0].startswith("merging: 10%, 1.00 GB of 10.0 GB, ")
    assert lines[-1].startswith("merging: 100%, 10.0 GB of 10.0 GB, ")


def test_a_slow_job_says_something_every_half_minute(capsys, monkeypatch):
    clock = iter(range(1000))
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    with Console().progress("merging", 10**12) as advance:
        for _ in range(100):
            advance(1_000_000)
    assert len(capsys.readouterr().err.splitlines()) == 3


@pytest.mark.parametrize("option", ["quiet", "no-progress"])
def test_no_progress(option, capsys):
    console = Console()
    console.quiet, console.bars = option == "quiet", option != "no-progress"
    with console.progress("merging", 10) as advance:
        advance(10)
    assert capsys.readouterr() == ("", "")


def test_a_bar_on_a_terminal_counts_all_threads_and_goes_away(monkeypatch):
    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    with Console().progress("merging [/foo]\x1b[31m", 4_000_000) as advance, ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: advance(1000), range(4000)))
    shown = stream.getvalue()
    assert "merging [/foo]\\x1b[31m" in shown
    assert "4.0/4.0 MB" in shown
    assert shown.rstrip("\n").endswith(("\x1b[2K", "\x1b[?25h", "\x1b[1A\x1b[2K"))


def test_progress_without_bytes_does_not_divide_by_zero(capsys, monkeypatch):
    monkeypatch.setattr(_console, "_QUIET_SECONDS", 0.0)
    with Console().progress("empty", 0) as advance:
        time.sleep(0.01)
        advance(0)
