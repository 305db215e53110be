"""`sdops merge` as a command: options and knobs, names, forms of the report, exit codes, what it imports."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from sdops.card import cards
from sdops.commands._options import _bytes
from sdops.commands.merge import _method_in
from tests import tiny


@pytest.fixture(autouse=True)
def models(clean_environment: None) -> None:
    """base, a, b, c .safetensors in the current folder."""
    for seed, name in enumerate(["base", "a", "b", "c"]):
        tiny.write(Path(f"{name}.safetensors"), tiny.checkpoint(seed))


A, B, C, BASE = (f"{name}.safetensors" for name in ("a", "b", "c", "base"))


def test_the_shortest_call(sdops):
    done = sdops("merge", A, B)
    assert done.code == 0
    assert "a+b.weighted-sum.safetensors" in done.out
    out = tiny.load(Path("a+b.weighted-sum.safetensors"))
    a, b = (tiny.numbers(tiny.checkpoint(seed)[tiny.LARGE]) for seed in (1, 2))
    assert np.array_equal(out[tiny.LARGE][1], ((a + b) / 2).astype("f2"))


def test_four_forms(sdops):
    quiet = sdops("merge", A, B, "--alpha", "0.3", "-q")
    assert quiet.out == "a+b.weighted-sum.alpha0.3.safetensors\n"
    assert quiet.err == ""
    data = sdops("merge", A, B, "--alpha", "0.3", "--json", "-f").json
    assert data["verb"] == "merge"
    assert data["output"] == "a+b.weighted-sum.alpha0.3.safetensors"
    assert data["recipe"]["knobs"] == {"alpha": 0.3}
    assert data["tensors"] == {"merge": 18, "copy": 1}
    assert data["retained"].keys() == {"`b.safetensors`"}
    human = sdops("merge", A, B, "--alpha", "0.3", "-f", "-o", "x.safetensors")
    for word in ("x.safetensors", "a + alpha (b - a)", "alpha 0.3", "retained of `b.safetensors`", "18 tensors"):
        assert word in human.out


def test_a_dry_run_writes_nothing_and_says_so(sdops):
    done = sdops("merge", A, B, "-n", "--alpha", "0.5, vae=0, IN00-IN05=0.1", "--exclude", "*.bias", "--dtype", "fp32")
    assert done.code == 0
    assert not list(Path().glob("*weighted*"))
    for word in ("alpha: vae=0.0", "4 tensors", "excluded", "reads", "writes", "about", "1 pass", "F32"):
        assert word in done.out
    assert "nothing was written" in done.err
    assert sdops("merge", A, B, "-n", "--json").json["dry_run"] is True


def test_a_dry_run_makes_the_checks_of_the_real_run(sdops):
    Path("old.safetensors").write_text("mine")
    for arguments, message in [
        (["-o", "old.safetensors"], "exists already"),
        (["-o", A, "-f"], "is the input"),
        (["-o", "absent/x.safetensors"], "does not exist"),
        (["-o", "newdir/"], "is a folder, not a file"),
        (["-m", "rotate", "--memory", "10MB"], "not enough"),
    ]:
        done = sdops("merge", A, B, "-n", *arguments)
        assert done.code in (1, 2)
        assert message in done.err


@pytest.mark.parametrize("form", [["-m", "ties"], ["-mties"], ["--method", "ties"], ["--method=ties"], ["-fm", "ties"]])
def test_knobs_of_the_method_are_options(form, sdops):
    knobs = ["--density", "0.5, vae=1", "--weights", "1,0.5", "--no-normalize"]
    done = sdops("merge", A, B, "--base", BASE, *form, *knobs, "--json")
    assert done.code == 0
    knobs = done.json["recipe"]["knobs"]
    assert knobs["density"] == "0.5, vae=1.0"
    assert knobs["weights"] == [1.0, 0.5]
    assert knobs["normalize"] is False
    name = "a+b.ties.density-blocks.weights1_0.5.normalize-False.safetensors"
    assert Path(done.json["output"]).name == name


def test_where_the_method_is_looked_for():
    assert _method_in(["a", "-m", "slerp", "b"]) == "slerp"
    assert _method_in(["-nfmslerp"]) == "slerp"
    assert _method_in(["-m", "slerp", "--method=ties"]) == "ties"
    assert _method_in(["--memory", "3G", "--missing=keep"]) == "weighted-sum"
    assert _method_in(["--", "-m", "slerp"]) == "weighted-sum"


@pytest.mark.parametrize("method", sorted(cards()))
def test_every_method_has_help(method, sdops):
    done = sdops("merge", "-m", method.replace("_", "-"), "--help")
    assert done.code == 0
    for knob in cards()[method].knobs:
        assert f"--{knob.name.replace('_', '-')}" in done.out


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        ([A], 2, ["2 models", "1 given"]),
        ([A, B, C], 2, ["2 models", "3 given"]),
        ([A, B, "-m", "wieghted-sum"], 2, ["no merge method", "did you mean `weighted-sum`"]),
        ([A, B, "--alhpa", "1"], 2, ["no option `--alhpa`", "did you mean `--alpha`"]),
        ([A, B, "--density", "1"], 2, ["no option `--density`"]),
        ([A, B, "--alpha", "much"], 2, ["`much`", "neither a number nor a rule"]),
        ([A, B, "--alpha", "0.3, vea=0"], 2, ["`vea`", "did you mean `vae`"]),
        ([A, B, "--alpha", "0.3, *attn9*=0"], 2, ["*attn9*", "matches none"]),
        ([A, B, "--exclude", "attn2"], 2, ["matches no tensor"]),
        ([A, B, "-m", "ties"], 2, ["common ancestor", "--base FILE"]),
        ([A, B, "-m", "dare-linear", "--base", BASE, "--density", "1.5"], 2, ["`density` is 1.5", "between 0 and 1"]),
        ([A, B, "-m", "linear", "--weights", "1;2"], 2, ["not a list of numbers"]),
        ([A, B, "--memory", "much"], 2, ["not an amount of memory"]),
        ([A, B, "--dtype", "fp8"], 2, ["fp8", "keep"]),
        ([A, "absent.safetensors"], 1, ["absent.safetensors"]),
        ([A, B, "-o", A, "--force"], 1, ["is the input"]),
    ],
)
def test_what_is_refused(arguments, code, words, sdops):
    before = sorted(path.name for path in Path().iterdir())
    done = sdops("merge", *arguments)
    assert (done.code, done.out) == (code, "")
    for word in words:
        assert word in done.err
    assert sorted(path.name for path in Path().iterdir() if path.name != "cache") == [n for n in before if n != "cache"]


def test_an_output_is_replaced_only_by_force(sdops):
    assert sdops("merge", A, B).code == 0
    again = sdops("merge", A, B)
    assert again.code == 1
    assert "exists already" in again.err
    assert "--force" in again.err
    assert sdops("merge", A, B, "--force").code == 0


def test_warnings_come_on_stderr_and_in_json(sdops):
    for name, seed in (("x", 1), ("y", 2)):
        tiny.write(Path(f"{name}.safetensors"), tiny.checkpoint(seed, "BF16"))
    done = sdops("merge", "x.safetensors", "y.safetensors", "--alpha", "0.002")
    assert done.code == 0
    assert "warning: rounding swallowed" in done.err
    assert "--dtype fp32" in done.err
    done = sdops("merge", "x.safetensors", "y.safetensors", "--alpha", "0.002", "--json", "-f")
    assert any("rounding swallowed" in text for text in done.json["warnings"])


def test_parts_seeds_hashes_and_ballast(sdops):
    done = sdops("merge", A, B, "--vae", C, "--text-encoder", BASE, "--prune", "--no-hash", "--seed", "4", "-j", "2",
                 "--missing", "keep", "-o", "o.safetensors", "--json")  # fmt: skip
    assert done.code == 0
    recipe = json.loads(tiny.metadata_of(Path("o.safetensors"))["sdops"])
    assert recipe["prune"] is True
    assert recipe["missing"] == "keep"
    assert [set(item) for item in recipe["inputs"]] == [{"role", "file"}] * 4
    assert [item["role"] for item in recipe["inputs"]] == ["a", "b", "vae", "text_encoder"]


def test_options_have_environment_twins(sdops, monkeypatch):
    monkeypatch.setenv("SDOPS_MERGE_ALPHA", "0.25")
    assert sdops("merge", A, B, "-q").out == "a+b.weighted-sum.alpha0.25.safetensors\n"


@pytest.mark.parametrize(
    ("text", "nbytes"), [("300MB", 300_000_000), ("2G", 2 * 10**9), ("1.5 GiB", 3 << 29), ("64k", 64_000), ("9", 9)]
)
def test_amounts_of_memory(text, nbytes):
    assert _bytes(None, None, text) == nbytes


@pytest.mark.parametrize(
    ("arguments", "absent"),
    [
        ([A, B, "-n"], {"torch", "numpy"}),
        ([A, B, "-m", "ties", "--base", BASE, "-n"], {"torch", "numpy"}),
        ([A, B, "--alhpa", "1"], {"torch", "numpy"}),
        ([A, B, "-m", "tise"], {"torch", "numpy"}),
        ([A, B, "--alpha", "0.3, x=1"], {"torch", "numpy"}),
        ([A, B], {"torch"}),
    ],
)
def test_what_is_not_imported(arguments, absent):
    code = "import sys; from sdops.commands.main import main; main(sys.argv[1:]); print('MODULES', *sys.modules)"
    done = subprocess.run([sys.executable, "-c", code, "merge", *arguments], check=True, capture_output=True, text=True)
    assert not absent & set(done.stdout.rpartition("MODULES")[2].split())
