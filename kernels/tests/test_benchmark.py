"""The benchmark runs from end to end, on tiny shapes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "bench_all.py"


def run(*arguments):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True, env=environment, check=False
    )


def test_a_dry_run_times_every_arm(tmp_path):
    done = run("--dry-run", "--output", str(tmp_path))
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "results.json").read_text())
    assert found["facts"]["correct"] == ["bake", "factors", "linear", "merge"]
    peers = {"PEFT merge + unmerge", "LyCORIS merged weights"}
    assert {row["arm"] for row in found["rows"] if "failed" in row} <= peers
    timed = {(row["stage"], row["arm"]) for row in found["rows"] if "ms" in row}
    assert {
        ("bake", "ours"),
        ("merge", "ours exact"),
        ("merge", "ours"),
        ("linear", "ours"),
        ("factors", "ours"),
    } <= timed
    assert all(row["ms"] > 0 for row in found["rows"] if "ms" in row)
    assert "of floor" in (tmp_path / "table.txt").read_text()


def test_without_a_gpu_it_says_so(tmp_path):
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    done = run("--output", str(tmp_path))
    assert done.returncode == 2
    assert "--dry-run" in done.stderr
