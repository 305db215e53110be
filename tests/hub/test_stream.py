"""`--stream` where files are read by several steps, several builds, or in another order than they have."""

from __future__ import annotations

from pathlib import Path

import pytest

from sdops.core.sink import in_safetensors_order
from sdops.verbs._convert_checkpoint import Conversion, open_all
from sdops.verbs._convert_order import as_inputs_lie
from sdops.verbs._convert_wish import Wish
from tests.hub.server import Fault

INPUTS = """
[inputs]
a = "hf://ann/models/a.safetensors"
b = "hf://ann/models/b.safetensors"
[parameters]
alpha = 0.4
"""
CHAIN = (
    INPUTS
    + """
[[steps]]
id = "one"
verb = "merge"
models = ["a", "b"]
[[steps]]
id = "two"
verb = "merge"
models = ["one", "a"]
method = "slerp"
[[steps]]
verb = "merge"
models = ["two", "b"]
alpha = "$alpha"
"""
)
TWICE = (
    INPUTS
    + """
[[steps]]
id = "change"
verb = "extract"
tuned = "b"
base = "a"
rank = 2
[[steps]]
verb = "apply"
model = "a"
lora = ["change:$alpha"]
"""
)


@pytest.fixture
def remote(hub, tmp_path, model, tuned) -> int:
    """Two models on the Hub, and recipes here; gives the size of both."""
    hub.add("ann/models", {"a.safetensors": model, "b.safetensors": tuned})
    (tmp_path / "chain.toml").write_text(CHAIN)
    (tmp_path / "twice.toml").write_text(TWICE)
    return len(model) + len(tuned)


def left(home: Path, folder: Path) -> list[Path]:
    """What is kept of files on the Hub."""
    return [path for path in home.rglob("*") if path.is_file()] + list(folder.glob(".sdops*"))


@pytest.mark.parametrize("recipe", ["chain", "twice"])
def test_a_build_takes_every_byte_once_and_keeps_nothing(hub, sdops, home, tmp_path, remote, recipe):
    done = sdops("build", f"{recipe}.toml", "--stream", "-o", "streamed.safetensors")
    assert done.code == 0, done.err
    assert remote <= hub.sent() < 1.4 * remote  # headers come with 256 kB
    assert not left(home, tmp_path)
    assert sdops("build", f"{recipe}.toml", "-o", "kept.safetensors").code == 0
    assert len(list(home.rglob("blobs/*"))) == 2
    assert (tmp_path / "streamed.safetensors").read_bytes() == (tmp_path / "kept.safetensors").read_bytes()


def test_a_recipe_of_the_hub_is_not_kept_either(hub, sdops, home, tmp_path, remote):
    hub.add("ann/recipes", {"chain.toml": CHAIN.encode()})
    done = sdops("build", "hf://ann/recipes/chain.toml", "--stream", "-o", "streamed.safetensors")
    assert done.code == 0, done.err
    assert not left(home, tmp_path)
    hub.faults.append(Fault("GET /ann/recipes/resolve", flip=True))
    damaged = sdops("build", "hf://ann/recipes/chain.toml", "--stream", "-o", "two.safetensors")
    assert damaged.code == 1
    assert "arrived damaged" in damaged.err


def test_configurations_of_a_folder_are_not_kept(hub, sdops, home, tmp_path, small_checkpoint):
    folder = small_checkpoint("sd15-diffusers")
    files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    hub.add("ann/pipe", {**files, "tokenizer/merges.txt": b"#version: 0.2"})
    words = ("--to", "diffusers", "--dtype", "fp16", "--reference", "hf://ann/pipe", "--stream", "-o", "made")
    done = sdops("convert", "hf://ann/pipe", *words)
    assert done.code == 0, done.err
    assert not left(home, tmp_path)


@pytest.mark.parametrize("words", [["chain.toml", "--set", "alpha=0.1,0.2"], ["."]], ids=["sweep", "folder"])
def test_many_builds_take_every_byte_once(hub, sdops, home, tmp_path, remote, words):
    (tmp_path / "twice.toml").write_text(CHAIN.replace("[inputs]", 'name = "other"\n[inputs]').replace("0.4", "0.2"))
    (tmp_path / "streamed").mkdir()
    done = sdops("build", *words, "--stream", "-o", "streamed", "-q")
    assert done.code == 0, done.err
    assert remote <= hub.sent() < 1.6 * remote
    assert not left(home, tmp_path / "streamed")
    assert len(done.lines) == 2
    assert sdops("build", "chain.toml", *words[1:], "-o", "kept").code == 0
    kept = tmp_path / "kept"
    kept = min(kept.iterdir()) if kept.is_dir() else kept
    assert (tmp_path / done.lines[0]).read_bytes() == kept.read_bytes()


def test_workers_share_what_they_stream(hub, sdops, home, tmp_path, remote):
    pytest.importorskip("distributed", reason="the extra `cluster` is not installed")
    done = sdops("build", "chain.toml", "--set", "alpha=0.1,0.2", "--workers", "2", "--stream", "-o", "out")
    assert done.code == 0, done.err
    assert remote <= hub.sent() < 2.5 * remote  # each process asks for headers
    assert not left(home, tmp_path / "out")


def test_conversions_follow_the_input(small_checkpoint, tmp_path):
    """To a folder, whose files have another order, and back."""
    for name, to in (("sd15", "diffusers"), ("sd15-diffusers", "original")):
        origin, _ = open_all(small_checkpoint(name), [])
        made = Conversion(origin, [], tmp_path / to, Wish(to))
        usual, order = list(made.sink.specs), list(as_inputs_lie(made.sink, made.tensors).specs)
        assert sorted(order) == sorted(usual)
        ranks = {key: number for number, key in enumerate(origin.specs)}

        def places(keys: list[str], made: Conversion = made, ranks: dict[str, int] = ranks) -> list[int]:
            firsts = [made.tensors[key].made.ranges[0] for key in keys]
            return [ranks[first.key] for first in firsts if first.source is made.source]

        assert places(order) == sorted(places(usual)) != places(usual)
        made.close()


def test_scales_come_with_their_weights(small_checkpoint, tmp_path):
    origin, _ = open_all(small_checkpoint("sd15"), [])
    wish = Wish("safetensors", {"": "F8_E4M3"}, scaled="new")
    made = Conversion(origin, [], tmp_path / "x.safetensors", wish)
    assert list(made.sink.specs) == list(in_safetensors_order(made.sink.specs))
    order = list(as_inputs_lie(made.sink, made.tensors).specs)
    scales = [key for key in order if key.endswith(".weight_scale")]
    assert scales
    assert all(abs(order.index(key) - order.index(key.replace("_scale", ""))) <= 2 for key in scales)
    made.close()


def test_a_block_that_models_lack_is_told_from_their_headers(hub, sdops, home, tmp_path, remote):
    (tmp_path / "wrong.toml").write_text(CHAIN.replace('alpha = "$alpha"', 'alpha = "$alpha, BLOCK=1"'))
    done = sdops("build", "wrong.toml", "-o", "out.safetensors")
    assert done.code != 0
    assert "`BLOCK`" in done.err
    assert hub.sent() < remote / 2
    assert not list(home.rglob("blobs/*"))
