"""`sdops apply`, and `sdops merge --lora`, as commands."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from fixtures import loras
from tests import tiny

TO_K = "input_blocks.2.1.transformer_blocks.0.attn2.to_k"


@pytest.fixture
def files() -> tuple[str, str]:
    """An SD1 checkpoint with few layers, and a LoRA for one of them."""
    tiny.write(Path("m.safetensors"), tiny.checkpoint(1))
    parts = loras.FAMILIES["lora_alpha"]((320, 768), 2, np.random.default_rng(0))
    loras.save(Path("x.safetensors"), {f"diffusion_model.{TO_K}{end}": values for end, values in parts.items()})
    return "m.safetensors", "x.safetensors"


def test_four_forms(sdops, files):
    model, lora = files
    human = sdops("apply", model, "--lora", f"{lora}:0.5", "--dry-run")
    assert human.code == 0
    assert "1 of unet" in human.out
    assert "nothing was written" in human.err
    assert not Path("m+x0.5.safetensors").exists()
    facts = sdops("apply", model, "--lora", f"{lora}:0.5", "--json", "-n").json
    assert facts["loras"][0]["ranks"] == {"2": 1}
    assert facts["memory_bytes"] > 0
    assert sdops("apply", model, "--lora", f"{lora}:0.5", "-q").out == "m+x0.5.safetensors\n"
    done = sdops("apply", model, "--lora", lora, "-o", "out.safetensors", "--no-progress")
    assert "strength kept" in done.out
    assert done.err == ""
    change = tiny.numbers(tiny.load(Path("out.safetensors"))[f"{tiny.UNET}{TO_K}.weight"]) - tiny.numbers(
        tiny.checkpoint(1)[f"{tiny.UNET}{TO_K}.weight"]
    )
    assert np.linalg.norm(change) > 0


def test_an_existing_output_is_kept(sdops, files):
    model, lora = files
    Path("out.safetensors").write_bytes(b"precious")
    refused = sdops("apply", model, "--lora", lora, "-o", "out.safetensors")
    assert (refused.code, Path("out.safetensors").read_bytes()) == (1, b"precious")
    assert "--force" in refused.err
    assert sdops("apply", model, "--lora", lora, "-o", "out.safetensors", "-f").code == 0


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["m.safetensors"], 2, "--lora"),
        (["m.safetensors", "--lora", "absent.safetensors:0.4"], 1, "absent.safetensors"),
        (["absent.safetensors", "--lora", "x.safetensors"], 1, "absent.safetensors"),
        (["m.safetensors", "--lora", "x.safetensors:much"], 2, "neither a number nor a rule"),
        (["m.safetensors", "--lora", "x.safetensors:0.5, IN77=1"], 2, "IN77"),
        (["m.safetensors", "--lora", "x.safetensors", "--rounding", "up"], 2, "up"),
        (["x.safetensors", "--lora", "m.safetensors"], 2, "is an adapter itself"),
        (["m.safetensors", "--lora", "m.safetensors"], 1, "is no adapter"),
    ],
)
def test_refusals(sdops, files, arguments, code, message):
    before = sorted(os.listdir())
    found = sdops("apply", *arguments)
    assert found.code == code
    assert message in found.err
    assert sorted(path for path in os.listdir() if path != "cache") == [path for path in before if path != "cache"]


def test_what_a_bf16_model_swallows_is_warned_of(sdops, files):
    tiny.write(Path("bf16.safetensors"), tiny.checkpoint(1, "BF16"))
    done = sdops("apply", "bf16.safetensors", "--lora", f"{files[1]}:0.0005")
    assert "warning: rounding to BF16 kept only" in done.err
    assert "--rounding stochastic" in done.err
    options = ["--rounding", "stochastic", "--seed", "3", "--json", "-o", "out.safetensors"]
    facts = sdops("apply", "bf16.safetensors", "--lora", f"{files[1]}:0.0005", *options).json
    assert facts["recipe"]["rounding"] == "stochastic"
    assert facts["kept_overall"] > 0.5


def test_a_merge_takes_loras(sdops, files):
    tiny.write(Path("b.safetensors"), tiny.checkpoint(2))
    done = sdops("merge", "m.safetensors", "b.safetensors", "--alpha", "0.3", "--lora", f"{files[1]}:0.8", "--json")
    assert done.code == 0
    assert done.json["verb"] == "merge"
    output = Path("m+b.weighted-sum.alpha0.3+x0.8.safetensors")
    made = json.loads(tiny.metadata_of(output)["sdops"])
    assert made["inputs"][0]["recipe"]["method"] == "weighted-sum"
    assert sdops("merge", "m.safetensors", "b.safetensors", "--lora", f"{files[1]}:0.8", "-n").code == 0


def test_help_is_narrow_and_has_examples(sdops):
    text = sdops("apply", "--help").out
    assert "sdops apply sdxl.safetensors --lora style.safetensors:0.8" in text
    assert max(map(len, text.splitlines())) <= 110


def test_plain_loras_need_no_torch(files):
    code = (
        "import sys; from sdops.commands.main import main\n"
        "code = main(sys.argv[1:]); print('torch' in sys.modules, file=sys.stderr); sys.exit(code)"
    )
    command = [sys.executable, "-c", code, "apply", files[0], "--lora", files[1], "-q"]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    assert done.stderr.strip().endswith("False")
