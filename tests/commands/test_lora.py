"""`sdops resize`, `merge`, `convert`, `compare` and `inspect` of LoRAs, as commands."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fixtures import loras
from sdops.verbs._adapters import open_adapter

SHARED = Path(__file__).parents[3] / "shared" / "data" / "loras"


@pytest.fixture
def files(tmp_path, monkeypatch):
    """Two LoRAs in the working folder."""
    monkeypatch.chdir(tmp_path)
    loras.save(tmp_path / "a.safetensors", loras.tensors("kohya", loras.SPELLINGS["kohya", "sd1"], "lora_alpha", 4))
    loras.save(tmp_path / "b.safetensors", loras.tensors("kohya", loras.SPELLINGS["kohya", "sd1"], "loha", 2))


@pytest.mark.usefixtures("files")
def test_resize(sdops):
    done = sdops("resize", "a.safetensors", "--rank", "2", "--no-progress")
    assert (done.code, done.out.strip().splitlines()[-1] != "") == (0, True)
    assert "error" in done.out
    assert Path("a.resized.safetensors").is_file()
    again = sdops("resize", "a.safetensors", "--budget", "40kB", "-q", "-f", "--no-progress")
    assert (again.code, again.out) == (0, "a.resized.safetensors\n")
    assert Path("a.resized.safetensors").stat().st_size <= 40_000
    assert sdops("resize", "a.safetensors", "--rank", "2", "--energy", "0.5").code == 2


@pytest.mark.usefixtures("files")
@pytest.mark.parametrize("method", ["concat", "svd", "ties", "dare", "knots", "orthogonal"])
def test_merge_by_every_method(method, sdops):
    done = sdops("merge", "a.safetensors", "b.safetensors", "-m", method, "--weights", "0.7,-0.3", "--json")
    assert done.code == 0, done.err
    assert json.loads(done.out)["method"] == method
    assert open_adapter(f"a+b.{method}.safetensors").patches


@pytest.mark.usefixtures("files")
def test_merge_without_a_method_is_the_sum(sdops):
    done = sdops(
        "merge", "a.safetensors", "b.safetensors", "-q", "--blocks", "IN01=0.5", "--rank", "3", "--to", "comfy"
    )
    assert (done.code, done.out) == (0, "a+b.concat.safetensors\n")
    assert open_adapter("a+b.concat.safetensors").dialect == "comfy"
    refused = sdops("merge", "a.safetensors", "b.safetensors", "--alpha", "0.2")
    assert refused.code == 2
    assert "--weights" in refused.err
    assert "knots" in sdops("merge", "-m", "knots", "--help").out
    assert "knots" in sdops("methods").out
    assert sdops("methods", "knots").code == 0


@pytest.mark.usefixtures("files")
def test_convert(sdops):
    assert sdops("convert", "a.safetensors", "--to", "diffusers", "-q").out == "a.diffusers.safetensors\n"
    done = sdops("convert", "b.safetensors", "--family", "lora", "--rank", "2")
    assert done.code == 0, done.err
    assert "captured" in done.out
    refused = sdops("convert", "b.safetensors", "--to", "diffusers")
    assert refused.code == 1
    assert "--family lora" in refused.err


@pytest.mark.usefixtures("files")
def test_compare_and_inspect(sdops):
    assert sdops("compare", "a.safetensors", "a.safetensors", "-q").out == "1.000000\n"
    done = sdops("compare", "a.safetensors", "b.safetensors")
    assert done.code == 0
    assert "IN01" in done.out
    told = sdops("inspect", "--norms", "b.safetensors").out
    assert "loha" in told
    assert "OUT11" in told


@pytest.mark.skipif(not SHARED.exists(), reason="the real files are not here")
@pytest.mark.parametrize("path", sorted(SHARED.glob("*.*")) if SHARED.exists() else [], ids=lambda path: path.name)
def test_real_files_through_all_verbs(path, sdops, tmp_path):
    assert sdops("inspect", "-q", str(path)).code == 0
    if not open_adapter(path).patches:
        return
    small, merged, kohya = (str(tmp_path / f"{name}.safetensors") for name in ("small", "merged", "kohya"))
    assert sdops("resize", str(path), "--rank", "1", "--to", "kohya", "-o", small, "--no-hash").code == 0
    assert sdops("convert", str(path), "--to", "kohya", "-o", kohya).code == 0
    assert sdops("merge", kohya, small, "--weights", "1,-1", "-m", "svd", "--rank", "2", "-o", merged).code == 0
    assert float(sdops("compare", kohya, small, "-q").out) > 0


@pytest.mark.usefixtures("files")
def test_diff_sees_loras_through_their_dialects(sdops):
    assert sdops("convert", "a.safetensors", "--to", "diffusers", "-o", "there.safetensors").code == 0
    done = sdops("diff", "a.safetensors", "there.safetensors")
    assert done.code == 0
    assert "kohya" in done.out
    assert "diffusers" in done.out
    assert sdops("diff", "b.safetensors", "there.safetensors").code == 1
