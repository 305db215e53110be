"""Places that an output must not or cannot go to, and what becomes of a file that is replaced."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.faults.cli import leftovers, merge


def same(path: Path, folder: Path) -> Path:
    return path


def roundabout(path: Path, folder: Path) -> Path:
    return folder / ".." / path.name


def symbolic_link(path: Path, folder: Path) -> Path:
    (folder / "link").symlink_to(path)
    return folder / "link"


def linked_folder(path: Path, folder: Path) -> Path:
    (folder / "link").symlink_to(path.parent)
    return folder / "link" / path.name


@pytest.mark.parametrize("way", [same, roundabout, symbolic_link, linked_folder])
def test_an_output_that_is_an_input(way: Callable[[Path, Path], Path], pair: tuple[Path, Path], folder: Path) -> None:
    output = way(pair[1], folder)
    ended = merge(*pair, "--force", "-o", output)
    assert ended.code == 1
    assert f"the output `{output}` is the input `{pair[1]}`" in ended.err
    assert leftovers(pair[1].parent) == leftovers(folder) == []


def test_an_output_that_is_the_base(pair: tuple[Path, Path], folder: Path) -> None:
    base = folder / "base.safetensors"
    base.write_bytes(pair[0].read_bytes())
    ended = merge(*pair, "-m", "task-arithmetic", "--base", base, "--force", "-o", base)
    assert ended.code == 1
    assert f"the output `{base}` is the input `{base}`" in ended.err
    assert base.read_bytes() == pair[0].read_bytes()


def test_an_output_that_is_a_hard_link_of_an_input(pair: tuple[Path, Path], folder: Path) -> None:
    copy, output = folder / "copy.safetensors", folder / "out.safetensors"
    copy.write_bytes(pair[0].read_bytes())
    output.hardlink_to(copy)
    ended = merge(copy, pair[1], "--force", "-o", output)
    assert ended.code == 1
    assert f"the output `{output}` is the input `{copy}`" in ended.err
    assert copy.read_bytes() == pair[0].read_bytes()


def test_an_existing_output_is_not_replaced(pair: tuple[Path, Path], folder: Path) -> None:
    (folder / "out.safetensors").write_bytes(b"precious")
    ended = merge(*pair, "-o", "out.safetensors")
    assert ended.code == 1
    assert "`out.safetensors` exists already" in ended.err
    assert "`--force`" in ended.err
    assert (folder / "out.safetensors").read_bytes() == b"precious"


def a_folder(folder: Path) -> tuple[str, str]:
    (folder / "out").mkdir()
    return "out", "`out` is a folder"


def a_pipe(folder: Path) -> tuple[str, str]:
    os.mkfifo(folder / "pipe")
    return "pipe", "`pipe` is not a regular file"


def the_null_device(folder: Path) -> tuple[str, str]:
    return os.devnull, f"`{os.devnull}` is not a regular file"


def standard_output(folder: Path) -> tuple[str, str]:
    return "/dev/stdout", "`/dev/stdout` is not a regular file"


def a_missing_folder(folder: Path) -> tuple[str, str]:
    return "none/out.safetensors", "the folder of `none/out.safetensors` does not exist"


def below_a_file(folder: Path) -> tuple[str, str]:
    (folder / "file").touch()
    return "file/out.safetensors", "the folder of `file/out.safetensors` does not exist"


def a_link_to_nowhere(folder: Path) -> tuple[str, str]:
    (folder / "link").symlink_to("none/out.safetensors")
    return "link", "the folder of `link` does not exist"


def a_link_to_itself(folder: Path) -> tuple[str, str]:
    (folder / "link").symlink_to("link")
    return "link", "`link` cannot be written to"


def a_long_name(folder: Path) -> tuple[str, str]:
    return "n" * 256, f"`{'n' * 256}` cannot be written to: File name too long"


PLACES = [
    a_folder,
    a_pipe,
    the_null_device,
    standard_output,
    a_missing_folder,
    below_a_file,
    a_link_to_nowhere,
    a_link_to_itself,
    a_long_name,
]


@pytest.mark.parametrize("place", PLACES)
def test_places_that_are_refused(
    place: Callable[[Path], tuple[str, str]], pair: tuple[Path, Path], folder: Path
) -> None:
    output, message = place(folder)
    before = sorted((path.name, path.lstat().st_mode) for path in folder.iterdir())
    ended = merge(*pair, "--force", "-o", output)
    assert ended.code == 1
    assert message in ended.err
    assert "\nhint: " in ended.err
    assert sorted((path.name, path.lstat().st_mode) for path in folder.iterdir()) == before
    assert stat.S_ISCHR(os.stat(os.devnull).st_mode)


def test_the_longest_possible_name(pair: tuple[Path, Path], folder: Path) -> None:
    name = "n" * 255
    assert merge(*pair, "-o", name).code == 0
    assert os.listdir(folder) == [name]


def test_a_name_that_is_no_text(pair: tuple[Path, Path], folder: Path) -> None:
    odd = folder / os.fsdecode(b"\xff.safetensors")
    odd.write_bytes(pair[0].read_bytes())
    ended = merge(odd, pair[1], "-o", os.fsdecode(b"\xfe.safetensors"))
    assert (ended.code, ended.err) == (0, "")
    assert leftovers(folder) == []


@pytest.fixture
def bound() -> list[str]:
    """A command that runs commands for which permissions hold: root must give up the right to ignore them."""
    if os.geteuid() != 0:
        return []
    if shutil.which("setpriv") is None:
        pytest.skip("root without setpriv")
    return ["setpriv", "--bounding-set=-dac_override,-dac_read_search"]


@pytest.mark.parametrize(("mode", "code"), [(0o555, 1), (0o333, 0)], ids=["read-only", "write-only"])
def test_permissions_of_the_folder(
    mode: int, code: int, bound: list[str], pair: tuple[Path, Path], folder: Path
) -> None:
    target = folder / "target"
    target.mkdir()
    target.chmod(mode)
    ended = merge(*pair, "-o", target / "out.safetensors", prefix=bound)
    target.chmod(0o755)
    assert ended.code == code, ended.err
    assert os.listdir(target) == ([] if code else ["out.safetensors"])
    if code:
        assert f"the folder `{target}` is read-only" in ended.err


def test_an_input_that_may_not_be_read(bound: list[str], pair: tuple[Path, Path], folder: Path) -> None:
    secret = folder / "secret.safetensors"
    secret.write_bytes(pair[1].read_bytes())
    secret.chmod(0)
    ended = merge(pair[0], secret, "-o", "out.safetensors", prefix=bound)
    assert ended.code == 1
    assert f"`{secret}` cannot be opened: Permission denied" in ended.err


def test_a_read_only_disk(pair: tuple[Path, Path], disk: Callable[[str], Path]) -> None:
    point = disk("size=1m")
    subprocess.run(["mount", "-o", "remount,ro", point], check=True)
    ended = merge(*pair, "-o", point / "out.safetensors")
    assert ended.code == 1
    assert f"the folder `{point}` is read-only" in ended.err


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_a_new_file_has_the_mode_that_umask_says(umask: int, mode: int, pair: tuple[Path, Path], folder: Path) -> None:
    assert merge(*pair, "-o", "out.safetensors", umask=umask).code == 0
    assert stat.S_IMODE((folder / "out.safetensors").stat().st_mode) == mode


@pytest.mark.parametrize("mode", [0o600, 0o664, 0o444])
def test_a_replaced_file_keeps_its_mode(mode: int, pair: tuple[Path, Path], folder: Path) -> None:
    output = folder / "out.safetensors"
    output.write_bytes(b"old")
    output.chmod(mode)
    assert merge(*pair, "--force", "-o", output).code == 0
    assert stat.S_IMODE(output.stat().st_mode) == mode
    assert output.stat().st_size > 3


def test_the_target_of_a_link_is_replaced_not_the_link(pair: tuple[Path, Path], folder: Path) -> None:
    (folder / "real").mkdir()
    target, link = folder / "real" / "file.safetensors", folder / "link.safetensors"
    target.write_bytes(b"old")
    link.symlink_to(target)
    assert merge(*pair, "--force", "-o", link).code == 0
    assert link.readlink() == target
    assert target.stat().st_size > 3
    assert leftovers(folder) == leftovers(folder / "real") == []


def test_a_link_to_a_file_that_is_not_there_yet(pair: tuple[Path, Path], folder: Path) -> None:
    (folder / "link.safetensors").symlink_to("file.safetensors")
    assert merge(*pair, "-o", "link.safetensors").code == 0
    assert (folder / "link.safetensors").is_symlink()
    assert not (folder / "file.safetensors").is_symlink()
