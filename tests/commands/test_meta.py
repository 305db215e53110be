"""`sdops meta` as a command."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import tiny


@pytest.fixture
def file() -> str:
    tiny.write(Path("m.safetensors"), tiny.checkpoint(1), {"format": "pt", "ss_note": "\x1b[31m" + "x" * 300})
    return "m.safetensors"


def test_show_in_four_forms(sdops, file):
    human, data, quiet, verbose = (sdops("meta", file, *option) for option in ([], ["--json"], ["-q"], ["-v"]))
    assert "\x1b" not in human.out + quiet.out + verbose.out
    assert "In full" in verbose.out
    assert data.json["metadata"]["format"] == "pt"
    assert "format=pt" in quiet.out.splitlines()


def test_change(sdops, file):
    done = sdops("meta", file, "--set", "title=A = B", "--strip", "ss_*", "--unset", "format")
    assert done.code == 0
    assert done.out.startswith("m.safetensors: in place")
    found = tiny.metadata_of(Path(file))
    assert found["modelspec.title"] == "A = B"
    assert "ss_note" not in found


@pytest.mark.parametrize(
    ("arguments", "code"),
    [(["--set", "title"], 2), (["--set", "resolution=big"], 2), (["--unset", "absent"], 2), (["--from-json", "no"], 1)],
)
def test_what_is_wrong_is_said(sdops, file, arguments, code):
    before = Path(file).read_bytes()
    done = sdops("meta", file, *arguments)
    assert done.code == code
    assert done.err.startswith("error: ")
    assert Path(file).read_bytes() == before


def test_a_missing_file(sdops):
    assert sdops("meta", "absent.safetensors").code == 1
