"""The atomic writer: bytes, order, metadata, modes, refusals; what remains when it is left early."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open

from sdops.core.sink import SafetensorsSink, check_inputs, check_space, check_target
from sdops.core.spec import Spec
from sdops.errors import OutputError
from tests import tiny

SPECS = {
    "b.half": Spec("F16", (3,)),
    "a.half": Spec("F16", (2, 2)),
    "scalar": Spec("F32", ()),
    "empty": Spec("F32", (0, 5)),
    "ids": Spec("I64", (2,)),
    "bytes": Spec("U8", (5,)),
    "ünï✓": Spec("BF16", (1,)),
}
DATA = {key: bytes(range(i, i + spec.nbytes)) for i, (key, spec) in enumerate(SPECS.items())}


def written(path: Path, *, order: list[str] | None = None, step: int = 100, force: bool = False) -> Path:
    with SafetensorsSink(path, SPECS, {"format": "pt", "note": "x"}, force=force) as sink:
        for key in order or list(SPECS):
            for start in range(0, len(DATA[key]), step):
                sink.write(key, start, memoryview(DATA[key])[start : start + step])
        sink.commit()
    return path


def test_what_is_written_is_read_by_others(tmp_path: Path) -> None:
    path = written(tmp_path / "out.safetensors")
    out = tiny.load(path)
    for key, spec in SPECS.items():
        assert (out[key][0], out[key][1].shape) == (spec.dtype, spec.shape)
        assert out[key][1].tobytes() == DATA[key]
    with safe_open(path, "np") as file:
        assert set(file.keys()) == set(SPECS)
        assert file.metadata() == {"format": "pt", "note": "x"}
        assert np.array_equal(file.get_tensor("ids"), out["ids"][1])
    length = int.from_bytes(path.read_bytes()[:8], "little")
    assert length % 8 == 0


def test_the_bytes_do_not_depend_on_the_order_of_writing(tmp_path: Path) -> None:
    first = written(tmp_path / "1").read_bytes()
    second = written(tmp_path / "2", order=sorted(SPECS, reverse=True), step=1).read_bytes()
    assert first == second
    header = json.loads(first[8 : 8 + int.from_bytes(first[:8], "little")])
    assert list(header) == ["__metadata__", "ids", "empty", "scalar", "ünï✓", "a.half", "b.half", "bytes"]


def test_metadata_may_be_replaced_by_ones_of_equal_length(tmp_path: Path) -> None:
    path = tmp_path / "out"
    with SafetensorsSink(path, {}, {"sha": "0" * 8}, force=False) as sink, pytest.raises(ValueError, match="length"):
        sink.commit({"sha": "abc"})
    assert not path.exists()
    with SafetensorsSink(path, {}, {"sha": "0" * 8}, force=False) as sink:
        assert sink.commit({"sha": "12345678"}) == path
    assert tiny.metadata_of(path) == {"sha": "12345678"}


def test_nothing_remains_without_a_commit(tmp_path: Path) -> None:
    with SafetensorsSink(tmp_path / "out", SPECS, {}, force=False):
        (temporary,) = tmp_path.iterdir()
        assert temporary.name.startswith(".sdops-")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(KeyboardInterrupt), SafetensorsSink(tmp_path / "out", SPECS, {}, force=False):
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "out").write_text("old")
    with SafetensorsSink(tmp_path / "out", SPECS, {}, force=True):
        pass
    assert (tmp_path / "out").read_text() == "old"


def test_the_final_name_appears_at_the_end_only(tmp_path: Path) -> None:
    with SafetensorsSink(tmp_path / "out", SPECS, {}, force=False) as sink:
        assert not (tmp_path / "out").exists()
        sink.commit()
        assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_left_overs_of_killed_runs_go_and_those_of_live_ones_stay(tmp_path: Path) -> None:
    with SafetensorsSink(tmp_path / "out", SPECS, {}, force=False):
        (alive,) = tmp_path.iterdir()
        tag = alive.name.split("-")[1]
        dead, other = tmp_path / f".sdops-{tag}-0.tmp", tmp_path / ".sdops-12345678-0.tmp"
        dead.touch()
        other.touch()
        with SafetensorsSink(tmp_path / "out", SPECS, {}, force=False):
            assert alive.exists()
            assert other.exists()
            assert not dead.exists()


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_modes(mask: int, mode: int, tmp_path: Path) -> None:
    old = os.umask(mask)
    try:
        path = written(tmp_path / "out")
        assert path.stat().st_mode & 0o7777 == mode
        path.chmod(0o640)
        written(path, force=True)
        assert path.stat().st_mode & 0o7777 == 0o640
    finally:
        os.umask(old)


def test_a_link_is_followed(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real" / "file")
    written(tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real" / "file").is_file()


def test_targets_that_are_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    os.mkfifo(tmp_path / "pipe")
    for name, force, message in [
        ("file", False, "exists already"),
        ("absent/file", True, "does not exist"),
        (".", True, "is a folder"),
        ("pipe", True, "not a regular file"),
    ]:
        with pytest.raises(OutputError, match=message):
            check_target(tmp_path / name, force=force)
    assert check_target(tmp_path / "file", force=True) == tmp_path / "file"


def test_inputs_are_recognised_through_links(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    (tmp_path / "soft").symlink_to(file)
    os.link(file, tmp_path / "hard")
    for name in ("file", "soft", "hard", "./file"):
        with pytest.raises(OutputError, match="is the input"):
            check_inputs(tmp_path / name, [tmp_path / "other", file])
    check_inputs(tmp_path / "new", [file])


def test_space_is_compared_with_the_size(tmp_path: Path) -> None:
    check_space(tmp_path / "out", 1000)
    with pytest.raises(OutputError, match="free"):
        check_space(tmp_path / "out", 1 << 60)
    with pytest.raises(OutputError, match="free"):
        SafetensorsSink(tmp_path / "out", {"w": Spec("F32", (1 << 58,))}, {}, force=False).__enter__()
    assert list(tmp_path.iterdir()) == []
