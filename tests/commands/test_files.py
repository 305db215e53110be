"""`hash` and `verify` as commands: the forms of their reports, several files, hostile names."""

from __future__ import annotations

import hashlib
import json
import subprocess
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

HOSTILE = "\x1b]0;owned\x07[/foo]\u202e"


@pytest.fixture
def good() -> Path:
    path = Path("good.safetensors")
    save_file({"w": np.arange(6, dtype=np.float16), HOSTILE: np.zeros(2, np.float32)}, path, {"title": HOSTILE})
    return path


@pytest.fixture
def bad() -> Path:
    path = Path("bad.safetensors")
    save_file({HOSTILE: np.array([np.nan], np.float32)}, path)
    return path


def test_hash_in_four_forms(sdops, good):
    digest = hashlib.sha256(good.read_bytes()).hexdigest()
    human, data, quiet, verbose = (sdops("hash", str(good), *option) for option in ([], ["--json"], ["-q"], ["-v"]))
    assert human.out.splitlines()[:2] == ["good.safetensors", f"  sha256                 {digest}"]
    assert data.json["verb"] == "hash"
    assert data.json["files"][0]["sha256"] == digest
    assert quiet.out == f"{digest}  good.safetensors\n"
    assert verbose.out == human.out
    assert {done.code for done in (human, data, quiet, verbose)} == {0}
    assert {done.err for done in (human, data, quiet, verbose)} == {""}


def test_the_quiet_form_of_hash_is_read_by_sha256sum(sdops, good, bad):
    Path("SUMS").write_text(sdops("hash", "-q", str(good), str(bad)).out)
    assert subprocess.run(["sha256sum", "--check", "--status", "SUMS"], check=False).returncode == 0


def test_verify_in_four_forms(sdops, good, bad):
    human, data, quiet = (sdops("verify", str(good), str(bad), *option) for option in ([], ["--json"], ["-q"]))
    assert {done.code for done in (human, data, quiet)} == {1}
    assert quiet.out == "good.safetensors: ok\nbad.safetensors: damaged\n"
    assert [entry["damaged"] for entry in data.json["files"]] == [False, True]
    assert ["state", "ok"] in [line.split() for line in human.out.splitlines()]
    assert "1 NaN of 1" in human.out
    assert sdops("verify", str(good)).code == 0
    assert "Tensors of zeros" in sdops("verify", "-v", str(good)).out


@pytest.mark.parametrize(
    "arguments", [["verify"], ["verify", "-v"], ["verify", "--color=never"], ["inspect", "--keys"]]
)
def test_hostile_names_do_not_reach_the_terminal(arguments, sdops, good, bad):
    done = sdops(*arguments, str(good), str(bad))
    text = done.out + done.err
    assert all(line.isprintable() for line in text.splitlines())
    assert "\\x1b]0;owned\\x07[/foo]\\u202e" in text


@pytest.mark.parametrize("command", ["hash", "verify", "inspect"])
def test_a_missing_file(command, sdops, good):
    done = sdops(command, "god.safetensors")
    assert done.code == 1
    assert done.out == ""
    assert done.err.startswith("error: ")
    assert "`god.safetensors`" in done.err


@pytest.mark.parametrize("command", ["hash", "verify", "inspect"])
def test_among_several_files_one_that_fails_is_told_and_the_rest_done(command, sdops, good):
    done = sdops(command, "absent.safetensors", str(good))
    assert done.code == 1
    assert "error: " in done.out
    assert "good.safetensors" in done.out
    data = sdops(command, "--json", "absent.safetensors", str(good)).json["files"]
    assert ["error" in entry for entry in data] == [True, False]


@pytest.fixture
def folder() -> Path:
    """A diffusers folder with one component in two shards."""
    unet = Path("model/unet")
    unet.mkdir(parents=True)
    parts = {"_class_name": "StableDiffusionPipeline", "unet": ["diffusers", "UNet2DConditionModel"]}
    Path("model/model_index.json").write_text(json.dumps(parts))
    (unet / "config.json").write_text("{}")
    shards = {f"diffusion_pytorch_model-0000{i}-of-00002.safetensors": f"w{i}" for i in (1, 2)}
    for name, key in shards.items():
        save_file({key: np.array([1, np.nan], np.float16)}, unet / name)
    index = {"metadata": {"total_size": 8}, "weight_map": {key: name for name, key in shards.items()}}
    (unet / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    return Path("model")


def test_folders(sdops, folder):
    (inspected,) = sdops("inspect", "--json", str(folder)).json["files"]
    assert (inspected["parts"], inspected["tensors"]) == (2, 2)
    hashed = sdops("hash", "--json", str(folder)).json["files"]
    names = [f"model/unet/diffusion_pytorch_model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    assert [entry["file"] for entry in hashed] == names
    assert [entry["sha256"] for entry in hashed] == [hashlib.sha256(Path(n).read_bytes()).hexdigest() for n in names]
    verified = sdops("verify", "--json", str(folder))
    assert verified.code == 1
    assert len(verified.json["files"][0]["damage"]) == 2


@pytest.mark.parametrize("command", ["hash", "verify", "inspect"])
def test_file_names_from_outside_unicode(command, sdops, tmp_path):
    path = tmp_path / "\udc80\x1b[31m.safetensors"
    save_file({"w": np.zeros(2, np.float16)}, tmp_path / "plain")
    (tmp_path / "plain").rename(path)
    done = sdops(command, str(path))
    assert done.code == 0
    assert "\\udc80\\x1b[31m.safetensors" in done.out
    assert sdops(command, "--json", str(path)).json["files"][0]["file"] == str(path)
