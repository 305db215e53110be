"""`sdops diff` as a command: exit codes as `diff` has them, forms of the report, colour, nothing heavy."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests import tiny


@pytest.fixture
def files() -> tuple[str, str]:
    a, b = tiny.checkpoint(0), tiny.checkpoint(1, vae=False)
    tiny.write(Path("a.safetensors"), a)
    tiny.write(Path("b.safetensors"), b)
    return "a.safetensors", "b.safetensors"


def test_exit_codes(sdops, files):
    a, b = files
    assert sdops("diff", a, a).code == 0
    assert sdops("diff", a, b).code == 1
    missing = sdops("diff", a, "absent.safetensors")
    assert missing.code == 2
    assert "absent.safetensors" in missing.err


def test_four_forms(sdops, files):
    human, data, quiet, verbose = (sdops("diff", *files, *option) for option in ([], ["--json"], ["-q"], ["-v"]))
    assert "Change by block" in human.out
    assert len(verbose.out) > len(human.out)
    assert data.json["verb"] == "diff"
    assert data.json["tensors"]["only_a"] == len(tiny.VAE_SHAPES)
    assert f"only-a {tiny.VAE}decoder.conv_in.weight" in quiet.out.splitlines()
    assert f"changed {tiny.FIRST}" in quiet.out.splitlines()


def test_the_heat_map_has_colour_on_demand(sdops, files):
    assert (
        "\x1b[33m▓▓\x1b[0m" in sdops("diff", *files, "--color=always").out
        or "\x1b[36m▒▒" in sdops("diff", *files, "--color=always").out
    )
    assert "\x1b" not in sdops("diff", *files).out


def test_a_page(sdops, files):
    assert sdops("diff", *files, "--html", "r.html").code == 1
    assert Path("r.html").read_text().startswith("<!doctype html>")
    assert sdops("diff", *files, "--html", "r.html").code == 2
    assert sdops("diff", *files, "--html", "r.html", "--force").code == 1


def test_torch_is_not_imported(files):
    code = "import sys; from sdops.commands.main import main; main(sys.argv[1:]); print('MODULES', *sys.modules)"
    done = subprocess.run([sys.executable, "-c", code, "diff", *files], check=True, capture_output=True, text=True)
    loaded = done.stdout.rpartition("MODULES")[2].split()
    assert "sdops.core.compare" in loaded
    assert not {"torch", "rich", "safetensors"} & set(loaded)
