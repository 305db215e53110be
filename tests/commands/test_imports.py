"""What a command must not import, because people wait for it."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests import tiny

HEAVY = {"torch", "numpy", "rich", "huggingface_hub", "safetensors"}
# Of Python's own: together they take as long as reading a header, and bring much along.
SLOW = {"asyncio", "bz2", "concurrent.futures", "logging", "lzma", "secrets", "shutil", "subprocess", "tempfile"}
_WATCH = """
import sys
from sdops.commands.main import main
code = main(sys.argv[1:])
print("MODULES", *sorted({name for name in sys.modules}), file=sys.stderr)
"""


def modules(*arguments: str) -> set[str]:
    command = [sys.executable, "-c", _WATCH, *arguments]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    return set(done.stderr.rpartition("MODULES")[2].split())


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["--version"],
        ["inpsect"],
        ["inspect", "--jsno", "x"],
        ["inspect", "absent.safetensors"],
        ["merge", "--help"],
        ["methods"],
        ["methods", "weighted-sum"],
        ["methods", "wieghted-sum"],
        ["hash", "absent.safetensors"],
        ["completion", "bash"],
    ],
)
def test_nothing_heavy(arguments):
    loaded = modules(*arguments)
    assert "sdops.commands._app" in loaded
    assert not loaded & HEAVY


@pytest.mark.parametrize(
    ("arguments", "allowed"),
    [(["inspect"], set()), (["inspect", "--json", "--keys"], set()), (["hash"], set()), (["verify"], {"numpy"})],
)
def test_nothing_heavy_to_look_at_a_file(arguments, allowed, tmp_path):
    path = tiny.write(tmp_path / "m.safetensors", tiny.checkpoint())
    loaded = modules(*arguments, str(path))
    assert f"sdops.verbs.{arguments[0]}" in loaded
    assert loaded & HEAVY == allowed


@pytest.mark.parametrize(
    ("arguments", "unneeded"),
    [
        (["inspect", "m.safetensors"], ("sdops.verbs._convert", "sdops.layouts", "sdops.core.sink")),
        (
            ["convert", "m.safetensors", "--to", "safetensors", "--components", "vae", "-o", "v"],
            ("sdops.layouts", "sdops.pipelines", "sdops.core.sink_"),
        ),
        (["merge", "m.safetensors", "m.safetensors", "-n"], ("sdops.layouts", "sdops.pipelines")),
    ],
)
def test_a_command_loads_what_it_needs(arguments, unneeded, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny.write(tmp_path / "m.safetensors", tiny.checkpoint())
    loaded = modules(*arguments)
    assert f"sdops.verbs.{arguments[0]}" in loaded
    assert not [name for name in loaded if name.startswith(unneeded)]
    assert not loaded & SLOW


@pytest.mark.parametrize("arguments", [["--help"], ["inpsect"], ["--version"]])
def test_help_imports_no_command(arguments):
    loaded = {name for name in modules(*arguments) if name.startswith("sdops.")}
    assert not [name for name in loaded if name.startswith(("sdops.verbs", "sdops.formats", "sdops.archs"))]
    commands = {name.rpartition(".")[2] for name in loaded if name.startswith("sdops.commands.")}
    assert commands == {"main", "_app", "_console"}
