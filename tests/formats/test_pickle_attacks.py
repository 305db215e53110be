"""Pickles that would run code, exhaust memory or read beyond their storage under another reader."""

from __future__ import annotations

import functools
import importlib
import io
import operator
import os
import pickle
import resource
import struct
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sdops.errors import FormatError
from sdops.formats import open_source
from tests.formats.torch_files import check, legacy_with, zip_with

CANARY = "canary-of-the-pickle-tests"


def fire(*_: Any) -> None:
    Path(CANARY).touch()


class Attack:
    """Pickles as the call of a function."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


SHELL = f"touch {CANARY}"
ATTACKS = {
    "os.system": Attack(os.system, SHELL),
    "eval": Attack(eval, f"open('{CANARY}', 'w')"),
    "exec": Attack(exec, f"open('{CANARY}', 'w')"),
    "open": Attack(open, CANARY, "w"),
    "io.open": Attack(io.open, CANARY, "w"),
    "mkdir": Attack(os.mkdir, CANARY),
    "touch": Attack(Path.touch, Path(CANARY)),
    "import": Attack(importlib.import_module, "antigravity"),
    "getattr": Attack(getattr, "", "join"),
    "map": Attack(map, fire, [1]),
    "nested": Attack(pickle.loads, pickle.dumps(Attack(os.system, SHELL))),
    "torch.load": Attack(torch.load, "x"),
    "storage bytes": Attack(torch.storage._load_from_bytes, b""),
    "hub": Attack(torch.hub.load, "x", "y"),
    "numpy.load": Attack(np.load, "x"),
    "partial": Attack(functools.partial, os.system, SHELL),
    "attrgetter": Attack(operator.attrgetter, "system"),
    "print": Attack(print, "x"),
}
HAND_WRITTEN = {
    "GLOBAL": b"cos\nsystem\n(X%c\0\0\0%stR." % (len(SHELL), SHELL.encode()),
    "STACK_GLOBAL": b"\x80\x04\x8c\2os\x8c\6system\x93(\x8c%c%stR." % (len(SHELL), SHELL.encode()),
    "INST": b"(X%c\0\0\0%sios\nsystem\n." % (len(SHELL), SHELL.encode()),
    "OBJ": b"(cos\nsystem\nX%c\0\0\0%so." % (len(SHELL), SHELL.encode()),
    "NEWOBJ": b"\x80\x02cos\nsystem\n(X%c\0\0\0%st\x81." % (len(SHELL), SHELL.encode()),
    "DUP": b"cos\nsystem\n2.",
    "EXT": b"\x80\x02\x82\1.",
    "PERSID": b"Pstorage\n.",
    "dotted": b"\x80\x04\x8c\2os\x8c\x0bpath.exists\x93.",
    "through a harmless module": b"cnumpy\nos.system\n(X%c\0\0\0%stR." % (len(SHELL), SHELL.encode()),
    "through argparse": b"cargparse\n_sys.exit\n(K\1tR.",
}


@pytest.fixture
def canary(tmp_path, monkeypatch):
    """A place where a fired attack leaves a file, and the proof that the attacks do fire."""
    monkeypatch.chdir(tmp_path)
    pickle.loads(HAND_WRITTEN["GLOBAL"])
    assert Path(CANARY).exists()
    Path(CANARY).unlink()
    return Path(CANARY)


@pytest.mark.parametrize("build", [zip_with, legacy_with])
@pytest.mark.parametrize("name", [*ATTACKS, *HAND_WRITTEN])
def test_nothing_in_a_pickle_is_executed(tmp_path, canary, build, name):
    for protocol in (2, 4):
        bare = HAND_WRITTEN.get(name) or pickle.dumps({"state_dict": {"a": ATTACKS[name]}}, protocol)
        path = build(tmp_path / "x.ckpt", bare)
        modules = set(sys.modules)
        with pytest.raises(FormatError) as caught:
            open_source(path)
        assert not canary.exists()
        assert set(sys.modules) - modules <= {
            name for name in sys.modules if name.startswith(("sdops", "zipfile", "encodings"))
        }
        assert "x.ckpt" in caught.value.message


def test_names_the_attack(tmp_path, canary):
    path = zip_with(tmp_path / "x.ckpt", HAND_WRITTEN["GLOBAL"])
    with pytest.raises(FormatError, match=r"names `os.system`, which is no part of a model"):
        open_source(path)


def storage(key: bytes = b"0", numel: int = 4, kind: bytes = b"FloatStorage") -> bytes:
    return b"(X\7\0\0\0storagectorch\n%s\nX%c\0\0\0%sX\3\0\0\0cpuJ%stQ" % (
        kind, len(key), key, struct.pack("<i", numel))  # fmt: skip


def number(value: int) -> bytes:
    return b"\x8a\x09" + value.to_bytes(9, "little", signed=True)


def tensor(shape: list[int], strides: list[int], first: int = 0, store: bytes = storage()) -> bytes:
    """A pickle of {"a": tensor}."""
    return b"".join(
        [
            b"\x80\x02}X\1\0\0\0actorch._utils\n_rebuild_tensor_v2\n(", store, number(first),
            b"(", *map(number, shape), b"t(", *map(number, strides), b"t\x89}tRs.",
        ]
    )  # fmt: skip


def test_the_hand_made_tensor_is_sound(tmp_path):
    data = {"data/0": np.arange(4, dtype="<f4").tobytes()}
    check(zip_with(tmp_path / "x.pt", tensor([2, 2], [2, 1]), data), {"a": torch.arange(4.0).reshape(2, 2)})
    check(zip_with(tmp_path / "x.pt", tensor([2, 2], [1, 2]), data), {"a": torch.arange(4.0).reshape(2, 2).T})


BAD_TENSORS = {
    "beyond the end": tensor([2, 3], [3, 1]),
    "offset beyond the end": tensor([2], [1], first=3),
    "stride beyond the end": tensor([2], [4]),
    "negative offset": tensor([1], [1], first=-1),
    "negative size": tensor([-2], [1]),
    "negative stride": tensor([2], [-1], first=1),
    "huge offset": tensor([1], [1], first=1 << 62),
    "huge size": tensor([1 << 62], [0]),
    "fewer strides": tensor([2, 2], [1]),
    "rank": tensor([1] * 65, [1] * 65),
    "repeated without end": tensor([1 << 40], [0]),
    "repeated twice over": tensor([1 << 15, 1 << 15], [0, 0]),
    "storage too small": tensor([1], [1], store=storage(numel=5)),
    "storage too large": tensor([1], [1], store=storage(numel=3)),
    "storage missing": tensor([1], [1], store=storage(b"1")),
    "storage out of the folder": tensor([1], [1], store=storage(b"../x")),
    "storage negative": tensor([1], [1], store=storage(numel=-4)),
    "storage unknown": tensor([1], [1], store=storage(kind=b"QInt8Storage")),
    "storage no storage": tensor([1], [1], store=b"K\1"),
}


@pytest.mark.parametrize("name", BAD_TENSORS)
def test_refuses_impossible_tensors(tmp_path, name):
    path = zip_with(tmp_path / "x.pt", BAD_TENSORS[name], {"data/0": bytes(16)})
    with pytest.raises(FormatError, match=r"x\.pt"):
        open_source(path)


def laughs() -> bytes:
    """A list of lists of lists: few bytes, 2^60 elements for a walker."""
    return b"\x80\x02" + b"]q\0" + b"".join(b"]q%c(h%ch%ce" % (i, i - 1, i - 1) for i in range(1, 60)) + b"."


def loop() -> bytes:
    """A dict that holds itself as its state_dict."""
    return b"\x80\x02}q\0X\n\0\0\0state_dicth\0s."


BOMBS = {
    "laughs": laughs(),
    "laughs in a dict": laughs()[:-1].replace(b"\x80\x02", b"\x80\x02}X\1\0\0\0a", 1) + b"s.",
    "loop": loop(),
    "lists": b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b".",
    "marks": b"\x80\x02" + b"(" * 100_000 + b"t" * 100_000 + b".",
    "tuples": b"\x80\x02)" + b"\x85" * 100_000 + b".",
    "dicts": b"\x80\x02" + b"}U\1a" * 100_000 + b"}" + b"s" * 100_000 + b".",
    "bytearray": b"\x80\x02cbuiltins\nbytearray\n" + number(1 << 37) + b"\x85R.",
    "bytes8": b"\x80\x04\x8e" + struct.pack("<Q", 1 << 40) + b".",
    "unicode8": b"\x80\x04\x8d" + struct.pack("<Q", (1 << 64) - 1) + b".",
    "long4": b"\x80\x02\x8b" + struct.pack("<i", 1 << 30) + b".",
    "negative long4": b"\x80\x02\x8b" + struct.pack("<i", -5) + b".",
    "float storage": b"\x80\x02ctorch\nFloatStorage\n" + number(1 << 36) + b"\x85R.",
    "line without end": b"c" + b"x" * 3_000_000,
    "digits": b"L" + b"9" * 6000 + b"L\n.",
    "colliding keys": b"\x80\x02}(" + b"".join(number(i * ((1 << 61) - 1)) + b"N" for i in range(1, 8)) + b"u.",
    "memo far away": b"\x80\x02Np99999999999999999999\n.",
    "nothing": b"",
    "stop": b".",
    "pop of nothing": b"0.",
    "append to a number": b"K\1K\2a.",
    "call of a number": b"K\1)R.",
    "dict of a list key": b"}]K\1s.",
    "text proto": b"(lp0\n.",
}


@pytest.mark.parametrize("build", [zip_with, legacy_with])
@pytest.mark.parametrize("name", BOMBS)
def test_bombs_fizzle(tmp_path, build, name):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(FormatError, match=r"x\.pt"):
        open_source(build(tmp_path / "x.pt", BOMBS[name]))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000  # kB


def test_too_many_opcodes(tmp_path, monkeypatch):
    monkeypatch.setattr("sdops.formats._pickle.OPCODE_LIMIT", 1000)
    with pytest.raises(FormatError, match="larger than that of any model"):
        open_source(zip_with(tmp_path / "x.pt", b"\x80\x02" + b"N0" * 1000 + b"."))
