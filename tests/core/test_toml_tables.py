"""Tables of the package, read by way of compiled files."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import sdops
from sdops.core.toml_tables import read_toml

PACKAGE = Path(sdops.__file__).parent
SHELVES = ("archs", "layouts", "pipelines")


@pytest.fixture
def table(tmp_path, monkeypatch) -> Path:
    """A table in a folder of its own, with compiled files allowed."""
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    monkeypatch.setattr(sys, "pycache_prefix", None)
    path = tmp_path / "some.toml"
    path.write_text(
        'title = "été \\" \\\\ \'"\n[[row]]\nneed = ["a [1,*]"]\nlist = """\nx\ny\n"""\nn = -1\nx = 0.13\nis = true\n'
    )
    return path


def compiled(path: Path) -> list[Path]:
    return list((path.parent / "__pycache__").glob(f"{path.stem}.*.pyc"))


@pytest.mark.parametrize("path", [each for shelf in SHELVES for each in sorted((PACKAGE / shelf).glob("*.toml"))])
def test_every_table_is_what_its_text_says(path):
    assert read_toml(path) == tomllib.loads(path.read_text(encoding="utf-8"))


def test_the_text_is_parsed_once(table, monkeypatch):
    first = read_toml(table)
    assert len(compiled(table)) == 1
    monkeypatch.setattr(tomllib, "loads", None)
    assert read_toml(table) == first == {
        "title": "été \" \\ '",
        "row": [{"need": ["a [1,*]"], "list": "x\ny\n", "n": -1, "x": 0.13, "is": True}],
    }  # fmt: skip


def test_each_reading_is_an_object_of_its_own(table):
    read_toml(table)["row"].clear()
    assert read_toml(table)["row"]


def test_a_changed_text_counts(table):
    read_toml(table)
    table.write_text('title = "new"\n')
    assert read_toml(table) == {"title": "new"}
    before = table.stat()
    table.write_text('title = "two"\n')  # as long as before: its time tells
    os.utime(table, ns=(before.st_atime_ns, before.st_mtime_ns + 2_000_000_000))
    assert read_toml(table) == {"title": "two"}


def test_nothing_is_kept_where_bytecode_is_unwanted(table, monkeypatch):
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    assert read_toml(table)["title"]
    assert not compiled(table)


def test_compiled_tables_and_modules_do_not_share_a_name():
    for shelf in SHELVES:
        stems = [path.stem for path in (PACKAGE / shelf).iterdir() if path.suffix in (".py", ".toml")]
        assert len(stems) == len(set(stems))


def test_damage_is_told(table):
    table.write_text("title = \n")
    with pytest.raises(tomllib.TOMLDecodeError):
        read_toml(table)


def test_the_parser_of_toml_is_not_loaded_for_compiled_tables(tmp_path):
    """Two processes: the first one leaves the compiled files of the second."""
    code = "import sys, sdops.archs.tables as t; t.tables(); print('tomllib' in sys.modules)"
    told = {"PYTHONPYCACHEPREFIX": str(tmp_path), "PYTHONDONTWRITEBYTECODE": ""}
    command = [sys.executable, "-c", code]
    loaded = [subprocess.run(command, check=True, capture_output=True, text=True, env=os.environ | told) for _ in "ab"]
    assert [done.stdout.strip() for done in loaded] == ["True", "False"]
