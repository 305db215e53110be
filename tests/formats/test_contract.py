"""What every file on the shelf must do: give back, bit by bit, what the format's own library wrote."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from sdops import formats
from sdops.core.source import place, read
from sdops.core.spec import Spec
from sdops.errors import ChangedError, SdopsError
from sdops.formats import open_source
from tests.formats.writers import WRITERS, raw_bytes, sample

SHELF = Path(formats.__file__).parent
DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.uint16: "U16",
    torch.uint32: "U32", torch.uint64: "U64", torch.bool: "BOOL", torch.complex64: "C64",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2", torch.float8_e4m3fnuz: "F8_E4M3FNUZ",
    torch.float8_e5m2fnuz: "F8_E5M2FNUZ", torch.float8_e8m0fnu: "F8_E8M0",
}  # fmt: skip


def random_tensor(dtype: torch.dtype, shape: tuple[int, ...], seed: int) -> Tensor:
    """Any bits, NaN included; 0 or 1 for bool."""
    generator = torch.Generator().manual_seed(seed)
    numel = int(torch.Size(shape).numel())
    top = 2 if dtype == torch.bool else 256
    raw = torch.randint(0, top, (numel * dtype.itemsize,), dtype=torch.uint8, generator=generator)
    return raw.view(dtype).reshape(shape) if numel else torch.empty(shape, dtype=dtype)


TENSORS = st.dictionaries(
    st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12).filter(
        lambda key: key != "__metadata__"
    ),
    st.tuples(st.sampled_from(list(DTYPES)), st.lists(st.integers(0, 4), max_size=4).map(tuple), st.integers(0, 2**31)),
    min_size=2,
    max_size=6,
)


def test_the_shelf_is_asked_in_full():
    files = {path.stem for path in SHELF.glob("[!_]*.py")}
    assert files == set(formats.ORDER)
    # GGUF holds fewer dtypes and shapes than these tests write: it has tests of its own
    assert {name.partition("-")[0] for name in WRITERS} == files - {"gguf"}


@pytest.mark.parametrize("name", formats.ORDER)
def test_the_contract_is_declared(name):
    module = ast.parse((SHELF / f"{name}.py").read_text())
    functions = {node.name: node for node in module.body if isinstance(node, ast.FunctionDef)}
    assert [argument.arg for argument in functions["sniff"].args.args] == ["path", "head"]
    assert [argument.arg for argument in functions["open"].args.args] == ["path"]


@pytest.mark.parametrize("writer", WRITERS)
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(entries=TENSORS)
def test_gives_back_what_was_written(tmp_path_factory, writer, entries):
    tensors = {key: random_tensor(*entry) for key, entry in entries.items()}
    path = WRITERS[writer](tmp_path_factory.mktemp("model"), tensors)
    source = open_source(path)
    try:
        assert dict(source.specs) == {key: Spec(DTYPES[t.dtype], tuple(t.shape)) for key, t in tensors.items()}
        for key, tensor in tensors.items():
            assert read(source, key) == raw_bytes(tensor)
        source.check_unchanged()
    finally:
        source.close()


@pytest.mark.parametrize("writer", WRITERS)
def test_reads_any_part(tmp_path, writer):
    tensors = sample()
    source = open_source(WRITERS[writer](tmp_path, tensors))
    whole = raw_bytes(tensors["conv.weight"])
    for start, length in ((0, 0), (0, 1), (3, 5), (len(whole) - 7, 7)):
        buffer = bytearray(length)
        source.read_into("conv.weight", start, memoryview(buffer))
        assert buffer == whole[start : start + length]
    source.close()


@pytest.mark.parametrize("writer", WRITERS)
def test_offsets_lead_to_the_bytes(tmp_path, writer):
    tensors = sample()
    source = open_source(WRITERS[writer](tmp_path, tensors))
    offsets = getattr(source, "offsets", {})
    if len(source.files) == 1 and writer != "diffusers":
        assert set(offsets) == set(tensors)
    data = source.files[0].read_bytes()
    for key, offset in offsets.items():
        assert data[offset : offset + source.specs[key].nbytes] == raw_bytes(tensors[key])
    assert list(offsets.values()) == sorted(offsets.values())
    source.close()


@pytest.mark.parametrize("writer", WRITERS)
def test_places_are_where_the_bytes_lie(tmp_path, writer):
    tensors = sample()
    source = open_source(WRITERS[writer](tmp_path, tensors))
    places = [found for key in tensors if (found := place(source, key))]
    assert len(places) == len(tensors)
    for found, key in zip(places, tensors, strict=True):
        assert os.pread(found.file, source.specs[key].nbytes, found.position) == raw_bytes(tensors[key])
        found.check()
    for file in source.files:
        with file.open("ab") as appended:
            appended.write(b"!")
    for found in places:
        with pytest.raises(ChangedError):
            found.check()
    source.close()


@pytest.mark.parametrize("writer", WRITERS)
def test_threads_may_read_at_once(tmp_path, writer):
    torch.manual_seed(1)
    tensors = {f"t{i}": torch.randn(50, 40) for i in range(8)} | {"turned": torch.randn(64, 64)}
    source = open_source(WRITERS[writer](tmp_path, tensors))
    wrong = []

    def work() -> None:
        wrong.extend(key for key in tensors for _ in range(5) if read(source, key) != raw_bytes(tensors[key]))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    source.close()
    assert not wrong


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("how", ["cut", "write", "replace", "remove"])
def test_notices_changes(tmp_path, writer, how):
    source = open_source(WRITERS[writer](tmp_path, sample()))
    file = source.files[0]
    content = file.read_bytes()
    if how == "cut":
        os.truncate(file, len(content) // 2)
    elif how == "write":
        os.utime(file, ns=(0, 0))  # what a write does, without waiting for the clock
    elif how == "replace":
        other = file.with_name("other")
        other.write_bytes(content)
        other.replace(file)
    else:
        file.unlink()
    with pytest.raises(ChangedError, match=file.name):
        source.check_unchanged()
    if how in ("cut", "write"):
        with pytest.raises(ChangedError, match=file.name):
            [read(source, key) for key in source.specs]
    source.close()


@pytest.mark.parametrize("writer", WRITERS)
def test_tells_which_files_it_reads(tmp_path, writer):
    path = WRITERS[writer](tmp_path, sample())
    source = open_source(path)
    assert source.path == path
    assert source.name == path.name
    assert all(file.is_file() for file in source.files)
    assert len(source.warnings) == (writer == "sharded-siblings")
    source.close()


@pytest.mark.parametrize("writer", WRITERS)
def test_closes_its_files(tmp_path, writer):
    path = WRITERS[writer](tmp_path, sample())
    before = len(os.listdir("/proc/self/fd"))
    open_source(path).close()
    os.truncate(next(file for file in tmp_path.rglob("*") if file.suffix in (".safetensors", ".ckpt")), 60)
    with pytest.raises(SdopsError):
        open_source(path)
    assert len(os.listdir("/proc/self/fd")) == before


def test_headers_need_neither_torch_nor_numpy(tmp_path):
    paths = []
    for name, write in WRITERS.items():
        folder = tmp_path / name
        folder.mkdir()
        paths.append(str(write(folder, sample())))
    code = """
import sys
from sdops.core.source import place, read
from sdops.formats import open_source
for path in sys.argv[1:]:
    source = open_source(path)
    for key in source.specs:
        read(source, key)
print(*sorted({"torch", "numpy", "safetensors"} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code, *paths], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
