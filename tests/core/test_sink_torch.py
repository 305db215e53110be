"""Checkpoints written without torch: read by torch, by zip readers, by checkers, and the same whoever writes them."""

from __future__ import annotations

import os
import pickletools
import re
import zipfile
from pathlib import Path
from zlib import crc32

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sdops.core import sink_torch
from sdops.core.checksum import PieceChecksums, combine
from sdops.core.run import run
from sdops.core.sink_torch import TorchSink
from sdops.core.source import read
from sdops.core.spec import Spec
from sdops.errors import OutputError
from sdops.formats import open_source
from tests.tiny import Memory, Model

DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.uint16: "U16",
    torch.uint32: "U32", torch.uint64: "U64", torch.bool: "BOOL", torch.complex64: "C64",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2", torch.float8_e4m3fnuz: "F8_E4M3FNUZ",
    torch.float8_e5m2fnuz: "F8_E5M2FNUZ", torch.float8_e8m0fnu: "F8_E8M0",
}  # fmt: skip
SHAPES = [(), (1,), (7, 3), (0, 5), (4, 3, 3, 3)]
A1111 = re.compile(r"^([^/]+)/((data/\d+)|version|(data\.pkl))$")  # what its checker lets through


def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    made = {}
    for dtype in DTYPES:
        for shape in SHAPES:
            numel = int(np.prod(shape))
            raw = torch.randint(0, 2, (numel * dtype.itemsize,), dtype=torch.uint8, generator=generator)
            made[f"{dtype}.ü{shape}"] = raw.view(dtype).reshape(shape) if numel else torch.empty(shape, dtype=dtype)
    return made


def model_of(tensors: dict[str, torch.Tensor]) -> Model:
    model = {}
    for key, tensor in tensors.items():
        raw = tensor.reshape(-1).view(torch.uint8).numpy() if tensor.numel() else np.empty(0, np.uint8)
        model[key] = (DTYPES[tensor.dtype], np.frombuffer(raw.tobytes(), f"V{tensor.itemsize}").reshape(tensor.shape))
    return model


def written(path: Path, source: Memory, *, wrap: str = "state_dict", jobs: int = 1) -> Path:
    with TorchSink(path, source.specs, {"format": "pt", "note": "x"}, wrap=wrap, force=False) as sink:
        run(source, sink, jobs=jobs)
        sink.commit({"note": "y"})
    return path


@pytest.mark.parametrize("wrap", ["state_dict", ""])
@pytest.mark.parametrize("mmap", [False, True])
def test_torch_reads_it_with_weights_only(tmp_path, wrap, mmap):
    expected = tensors()
    path = written(tmp_path / "out.ckpt", Memory(model_of(expected)), wrap=wrap)
    loaded = torch.load(path, weights_only=True, mmap=mmap)
    if wrap:
        assert {key: value for key, value in loaded.items() if key != wrap} == {"format": "pt", "note": "y"}
        loaded = loaded[wrap]
    assert list(loaded) == list(expected)
    for key, tensor in expected.items():
        assert (loaded[key].dtype, loaded[key].shape) == (tensor.dtype, tensor.shape)
        assert loaded[key].stride() == tensor.stride()
        assert torch.equal(loaded[key].view(torch.uint8), tensor.view(torch.uint8)) if tensor.ndim else True
        assert loaded[key].untyped_storage().nbytes() == tensor.nbytes


def test_sdops_reads_it_back(tmp_path):
    source = Memory(model_of(tensors()))
    back = open_source(written(tmp_path / "out.ckpt", source))
    assert list(back.specs) == list(source.specs)
    assert back.metadata == {"format": "pt", "note": "y"}
    for key in source.specs:
        assert back.specs[key] == source.specs[key]
        assert read(back, key) == read(source, key)
    back.close()


def test_the_archive_is_sound_and_holds_what_checkers_allow(tmp_path):
    path = written(tmp_path / "out.ckpt", Memory(model_of(tensors())))
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None  # all checksums
        names = archive.namelist()
        for info in archive.infolist():
            raw = path.read_bytes()[info.header_offset :]
            start = (
                info.header_offset + 30 + int.from_bytes(raw[26:28], "little") + int.from_bytes(raw[28:30], "little")
            )
            assert start % 64 == 0
        pickle = archive.read("archive/data.pkl")
    assert names[0] == "archive/data.pkl"
    assert all(A1111.match(name) for name in names)
    symbols = {argument for opcode, argument, _ in pickletools.genops(pickle) if opcode.name == "GLOBAL"}
    old = {symbol for symbol in symbols if "Storage" in symbol}
    assert symbols - old >= {"collections OrderedDict", "torch._utils _rebuild_tensor_v2"}
    assert len(pickle) > 1000


