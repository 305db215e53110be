"""Very many tensors: memory stays in proportion."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.faults.cli import merge

# Runs a command, then tells its peak memory. A process of its own, for the kernel counts what pytest held
# when it was forked as memory of the child.
MEASURE = """
import resource, subprocess, sys
code = subprocess.call(sys.argv[1:])
used = resource.getrusage(resource.RUSAGE_CHILDREN)
print(used.ru_maxrss)
sys.exit(code)
"""


def many(path: Path, keys: int, value: float) -> Path:
    header = {
        f"model.diffusion_model.block.{i}.weight": {"dtype": "F16", "shape": [3], "data_offsets": [6 * i, 6 * i + 6]}
        for i in range(keys)
    }
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + np.full(3 * keys, value, np.float16).tobytes())
    return path


@pytest.mark.parametrize("keys", [10_000, pytest.param(100_000, marks=pytest.mark.slow)])
def test_many_keys(keys: int, folder: Path, tmp_path: Path) -> None:
    a, b = many(tmp_path / "a.safetensors", keys, 1.0), many(tmp_path / "b.safetensors", keys, 3.0)
    ended = merge(a, b, "-q", "-o", "out.safetensors", prefix=[sys.executable, "-c", MEASURE])
    assert (ended.code, ended.err) == (0, "")
    name, kilobytes = ended.out.split()
    assert name == "out.safetensors"
    assert int(kilobytes) * 1024 < 100e6 + keys * 4e3
    made = load_file(folder / "out.safetensors")
    assert len(made) == keys
    assert all((tensor == 2).all() for tensor in made.values())


@pytest.mark.slow
def test_a_plan_for_a_hundred_thousand_keys(folder: Path, tmp_path: Path) -> None:
    a, b = many(tmp_path / "a.safetensors", 100_000, 1.0), many(tmp_path / "b.safetensors", 100_000, 3.0)
    ended = merge(a, b, "--dry-run", "-o", "out.safetensors")
    assert ended.code == 0
    assert "100,000 tensors" in ended.out
    assert list(folder.iterdir()) == []
