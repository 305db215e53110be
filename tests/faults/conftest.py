from __future__ import annotations

import hashlib
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from tests.faults.cli import save, sparse


@pytest.fixture(autouse=True)
def surroundings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in [name for name in os.environ if name.startswith("SDOPS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("SDOPS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The current folder: of outputs and nothing else."""
    return tmp_path / "work"


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[tuple[Path, Path]]:
    """Two small models, which every test must leave as they are."""
    random = np.random.default_rng(7)
    paths = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    for path in paths:
        save(path, {f"layer{i}.weight": random.standard_normal((40, 30)).astype(np.float16) for i in range(6)})
    before = [(state(path), hashlib.sha256(path.read_bytes()).digest()) for path in paths]
    yield paths[0], paths[1]
    assert [(state(path), hashlib.sha256(path.read_bytes()).digest()) for path in paths] == before


@pytest.fixture
def large(tmp_path: Path) -> tuple[Path, Path]:
    """Two models of 32 MB that take up no more than a page: a merge of them lasts long enough to disturb it."""
    return sparse(tmp_path / "large_a.safetensors", 1 << 24), sparse(tmp_path / "large_b.safetensors", 1 << 24)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Mounts a file system in memory of a given size."""
    mounted: list[Path] = []

    def mount(options: str) -> Path:
        point = tmp_path / f"disk{len(mounted)}"
        point.mkdir()
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", options, "none", point], check=False, capture_output=True, text=True
        )
        if done.returncode:
            pytest.skip(f"mounting is not permitted: {done.stderr.strip()}")
        mounted.append(point)
        return point

    yield mount
    for point in mounted:
        subprocess.run(["umount", "--lazy", point], check=True)


def state(path: Path) -> tuple[int, ...]:
    status = path.stat()
    return status.st_mode, status.st_nlink, status.st_size, status.st_mtime_ns, status.st_ino
