"""Several runs at once, and the same run again and again."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

import sdops
from tests.faults.cli import end, merge, start


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_one_output_of_several_runs_with_force_is_one_of_theirs(large: tuple[Path, Path], folder: Path) -> None:
    alphas = ["0.25", "0.5", "0.75"]
    children = [start(*large, "--alpha", alpha, "--force", "-o", "out.safetensors") for alpha in alphas]
    assert [end(child).code for child in children] == [0, 0, 0]
    assert [path.name for path in folder.iterdir()] == ["out.safetensors"]
    made = digest(folder / "out.safetensors")
    for alpha in alphas:
        assert merge(*large, "--alpha", alpha, "--force", "-o", "out.safetensors").code == 0
        if digest(folder / "out.safetensors") == made:
            return
    pytest.fail("the result is none of the three")


def test_without_force_the_first_run_wins(large: tuple[Path, Path], folder: Path) -> None:
    children = [start(*large, "-o", "out.safetensors") for _ in range(3)]
    outcomes = [end(child) for child in children]
    assert sorted(ended.code for ended in outcomes) == [0, 1, 1]
    for ended in outcomes:
        if ended.code:
            assert "`out.safetensors` appeared while it was being made" in ended.err or "exists already" in ended.err
            assert "`--force`" in ended.err
    assert [path.name for path in folder.iterdir()] == ["out.safetensors"]


def test_runs_that_start_at_once_do_not_take_each_other_for_dead(pair: tuple[Path, Path], folder: Path) -> None:
    children = [start(*pair, "--force", "-o", "out.safetensors") for _ in range(8)]
    assert [end(child).code for child in children] == [0] * 8
    assert [path.name for path in folder.iterdir()] == ["out.safetensors"]


@pytest.mark.parametrize("options", [[], ["--alpha", "0.3", "--dtype", "fp32"]], ids=["plain", "fp32"])
def test_every_run_gives_the_same_bytes(options: list[str], pair: tuple[Path, Path], folder: Path) -> None:
    made = set()
    for jobs in ("1", "2", "8"):
        assert merge(*pair, *options, "--jobs", jobs, "--force", "-o", "out.safetensors").code == 0
        made.add(digest(folder / "out.safetensors"))
    assert len(made) == 1


@pytest.mark.parametrize("method", ["slerp", "cosine-a", "ties", "dare-linear", "nuslerp", "tsv-m"])
def test_the_number_of_workers_does_not_show(method: str, pair: tuple[Path, Path], folder: Path) -> None:
    base = pair[0] if method in ("ties", "dare-linear", "tsv-m") else None
    made = set()
    for jobs in (1, 2, 8):
        sdops.merge(*pair, method=method, base=base, jobs=jobs, force=True, output="out.safetensors")
        made.add(digest(folder / "out.safetensors"))
    assert len(made) == 1
