"""`sdops fix` as a command."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests import tiny


@pytest.fixture
def file() -> str:
    broken = {**tiny.checkpoint(1), tiny.IDS: ("F16", np.arange(77, dtype="f2").reshape(1, 77))}
    tiny.write(Path("m.safetensors"), broken)
    return "m.safetensors"


def test_four_forms(sdops, file):
    human = sdops("fix", file, "--dry-run")
    assert human.code == 0
    assert "position-ids" in human.out
    assert "right, but stored as F16" in human.out
    assert not Path("m.fixed.safetensors").exists()
    assert set(sdops("fix", file, "--json", "-n").json["repairs"]) == {"position-ids", "format"}
    assert sdops("fix", file, "-q").out == "m.fixed.safetensors\n"
    assert sdops("fix", "m.fixed.safetensors").out.startswith("m.fixed.safetensors nothing to repair")


def test_only_and_in_place(sdops, file):
    assert sdops("fix", file, "--only", "format", "--in-place").code == 0
    assert tiny.metadata_of(Path(file)) == {"format": "pt"}
    assert tiny.load(Path(file))[tiny.IDS][0] == "F16"
    assert sdops("fix", file, "--only", "formt").code == 2


def test_help_lists_every_repair(sdops):
    from sdops.verbs._repairs import NAMES

    text = sdops("fix", "--help").out
    assert all(f"    {name} " in text for name in NAMES)
    assert max(map(len, text.splitlines())) <= 110


def test_a_missing_file(sdops):
    assert sdops("fix", "absent.safetensors").code == 1