def test_many_tensors(tmp_path):
    source = Memory({f"t{i}": ("F32", np.full(1, i, "f4")) for i in range(2500)})
    path = written(tmp_path / "out.pt", source)
    loaded = torch.load(path, weights_only=True)["state_dict"]
    assert [int(value) for value in loaded.values()] == list(range(2500))


def test_the_bytes_do_not_depend_on_threads_order_or_name(tmp_path):
    rng = np.random.default_rng(0)
    source = Memory({f"t{i}": ("F32", rng.standard_normal((i * 97, 1001)).astype("f4")) for i in range(12)})
    first = written(tmp_path / "a.ckpt", source, jobs=1).read_bytes()
    assert written(tmp_path / "b.pt", source, jobs=5).read_bytes() == first
    with TorchSink(tmp_path / "c", source.specs, {"format": "pt", "note": "y"}, force=False) as sink:
        for key in reversed(list(source.specs)):
            data = read(source, key)
            for start in reversed(range(0, len(data), 77_777)):
                sink.write(key, start, memoryview(data)[start : start + 77_777])
        sink.commit()
    assert (tmp_path / "c").read_bytes() == first


def test_forked_processes_share_the_checksums(tmp_path):
    data = os.urandom(10_000)
    with TorchSink(tmp_path / "out", {"w": Spec("U8", (10_000,))}, {}, force=False) as sink:
        children = []
        for start in range(0, 10_000, 1000):
            children.append(os.fork())
            if children[-1] == 0:
                sink.write("w", start, memoryview(data)[start : start + 1000])
                os._exit(0)
        assert [os.waitpid(child, 0)[1] for child in children] == [0] * 10
        sink.commit()
    with zipfile.ZipFile(tmp_path / "out") as archive:
        assert archive.read("archive/data/0") == data


def test_what_was_not_written_is_noticed(tmp_path):
    with TorchSink(tmp_path / "out", {"w": Spec("U8", (4,))}, {}, force=False) as sink:
        sink.write("w", 0, memoryview(b"abc"))
        with pytest.raises(RuntimeError, match="not written"):
            sink.commit()
    assert list(tmp_path.iterdir()) == []


def test_a_dtype_that_torch_lacks(tmp_path):
    with pytest.raises(OutputError, match="F6_E2M3"):
        TorchSink(tmp_path / "out", {"w": Spec("F6_E2M3", (4,))}, {}, force=False)
    assert list(tmp_path.iterdir()) == []


def test_large_members_and_places_take_64_bits(tmp_path, monkeypatch):
    monkeypatch.setattr(sink_torch, "_LIMIT", 5000)
    monkeypatch.setattr(sink_torch, "_MANY", 3)
    rng = np.random.default_rng(0)
    source = Memory({f"t{i}": ("U8", rng.integers(0, 256, 2500 * i, "u1")) for i in range(5)})
    data = written(tmp_path / "out", source).read_bytes()
    # with the true limits in mind a reader takes the fields literally: put the mark that they stand for
    monkeypatch.undo()
    marked = data.replace((5000).to_bytes(4, "little") * 2, b"\xff" * 8)
    assert marked.count(b"PK\6\6") == 1
    assert len(marked) == len(data)


@pytest.mark.slow
def test_beyond_four_gigabytes(tmp_path):
    specs = {"big": Spec("U8", ((1 << 32) + 5,)), "small": Spec("U8", (3,)), "last": Spec("F32", (2,))}
    zeros = memoryview(bytes(1 << 26))
    with TorchSink(tmp_path / "out", specs, {}, force=False) as sink:
        for key, spec in specs.items():
            for start in range(0, spec.nbytes, len(zeros)):
                sink.write(key, start, zeros[: spec.nbytes - start])
        sink.commit()
    loaded = torch.load(tmp_path / "out", weights_only=True, mmap=True)["state_dict"]
    assert {key: tuple(value.shape) for key, value in loaded.items()} == {k: s.shape for k, s in specs.items()}
    back = open_source(tmp_path / "out")
    assert dict(back.specs) == specs
    back.close()


@given(st.lists(st.binary(max_size=40), max_size=8))
def test_checksums_of_pieces_combine(pieces):
    whole, total = b"".join(pieces), 0
    for piece in pieces:
        total = combine(total, crc32(piece), len(piece))
    assert total == crc32(whole)
    sums = PieceChecksums()
    start = 0
    positions = []
    for piece in pieces:
        positions.append(start)
        start += len(piece)
    for start, piece in reversed([(s, p) for s, p in zip(positions, pieces, strict=True) if p]):
        sums.add(1, start, memoryview(piece))
    assert sums.combined([0, len(whole)]) == [0, crc32(whole)]
    sums.close()
