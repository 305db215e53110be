"""Shards and folders: what huggingface_hub would have written, all of it or nothing."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
from huggingface_hub import split_torch_state_dict_into_shards

from sdops.core.run import run
from sdops.core.sink import SafetensorsSink
from sdops.core.sink_folder import FolderSink, Tensors
from sdops.core.sink_shards import ShardedSink, create_shards, split
from sdops.core.source import read
from sdops.core.spec import Spec
from sdops.errors import OutputError
from sdops.formats import open_source
from tests.tiny import Memory, Model, metadata_of

RNG = np.random.default_rng(0)
MODEL: Model = {f"layer.{i}": ("F32", RNG.standard_normal((i % 5 + 1, 50)).astype("f4")) for i in range(20)}
MODEL |= {
    "half": ("F16", np.ones((3, 4), "f2")),
    "huge": ("F32", np.ones(3000, "f4")),
    "empty": ("F32", np.zeros(0, "f4")),
}
JSON = b'{"_class_name": "Pipeline"}\n'


def sharded(path: Path, *, shard: int = 4000, force: bool = False, jobs: int = 2) -> Path:
    source = Memory(MODEL)
    with create_shards(path, source.specs, {"format": "pt", "sha": "00"}, shard=shard, force=force) as sink:
        run(source, sink, jobs=jobs)
        return sink.commit({"sha": "ab"})


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.parametrize("limit", [1, 800, 4000, 10_000, 10**6])
def test_shards_are_those_of_huggingface(limit):
    import torch

    state = {key: torch.from_numpy(np.array(array)) for key, (_, array) in MODEL.items()}
    plan = split_torch_state_dict_into_shards(state, max_shard_size=limit)
    ours = split(Memory(MODEL).specs, limit)
    assert [list(shard) for shard in ours] == list(plan.filename_to_tensors.values())
    assert all(len(shard) == 1 or sum(spec.nbytes for spec in shard.values()) <= limit for shard in ours)


def test_shards_and_index_are_read_back(tmp_path):
    index = sharded(tmp_path / "model.fp16.safetensors")
    assert index.name == "model.fp16.safetensors.index.json"
    names = sorted(path.name for path in tmp_path.iterdir())
    total = len(names) - 1
    assert names[:-1] == [f"model.fp16-{i:05d}-of-{total:05d}.safetensors" for i in range(1, total + 1)]
    source = Memory(MODEL)
    content = json.loads(index.read_text())
    assert content["metadata"] == {"total_size": sum(spec.nbytes for spec in source.specs.values())}
    assert list(content["weight_map"]) == sorted(MODEL)
    assert metadata_of(tmp_path / names[0]) == {"format": "pt", "sha": "ab"}
    back = open_source(index)
    assert dict(back.specs) == source.specs
    assert all(read(back, key) == read(source, key) for key in source.specs)
    back.close()


def test_one_shard_is_a_plain_file(tmp_path):
    path = sharded(tmp_path / "model.safetensors", shard=10**6)
    assert [path] == list(tmp_path.iterdir())
    with SafetensorsSink(tmp_path / "b", Memory(MODEL).specs, {"format": "pt", "sha": "ab"}, force=False) as sink:
        run(Memory(MODEL), sink, jobs=1)
        sink.commit()
    assert (tmp_path / "b").read_bytes() == path.read_bytes()


def test_shards_do_not_depend_on_threads(tmp_path):
    for jobs in (1, 5):
        (tmp_path / str(jobs)).mkdir()
        sharded(tmp_path / str(jobs) / "m.safetensors", jobs=jobs)
    assert contents(tmp_path / "1") == contents(tmp_path / "5")


def test_no_shard_without_the_others(tmp_path):
    with create_shards(tmp_path / "m.safetensors", Memory(MODEL).specs, {}, shard=4000, force=False):
        assert len(list(tmp_path.iterdir())) > 3
    assert list(tmp_path.iterdir()) == []
    with create_shards(tmp_path / "m.safetensors", Memory(MODEL).specs, {}, shard=4000, force=False) as sink:
        run(Memory(MODEL), sink, jobs=1)
        (tmp_path / "m.safetensors.index.json").write_text("somebody else's")
        with pytest.raises(OutputError, match="appeared"):
            sink.commit()
    assert [path.name for path in tmp_path.iterdir()] == ["m.safetensors.index.json"]


def test_existing_shards_are_refused_or_replaced(tmp_path):
    sharded(tmp_path / "m.safetensors")
    before = contents(tmp_path)
    with pytest.raises(OutputError, match="exists already"):
        sharded(tmp_path / "m.safetensors")
    sharded(tmp_path / "m.safetensors", force=True)
    assert contents(tmp_path) == before


PARTS = {"unet/a": MODEL["layer.4"], "unet/b": MODEL["half"], "vae/a": MODEL["huge"], "vae/b": MODEL["layer.0"]}
INNER = {
    name: {key.partition("/")[2]: Spec(d, a.shape) for key, (d, a) in PARTS.items() if key.startswith(name)}
    for name in ("unet", "vae")
}


def folder(path: Path, *, force: bool = False, commit: bool = True) -> Path:
    files: dict[str, bytes | Tensors] = {
        "model_index.json": b'{"unet": ["diffusers", "U"], "vae": ["diffusers", "V"]}',
        "unet/config.json": JSON,
        "unet/diffusion_pytorch_model.safetensors": Tensors(INNER["unet"], {"format": "pt"}),
        "vae/config.json": JSON,
        "vae/diffusion_pytorch_model.safetensors": Tensors(INNER["vae"], {"format": "pt"}, shard=4000),
        "tokenizer/special/deep.txt": b"",
    }
    with FolderSink(path, files, force=force) as sink:
        assert not path.exists() or force
        source = Memory(PARTS)
        assert set(sink.specs) == set(source.specs)
        assert sum(spec.nbytes for spec in sink.specs.values()) < sink.nbytes
        run(source, sink, jobs=2)
        return sink.commit() if commit else path


def test_a_folder_appears_as_a_whole(tmp_path):
    path = folder(tmp_path / "model")
    assert [p.name for p in tmp_path.iterdir()] == ["model"]
    assert sorted(contents(path)) == sorted([
        "model_index.json", "tokenizer/special/deep.txt", "unet/config.json",
        "unet/diffusion_pytorch_model.safetensors", "vae/config.json",
        "vae/diffusion_pytorch_model-00001-of-00002.safetensors",
        "vae/diffusion_pytorch_model-00002-of-00002.safetensors",
        "vae/diffusion_pytorch_model.safetensors.index.json",
    ])  # fmt: skip
    source, back = Memory(PARTS), open_source(path)
    assert dict(back.specs) == source.specs
    assert all(read(back, key) == read(source, key) for key in source.specs)
    back.close()
    assert (path / "unet").stat().st_mode & 0o777 == 0o777 & ~_umask()


def _umask() -> int:
    old = os.umask(0)
    os.umask(old)
    return old


def test_nothing_remains_of_a_folder_without_a_commit(tmp_path):
    folder(tmp_path / "model", commit=False)
    assert list(tmp_path.iterdir()) == []


def test_only_model_folders_are_replaced(tmp_path):
    path = folder(tmp_path / "model")
    (path / "old").write_text("goes")
    before = contents(path)
    with pytest.raises(OutputError, match="exists already"):
        folder(path)
    folder(path, force=True, commit=False)
    assert contents(path) == before
    folder(path, force=True)
    assert set(before) - set(contents(path)) == {"old"}
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").touch()
    with pytest.raises(OutputError, match="other things"):
        folder(tmp_path / "home", force=True)
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="is a file"):
        folder(tmp_path / "file", force=True)
    with pytest.raises(OutputError, match="does not exist"):
        folder(tmp_path / "absent" / "model")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "home", "model"]


def test_a_folder_that_appears_meanwhile_is_kept(tmp_path):
    with FolderSink(tmp_path / "m", {"config.json": JSON}, force=False) as sink:
        (tmp_path / "m").mkdir()
        (tmp_path / "m" / "mine").touch()
        with pytest.raises(OutputError, match="appeared"):
            sink.commit()
    assert list(tmp_path.iterdir()) == [tmp_path / "m"]


def test_left_over_folders_of_killed_runs_go(tmp_path):
    with FolderSink(tmp_path / "m", {"config.json": JSON}, force=False):
        (alive,) = tmp_path.iterdir()
        dead = tmp_path / f".sdops-{alive.name.split('-')[1]}-0.tmp"
        (dead / "unet").mkdir(parents=True)
        with FolderSink(tmp_path / "m", {"config.json": JSON}, force=False):
            assert alive.exists()
            assert not dead.exists()


def test_the_index_is_published_last(tmp_path, monkeypatch):
    names: list[str] = []
    monkeypatch.setattr(os, "link", lambda a, b: (names.append(Path(b).name), os.rename(a, b)))
    sharded(tmp_path / "m.safetensors")
    assert names[-1].endswith(".index.json")
    assert isinstance(
        create_shards(tmp_path / "x.safetensors", Memory(MODEL).specs, {}, shard=9, force=False), ShardedSink
    )
