"""Damaged, hostile and foreign files under a model's name."""

from __future__ import annotations

import gzip
import json
import os
import re
import shlex
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from sdops.core.source import read
from sdops.core.spec import DTYPE_BITS, Spec
from sdops.errors import FormatError, SdopsError
from sdops.formats import open_source
from sdops.formats.safetensors import SafetensorsFile, read_header
from sdops.formats.safetensors import open as open_safetensors
from tests.formats.writers import sample


def build(path: Path, header: Any, data: bytes = b"") -> Path:
    """A file with any header: text, bytes, or an object for JSON."""
    if not isinstance(header, (str, bytes)):
        header = json.dumps(header)
    raw = header.encode() if isinstance(header, str) else header
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + data)
    return path


def entry(dtype: Any = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


ENTRY = json.dumps(entry())


def around(text: str) -> str:
    """`text` with each `%s` replaced by a sound tensor."""
    return text.replace("%s", ENTRY)


HOSTILE = {
    "not an object": ("[1, 2, 3]", "brace"),
    "leading space": (around(' {"a": %s}'), "brace"),
    "trailing bytes": (around('{"a": %s} x'), "damaged"),
    "cut JSON": ('{"a": ', "damaged"),
    "not UTF-8": (b'{"\xff": ' + ENTRY.encode() + b"}", "damaged"),
    "byte order mark": (b'\xef\xbb\xbf{"a": ' + ENTRY.encode() + b"}", "brace"),
    "zero padding": (around('{"a": %s}\0\0'), "damaged"),
    "tensor twice": (around('{"a": %s, "a": %s}'), "`a` stands there twice"),
    "dtype twice": ('{"a": {"dtype": "F32", "dtype": "F16", "shape": [2], "data_offsets": [0, 8]}}', "twice"),
    "metadata twice": (around('{"__metadata__": {}, "__metadata__": {}, "a": %s}'), "twice"),
    "metadata key twice": (around('{"__metadata__": {"x": "1", "x": "2"}, "a": %s}'), "twice"),
    "metadata number": ({"__metadata__": {"epoch": 3}, "a": entry()}, "`epoch` is not a text"),
    "metadata list": ({"__metadata__": ["x"], "a": entry()}, "not an object"),
    "half a character": (around('{"\\ud800": %s}'), "damaged"),
    "half a character in metadata": (around('{"__metadata__": {"x": "\\uDC00"}, "a": %s}'), "damaged"),
    "NaN": ('{"a": {"dtype": "F32", "shape": [NaN], "data_offsets": [0, 8]}}', "NaN"),
    "infinity": ('{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, Infinity]}}', "Infinity"),
    "bool": ('{"a": {"dtype": "F32", "shape": [2, true], "data_offsets": [0, 8]}}', "impossible shape"),
    "float": ('{"a": {"dtype": "F32", "shape": [2e0], "data_offsets": [0, 8]}}', "impossible shape"),
    "negative size": ({"a": entry(shape=[-2])}, "impossible shape"),
    "text size": ({"a": entry(shape=["2"])}, "impossible shape"),
    "no shape list": ({"a": entry(shape=2)}, "impossible shape"),
    "huge number": ('{"a": {"dtype": "F32", "shape": [' + "9" * 5000 + '], "data_offsets": [0, 8]}}', "damaged"),
    "overflow to zero": ({"a": entry(shape=[1 << 62, 4, 2])}, "do not make"),
    "size beyond 63 bits": ({"a": entry(shape=[0, 1 << 63], offsets=[0, 0])}, "impossible shape"),
    "rank": ({"a": entry(shape=[1] * 64 + [2])}, "impossible shape"),
    "too few bytes": ({"a": entry(shape=[3])}, "do not make"),
    "backwards": ({"a": entry(offsets=[8, 0])}, "do not make"),
    "three offsets": ({"a": entry(offsets=[0, 8, 8])}, "impossible offsets"),
    "misaligned bits": ({"a": entry("F4", [3], [0, 2])}, "do not make"),
    "unknown dtype": ({"a": entry("F12")}, "unknown dtype 'F12'"),
    "dtype no text": ({"a": entry(["F32"])}, "unknown dtype"),
    "positional": ({"a": ["F32", [2], [0, 8]]}, "needs dtype"),
    "missing dtype": ({"a": {"shape": [2], "data_offsets": [0, 8]}}, "needs dtype"),
    "tensor null": ({"a": None}, "needs dtype"),
    "overlap": ({"a": entry(), "b": entry(shape=[1], offsets=[4, 8])}, "`b` overlaps `a`"),
    "alias": ({"a": entry(), "b": entry()}, "`b` overlaps `a`"),
    "hole at the start": ({"a": entry(shape=[1], offsets=[4, 8])}, "4 bytes before `a`"),
    "hole": ({"a": entry("U8", [2], [0, 2]), "b": entry("U8", [2], [6, 8])}, "4 bytes before `b`"),
    "nested": ('{"a": ' + "[" * 100_000 + "]" * 100_000 + "}", "nested"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_refuses_damaged_headers(tmp_path, name):
    header, message = HOSTILE[name]
    path = build(tmp_path / "x.safetensors", header, bytes(8))
    with pytest.raises(FormatError, match=re.escape(message)) as caught:
        open_source(path)
    assert "x.safetensors" in caught.value.message
    assert caught.value.hint


ODD = {
    "nothing": ({}, 0),
    "only metadata": ({"__metadata__": {"x": "y"}}, 0),
    "metadata null": ({"__metadata__": None, "a": entry()}, 8),
    "0-d": ({"a": entry("F64", [], [0, 8])}, 8),
    "zero size": ({"z": entry(shape=[0, 5], offsets=[0, 0]), "a": entry()}, 8),
    "zero size at the end": ({"a": entry(), "z": entry(shape=[1 << 40, 0], offsets=[8, 8])}, 8),
    "any order": ({"b": entry(offsets=[8, 16]), "a": entry()}, 16),
    "unaligned": ({"c": entry("U8", [3], [0, 3]), "a": entry(offsets=[3, 11])}, 11),
    "unknown field": ({"a": entry() | {"quantised": "no"}}, 8),
    "padding": (around('{"a": %s}  \n\t '), 8),
    "odd names": ({"": entry(), "\0\n\x1b[31m\u202e/../[/x]": entry(offsets=[8, 16])}, 16),
    "whole characters by escapes": (around('{"\\ud83d\\ude00": %s}'), 8),
    "small dtypes": ({"a": entry("F4", [4], [0, 2]), "b": entry("F6_E2M3", [4], [2, 5])}, 5),
}


@pytest.mark.parametrize("name", ODD)
def test_takes_what_is_odd_but_sound(tmp_path, name):
    header, length = ODD[name]
    path = build(tmp_path / "x.safetensors", header, bytes(range(length)))
    with safe_open(path, "np") as reference:  # so does the reference
        keys = set(reference.keys())
    source = open_source(path)
    assert set(source.specs) == keys
    assert list(source.offsets.values()) == sorted(source.offsets.values())
    assert b"".join(read(source, key) for key in source.specs) == bytes(range(length))
    source.close()


@settings(deadline=None, max_examples=200)
@given(
    st.dictionaries(
        st.sampled_from("abc"),
        st.fixed_dictionaries(
            {
                "dtype": st.sampled_from(["F32", "U8", "F4", "X"]),
                "shape": st.lists(st.integers(-1, 3), max_size=2),
                "data_offsets": st.lists(st.integers(0, 8), min_size=2, max_size=2),
            }
        ),
        max_size=3,
    ),
    st.integers(0, 12),
)
def test_never_laxer_than_the_reference(tmp_path_factory, header, length):
    path = build(tmp_path_factory.mktemp("x") / "x.safetensors", header, bytes(length))
    try:
        mine: set[str] | None = set(read_header(path).specs)
    except FormatError:
        mine = None
    try:
        with safe_open(path, "np") as reference:
            expected: set[str] | None = set(reference.keys())
    except SafetensorError:
        expected = None
    assert mine == expected


def test_every_dtype_of_the_format(tmp_path):
    header, position = {}, 0
    for dtype, bits in DTYPE_BITS.items():
        header[dtype] = entry(dtype, [8], [position, position + bits])
        position += bits
    source = open_source(build(tmp_path / "x.safetensors", header, os.urandom(position)))
    assert dict(source.specs) == {dtype: Spec(dtype, (8,)) for dtype in DTYPE_BITS}
    source.close()


def test_says_what_is_missing_of_a_cut_file(tmp_path):
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.zeros(1000)}, path)
    os.truncate(path, path.stat().st_size - 1234)
    with pytest.raises(FormatError, match=r"cut short: 1,234 of 4,\d+ bytes are missing \(1.23 kB\)"):
        open_source(path)
    os.truncate(path, 40)
    with pytest.raises(FormatError, match="ends inside its header"):
        open_source(path)


def test_puts_up_with_what_follows_on_request(tmp_path):
    path = tmp_path / "it's x.safetensors"
    save_file({"a": torch.arange(10)}, path)
    path.write_bytes(path.read_bytes() + b"junk")
    with pytest.raises(FormatError, match="4 bytes after its last tensor") as caught:
        open_source(path)
    assert shlex.split((caught.value.hint or "").split("`")[1]) == ["sdops", "fix", str(path)]
    lenient = SafetensorsFile(path, lenient=True)
    assert lenient.surplus == 4
    assert bytes(read(lenient, "a")) == torch.arange(10).numpy().tobytes()


@pytest.mark.parametrize("length", [0, 1, 100_000_001, 1 << 40, (1 << 64) - 1])
def test_refuses_absurd_header_lengths(tmp_path, length):
    path = tmp_path / "x.safetensors"
    path.write_bytes(length.to_bytes(8, "little") + b'{"a": 1}' * 20)
    with pytest.raises(FormatError, match=rf"its header has {length:,} bytes"):
        open_source(path)


def test_a_header_length_beyond_the_file(tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes((99_000_000).to_bytes(8, "little") + b'{"a": 1}')
    with pytest.raises(FormatError, match="ends inside its header"):
        open_source(path)


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 4265380512\n"
FOREIGN = {
    "empty": (b"", "is empty"),
    "zeros": (bytes(10_000), "nothing but zeros"),
    "pointer": (POINTER, "Git LFS pointer to a file of 4.27 GB"),
    "page": (b"<!DOCTYPE html><html><body>Log in</body></html>", "a web page"),
    "page with spaces": (b"\r\n  <html>" + b" " * 100, "a web page"),
    "error": (b'{"error": "Repository not found"}', "a JSON text"),
    "message": (b"Entry not found", "server's error message"),
    "password": (b"Invalid username or password.", "server's error message"),
    "gzip": (gzip.compress(b"x" * 100), "gzip"),
    "7z": (b"7z\xbc\xaf\x27\x1c" + bytes(40), "7z"),
    "rar": (b"Rar!\x1a\x07\x01\0" + bytes(40), "RAR"),
    "zip": (b"PK\3\4" + bytes(40), "zip archive without a torch model"),
    "tar": (b"pickle" + bytes(251) + b"ustar\0" + bytes(300), "tar archive"),
    "pickle": (b"\x80\x02}q\0.", "pickle that torch.save did not write"),
    "picture": (b"\x89PNG\r\n\x1a\n" + bytes(40), "a picture"),
    "text": (b"hello, this is my model", "its header has|not a model file"),
    "short": (b"abc", "not a model file"),
}


@pytest.mark.parametrize("ending", ["safetensors", "ckpt"])
@pytest.mark.parametrize("name", FOREIGN)
def test_guesses_what_a_file_really_is(tmp_path, name, ending):
    content, message = FOREIGN[name]
    path = tmp_path / f"model.{ending}"
    path.write_bytes(content)
    with pytest.raises(FormatError, match=message) as caught:
        open_source(path)
    assert str(path) in caught.value.message
    assert caught.value.hint


def test_a_pointer_names_the_cure(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(POINTER)
    with pytest.raises(FormatError) as caught:
        open_source(path)
    assert caught.value.hint == f"`cd {tmp_path} && git lfs pull`"


def test_content_counts_not_the_ending(tmp_path):
    torch.save(sample(), tmp_path / "pickled.safetensors")
    save_file(sample(), tmp_path / "safe.ckpt")
    for name in ("pickled.safetensors", "safe.ckpt"):
        source = open_source(tmp_path / name)
        assert set(source.specs) == set(sample())
        source.close()


def test_a_pipe_does_not_hang(tmp_path):
    path = tmp_path / "x.safetensors"
    os.mkfifo(path)
    with pytest.raises(FormatError, match="named pipe"):
        open_source(path)
    with pytest.raises(FormatError, match="named pipe"):
        open_safetensors(path)


def test_devices_and_sockets_are_refused(tmp_path):
    with pytest.raises(FormatError, match="device"):
        open_source("/dev/zero")


def test_missing_files_and_similar_names(tmp_path):
    (tmp_path / "dreamshaper_8.safetensors").touch()
    with pytest.raises(SdopsError, match="there is no file") as caught:
        open_source(tmp_path / "dreamshaper8.safetensors")
    assert "did you mean" in caught.value.hint
    assert "dreamshaper_8.safetensors" in caught.value.hint
    with pytest.raises(SdopsError) as caught:
        open_source(tmp_path / "dreamshaper_8")
    assert "dreamshaper_8.safetensors" in caught.value.hint
    with pytest.raises(SdopsError, match="there is no file"):
        open_source(tmp_path / "no" / "such" / "folder.safetensors")
    with pytest.raises(SdopsError, match="there is no file"):
        open_source("a\0b")
    (tmp_path / "link.safetensors").symlink_to("gone.safetensors")
    with pytest.raises(SdopsError, match=r"is a link to `gone.safetensors`"):
        open_source(tmp_path / "link.safetensors")
    with pytest.raises(SdopsError, match="cannot be opened"):
        open_source(tmp_path / ("x" * 300))


def test_links_are_followed(tmp_path):
    save_file(sample(), tmp_path / "blob")
    (tmp_path / "x.safetensors").symlink_to("blob")
    source = open_source(tmp_path / "x.safetensors")
    assert source.name == "x.safetensors"
    source.check_unchanged()
    source.close()


def test_a_file_over_4_gib(tmp_path):
    """A sparse file: values at its end are found."""
    size = (4 << 30) + 8
    path = build(
        tmp_path / "x.safetensors", {"big": entry("U8", [size], [0, size]), "z": entry("U8", [3], [size, size + 3])}
    )
    start = path.stat().st_size
    os.truncate(path, start + size + 3)
    with path.open("r+b") as file:
        file.seek(start + size - 2)
        file.write(b"abcde")
    source = open_source(path)
    tail = bytearray(4)
    source.read_into("big", size - 4, memoryview(tail))
    assert tail == b"\0\0ab"
    assert read(source, "z") == b"cde"
    source.close()


def test_large_headers_are_quick(tmp_path):
    """Checking 100,000 tensors takes no more than a few times what parsing the JSON takes."""
    header = {f"model.block.{i}.weight": entry("F16", [2, 2], [8 * i, 8 * i + 8]) for i in range(100_000)}
    path = build(tmp_path / "x.safetensors", header, bytes(800_000))
    raw = path.read_bytes()[8:-800_000]
    ratios = []
    for _ in range(2):
        start = time.thread_time()
        json.loads(raw)
        middle = time.thread_time()
        assert len(read_header(path).specs) == 100_000
        ratios.append((time.thread_time() - middle) / (middle - start))
    assert min(ratios) < 6


def test_a_header_of_100_mb(tmp_path):
    value = "y" * (100_000_000 - 25)
    text = json.dumps({"__metadata__": {"x": value}}, separators=(",", ":"))
    assert len(text) == 100_000_000
    source = open_source(build(tmp_path / "x.safetensors", text))
    assert source.metadata["x"] == value
    source.close()


def test_large_files_are_not_read_to_be_opened(tmp_path):
    path = build(tmp_path / "x.safetensors", {"a": entry("U8", [1 << 40], [0, 1 << 40])})
    os.truncate(path, path.stat().st_size + (1 << 40))
    source = open_source(path)
    assert source.specs["a"].nbytes == 1 << 40
    source.close()


def test_views_of_any_item_size(tmp_path):
    save_file({"a": torch.arange(10, dtype=torch.int32)}, tmp_path / "x.safetensors")
    source = open_source(tmp_path / "x.safetensors")
    words = memoryview(bytearray(40)).cast("i")
    source.read_into("a", 0, words)
    assert list(words) == list(range(10))
    source.close()


def test_cut_while_being_read(tmp_path):
    """A reader at work gets the error, not old or short bytes."""
    from sdops.errors import ChangedError

    path = tmp_path / "x.safetensors"
    save_file({"a": torch.zeros(1 << 20)}, path)
    source = open_source(path)
    caught: list[SdopsError] = []

    def work() -> None:
        try:
            while True:
                read(source, "a")
        except SdopsError as error:
            caught.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    time.sleep(0.02)
    os.truncate(path, 1 << 16)
    thread.join(timeout=10)
    source.close()
    assert [type(error) for error in caught] == [ChangedError]


def test_unreadable_file(tmp_path):
    path = tmp_path / "x.safetensors"
    path.touch(mode=0)
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)  # root may read everything
    try:
        with pytest.raises(SdopsError, match="cannot be opened: Permission denied"):
            open_source(path)
    finally:
        os.seteuid(user)


def test_collection_goes_on_after_a_failure(tmp_path):
    """Parsing pauses the garbage collector; an error must not leave it off."""
    code = """
import gc, sys
from sdops.errors import FormatError
from sdops.formats import open_source
try:
    open_source(sys.argv[1])
except FormatError:
    print(gc.isenabled())
"""
    path = build(tmp_path / "x.safetensors", '{"a": 1}')
    done = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True, check=True)
    assert done.stdout == "True\n"
