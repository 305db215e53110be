"""`sdops convert` as a command."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests import tiny


@pytest.fixture
def file() -> str:
    tiny.write(Path("m.safetensors"), tiny.checkpoint(1))
    return "m.safetensors"


def test_four_forms(sdops, file):
    human = sdops("convert", file, "--to", "ckpt")
    assert human.code == 0
    assert "copied" in human.out
    assert Path("m.ckpt").is_file()
    data = sdops("convert", file, "--to", "ckpt", "--force", "--json").json
    assert (data["verb"], data["output"], data["tensors"]["copied"]) == ("convert", "m.ckpt", len(tiny.checkpoint(1)))
    assert sdops("convert", file, "--to", "ckpt", "-f", "-q").out == "m.ckpt\n"
    verbose = sdops("convert", file, "--to", "safetensors", "--components", "vae", "-n", "-v", "-o", "v.safetensors")
    assert f"{tiny.UNET}out.2.bias" in verbose.out
    assert not Path("v.safetensors").exists()


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--to", "ckpt", "-o", "m.safetensors"], 1, "is the input"),
        (["--to", "kckpt"], 2, "did you mean `ckpt`"),
        ([], 2, "--to"),
        (["--to", "ckpt", "--shard", "big"], 2, "amount of memory"),
        (["--to", "gguf", "--dtype", "q3"], 2, "there is no dtype"),
        (["--to", "safetensors", "--components", "x"], 2, "there is no component"),
        (["--to", "safetensors", "--ema", "use"], 1, "no moving average"),
    ],
)
def test_what_is_wrong_is_said(sdops, file, arguments, code, words):
    found = sdops("convert", file, *arguments)
    assert found.code == code
    assert words in found.err
    assert "Traceback" not in found.err


def test_neither_torch_nor_numpy_is_needed(small_checkpoint):
    """Layouts and containers; numbers stay bytes."""
    path = small_checkpoint("sdxl")
    code = "import sys; from sdops.commands.main import main; main(sys.argv[1:]); print(*sys.modules)"
    for to, output in (("diffusers", "f"), ("ckpt", "m.ckpt"), ("safetensors", "m.safetensors")):
        arguments = ["convert", str(path), "--to", to, "-o", output]
        done = subprocess.run([sys.executable, "-c", code, *arguments], check=True, capture_output=True, text=True)
        modules = done.stdout.splitlines()[-1].split()
        assert not {"torch", "numpy", "rich"} & set(modules), to
