"""`sdops extract` as a command: forms of the report, options, what it imports."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests import tiny


@pytest.fixture(autouse=True)
def models(clean_environment: None) -> None:
    """base and tuned .safetensors in the current folder."""
    for seed, name in enumerate(["base", "tuned"]):
        tiny.write(Path(f"{name}.safetensors"), tiny.checkpoint(seed))


CALL = ("extract", "tuned.safetensors", "--base", "base.safetensors")


def test_the_shortest_call_names_the_file_after_the_fine_tune(sdops):
    done = sdops(*CALL)
    assert done.code == 0
    assert "captured" in done.out
    assert "at most 128" in done.out
    assert Path("tuned.lora.safetensors").exists()


def test_quiet_json_and_verbose(sdops):
    assert sdops(*CALL, "--rank", "4", "-q").out == "tuned.lora.safetensors\n"
    done = sdops(*CALL, "--rank", "4", "-f", "--json")
    assert done.json["verb"] == "extract"
    assert done.json["settings"]["rank"] == 4
    assert 0 < done.json["captured"] < 1
    detailed = sdops(*CALL, "--rank", "4", "-f", "-v").out
    assert "unet:input_blocks.2.1.transformer_blocks.0.attn2.to_k" in detailed


def test_an_existing_file_is_kept_without_force(sdops):
    Path("tuned.lora.safetensors").write_bytes(b"mine")
    done = sdops(*CALL)
    assert (done.code, Path("tuned.lora.safetensors").read_bytes()) == (1, b"mine")
    assert "--force" in done.err


@pytest.mark.parametrize(
    ("words", "code", "text"),
    [
        (["--rank", "0"], 2, "--rank"),
        (["--energy", "1.2"], 2, "--energy"),
        (["--budget", "much"], 2, "300MB"),
        (["--rank", "4", "--budget", "1MB"], 2, "exclude each other"),
        (["--to", "nonsense"], 2, "no dialect"),
        (["--include", "nothing"], 2, "matches no tensor"),
    ],
)
def test_wrong_usage(sdops, words, code, text):
    done = sdops(*CALL, *words)
    assert done.code == code
    assert text in done.err
    assert not Path("tuned.lora.safetensors").exists()


@pytest.mark.parametrize("words", [["extract", "--help"], [*CALL, "--dry-run"], [*CALL, "--rank", "0"]])
def test_torch_stays_out_until_there_is_work(words):
    code = (
        "import sys; from sdops.commands._console import Console; from sdops.commands.main import _run; "
        f"_run(Console(), {words!r}); sys.exit('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
