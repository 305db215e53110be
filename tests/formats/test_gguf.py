"""GGUF: types against vectors of the `gguf` package, written files read back, hostile headers refused."""

from __future__ import annotations

import base64
import gzip
import json
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import sdops
from sdops.archs.detect import detect
from sdops.core.cast_view import Cast
from sdops.core.ggml import DECODABLE, ENCODABLE, PLAIN, TYPES
from sdops.core.ggml_blocks import dequantise, quantise
from sdops.core.ggml_view import Packed, choose_types
from sdops.core.run import run
from sdops.core.sink_gguf import GgufSink
from sdops.core.source import read
from sdops.core.spec import Spec
from sdops.errors import FormatError, OutputError, SdopsError, UsageError
from sdops.formats import open_source
from tests.archs import lists
from tests.tiny import Memory, Model

VECTORS = json.loads(gzip.decompress((Path(__file__).parents[2] / "fixtures" / "ggml_vectors.json.gz").read_bytes()))
RNG = np.random.default_rng(0)


def raw(text: str, dtype: type = np.uint8) -> np.ndarray:
    return np.frombuffer(base64.b64decode(text), dtype)


@pytest.mark.parametrize("kind", sorted(VECTORS["decode"]))
def test_blocks_decode_as_in_the_reference(kind):
    entry = VECTORS["decode"][kind]
    values = dequantise(raw(entry["blocks"]), kind)
    assert values.tobytes() == raw(entry["values"]).tobytes()


@pytest.mark.parametrize("kind", sorted(set(VECTORS["encode"]) - {"values"}))
def test_blocks_encode_as_in_the_reference(kind):
    values = raw(VECTORS["encode"]["values"], np.float32)
    assert quantise(values, kind).tobytes() == raw(VECTORS["encode"][kind]).tobytes()


def test_every_type_has_a_test():
    assert set(VECTORS["decode"]) == DECODABLE - {"Q8_K"}  # which files do not hold, and the package does not read
    assert set(VECTORS["encode"]) - {"values"} == ENCODABLE - {"F32"}


def test_q8_k():
    block = np.float32(0.5).tobytes() + np.arange(-128, 128, dtype=np.int8).tobytes() + bytes(32)
    np.testing.assert_array_equal(dequantise(np.frombuffer(block, np.uint8), "Q8_K"), np.arange(-128, 128) / 2)


@pytest.mark.parametrize(("kind", "bits"), [("Q8_0", 7), ("Q5_1", 5), ("Q5_0", 4), ("Q4_1", 4), ("Q4_0", 3)])
def test_rounding_errs_by_half_a_step(kind, bits):
    values = RNG.standard_normal(320).astype(np.float32)
    back = dequantise(quantise(values, kind), kind)
    blocks = values.reshape(-1, 32)
    span = np.ptp(blocks, axis=1) if kind.endswith("_1") else np.abs(blocks).max(axis=1)
    # the signed types have one code fewer on the side of the smaller magnitude; fp16 scales add 2^-11
    worst = span / 2**bits * (1.1 if kind.endswith("_0") and kind != "Q8_0" else 0.6) + 2.0**-10 * np.abs(blocks).max()
    assert (np.abs(back - values).reshape(-1, 32).max(axis=1) <= worst).all()


MODEL: Model = {
    "blocks.0.attn.weight": ("F32", (RNG.standard_normal((96, 512)) * 0.02).astype("f4")),
    "blocks.0.half.weight": ("F16", RNG.standard_normal((70, 256)).astype("f2")),
    "blocks.0.odd.weight": ("F32", RNG.standard_normal((50, 33)).astype("f4")),
    "conv.weight": ("F16", RNG.standard_normal((32, 64, 3, 3)).astype("f2")),
    "bias": ("F16", RNG.standard_normal(96).astype("f2")),
    "ids": ("I64", np.arange(77)),
}
FIELDS = {
    "general.architecture": "flux", "general.file_type": 7, "number": 1.5, "flag": True, "list": [3, -1],
    "texts": ["a", "ü"], "large": 1 << 40, "negative": -4,
}  # fmt: skip


def written(path: Path, kind: str, model: Model = MODEL, *, jobs: int = 2) -> Path:
    source = Memory(model)
    tensors = choose_types(source.specs, dict.fromkeys(source.specs, kind))
    with GgufSink(path, tensors, FIELDS, force=True) as sink:
        run(Packed(source, tensors), sink, jobs=jobs)
        return sink.commit()


@pytest.mark.parametrize("kind", sorted(ENCODABLE))
def test_what_is_written_is_read_back(tmp_path, kind):
    source = open_source(written(tmp_path / "model.gguf", kind))
    assert source.fields == FIELDS
    assert source.metadata["general.architecture"] == "flux"
    assert source.metadata["list"] == "[3, -1]"
    assert source.warnings == []
    assert list(source.specs) == list(MODEL)
    assert source.types["ids"] == "I64"
    assert source.types["bias"] == "F32"
    assert source.types["blocks.0.attn.weight"] == kind
    assert source.types["blocks.0.odd.weight"] == (kind if kind in PLAIN else "F16")
    for key, (_, array) in MODEL.items():
        assert source.specs[key].shape == array.shape
        values = array.reshape(-1).astype("f4")
        stored = source.types[key]
        if stored == "I64":
            assert read(source, key) == array.tobytes()
        elif stored in PLAIN:
            assert read(source, key) == quantise(values, stored).tobytes()
        else:
            assert read(source, key) == dequantise(quantise(values, stored), stored).tobytes()
    source.close()


def test_parts_of_packed_and_dequantised_tensors(tmp_path):
    source = open_source(written(tmp_path / "model.gguf", "Q5_1"))
    key = "blocks.0.attn.weight"
    packed = Packed(Memory(MODEL), choose_types(Memory(MODEL).specs, dict.fromkeys(MODEL, "Q5_1")))
    for whole, view in ((read(source, key), source), (read(packed, key), packed)):
        for start, count in ((0, 1), (3, 200), (1000, 5000), (len(whole) - 3, 3)):
            part = bytearray(count)
            view.read_into(key, start, memoryview(part))
            assert part == whole[start : start + count]
    half = Cast(source, {key: "F16"})
    np.testing.assert_array_equal(
        np.frombuffer(read(half, key), "f2"), np.frombuffer(read(source, key), "f4").astype("f2")
    )
    assert half.forks
    source.close()


def test_the_bytes_do_not_depend_on_threads(tmp_path):
    first = written(tmp_path / "a", "Q8_0", jobs=1).read_bytes()
    assert written(tmp_path / "b", "Q8_0", jobs=4).read_bytes() == first


def test_what_gguf_cannot_hold(tmp_path):
    for tensors in (
        {"a": ("F32", (1, 1, 1, 1, 1))},
        {"a" * 128: ("F32", (1,))},
        {"a": ("F32", (0,))},
        {"a": ("Q6_K", (256,))},
    ):
        with pytest.raises(OutputError):
            GgufSink(tmp_path / "x", tensors, {}, force=False)
    with pytest.raises(FormatError, match="whole blocks"):
        GgufSink(tmp_path / "x", {"a": ("Q8_0", (33,))}, {}, force=False)
    with pytest.raises(UsageError, match="no type"):
        choose_types({"a": Spec("U8", (3,))}, {"a": "F16"})


def test_the_original_shape_is_given(tmp_path):
    tensors = {"conv": ("F16", (36, 32)), "other": ("F16", (2, 2))}
    model: Model = {
        "conv": ("F16", RNG.standard_normal((36, 32)).astype("f2")),
        "other": ("F16", np.ones((2, 2), "f2")),
    }
    with GgufSink(tmp_path / "x", tensors, {"comfy.gguf.orig_shape.conv": [4, 32, 3, 3]}, force=False) as sink:
        run(Packed(Memory(model), tensors), sink, jobs=1)
        sink.commit()
    source = open_source(tmp_path / "x")
    assert source.specs == {"conv": Spec("F16", (4, 32, 3, 3)), "other": Spec("F16", (2, 2))}
    source.close()


def test_a_rare_type_is_refused_before_anything_is_written(tmp_path):
    path, other, out = tmp_path / "m.gguf", tmp_path / "n.gguf", tmp_path / "out.safetensors"
    path.write_bytes(gguf([info("a.weight", (256,), TYPES["IQ2_XXS"].code)], data=128))
    other.write_bytes(gguf([info("a.weight", (256,), TYPES["F16"].code)], data=512))
    for refused in (
        lambda: sdops.convert(path, to="safetensors", output=out),
        lambda: sdops.merge(other, path, output=out),
        lambda: sdops.diff(other, path),
    ):
        with pytest.raises(FormatError, match=r"`a.weight`.*IQ2_XXS") as caught:
            refused()
        assert "IQ4_XS" in (caught.value.hint or "")
    assert {each.name for each in tmp_path.iterdir()} == {"m.gguf", "n.gguf"}


def test_architectures_are_recognised(tmp_path):
    specs = lists.load("flux1-schnell-bfl-transformer")
    header = [b"GGUF", struct.pack("<IQQ", 3, len(specs), 0)]
    offset = 0
    for key, spec in specs.items():
        header += [text(key), struct.pack(f"<I{len(spec.shape)}Q", len(spec.shape), *spec.shape[::-1])]
        header.append(struct.pack("<IQ", TYPES["F16"].code, offset))
        offset += -(-2 * spec.numel // 32) * 32
    path = tmp_path / "flux.gguf"
    path.write_bytes(b"".join(header))
    with path.open("r+b") as file:
        file.truncate(-(-path.stat().st_size // 32) * 32 + offset)  # a hole
    source = open_source(path)
    assert {key: spec.shape for key, spec in source.specs.items()} == {key: spec.shape for key, spec in specs.items()}
    assert "flux" in str(detect(source.specs)).lower()
    source.close()


def text(value: str | bytes) -> bytes:
    data = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(data)) + data


def info(name: str, shape: tuple[int, ...] = (8,), code: int = 0, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(shape)}Q", len(shape), *shape) + struct.pack("<IQ", code, offset)


def gguf(infos: list[bytes], fields: list[bytes] | None = None, *, data: int = 64, version: int = 3) -> bytes:
    fields = fields or []
    head = b"GGUF" + struct.pack("<IQQ", version, len(infos), len(fields)) + b"".join(fields) + b"".join(infos)
    return head.ljust(-(-len(head) // 32) * 32, b"\0") + bytes(data)


BIG = (1 << 63) + 7
HOSTILE = {
    "cut": gguf([info("a")])[:50],
    "tensors": b"GGUF" + struct.pack("<IQQ", 3, BIG, 0) + bytes(100),
    "fields": b"GGUF" + struct.pack("<IQQ", 3, 0, 1 << 40) + bytes(100),
    "version": gguf([info("a")], version=1),
    "big endian": b"GGUF" + struct.pack(">IQQ", 3, 0, 0),
    "text": b"GGUF" + struct.pack("<IQQ", 3, 1, 0) + struct.pack("<Q", BIG) + bytes(100),
    "no text": gguf([], [text(b"\xff\xfe") + struct.pack("<IB", 0, 1)]),
    "list": gguf([], [text("k") + struct.pack("<IIQ", 9, 4, 1 << 60)]),
    "deep": gguf([], [text("k") + struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * 10]),
    "type of field": gguf([], [text("k") + struct.pack("<IQ", 77, 0)]),
    "field twice": gguf([], [text("k") + struct.pack("<IB", 0, 1)] * 2),
    "tensor twice": gguf([info("a"), info("a", offset=32)]),
    "rank": gguf([info("a", (1,) * 5)]),
    "type": gguf([info("a", code=5)]),
    "rows": gguf([info("a", (33,), TYPES["Q8_0"].code)]),
    "size": gguf([info("a", (1 << 62, 1 << 62))]),
    "beyond": gguf([info("a", (17,))]),
    "offset": gguf([info("a", offset=1 << 50)]),
    "negative": gguf([info("a", offset=(1 << 64) - 32)]),
    "unaligned": gguf([info("a", offset=4)]),
    "overlap": gguf([info("a", (16,)), info("b", offset=32)]),
    "alignment": gguf([info("a")], [text("general.alignment") + struct.pack("<II", 4, 0)]),
    "odd alignment": gguf([info("a")], [text("general.alignment") + struct.pack("<II", 4, 12)]),
    "shape": gguf([info("a")], [text("comfy.gguf.orig_shape.a") + struct.pack("<IIQ2i", 9, 5, 2, -2, -4)]),
    "other shape": gguf([info("a")], [text("comfy.gguf.orig_shape.a") + struct.pack("<IIQ2i", 9, 5, 2, 3, 3)]),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_are_refused(tmp_path, name):
    path = tmp_path / "x.gguf"
    path.write_bytes(HOSTILE[name])
    with pytest.raises(FormatError) as caught:
        open_source(path)
    assert "x.gguf" in caught.value.message
    assert caught.value.hint


def test_the_frame_of_the_hostile_files_is_sound(tmp_path):
    path = tmp_path / "x.gguf"
    path.write_bytes(gguf([info("b", offset=32), info("a")], [text("general.alignment") + struct.pack("<II", 4, 32)]))
    source = open_source(path)
    assert list(source.specs) == ["a", "b"]
    source.close()


def test_a_type_without_a_decoder_is_told(tmp_path):
    path = tmp_path / "x.gguf"
    path.write_bytes(gguf([info("a", (256,), TYPES["IQ2_S"].code), info("b", offset=96)], data=200))
    source = open_source(path)
    assert source.warnings == ["1 tensor of type IQ2_S cannot be read"]
    assert read(source, "b") == bytes(32)
    with pytest.raises(FormatError, match="IQ2_S"):
        read(source, "a")
    source.close()


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_damaged_headers_end_in_typed_errors(tmp_path, data):
    sound = bytearray(
        gguf(
            [info("a", (32,), 8), info("b", (3, 2), offset=64)],
            [text("k") + struct.pack("<IIQ2i", 9, 5, 2, 3, 3)],
            data=128,
        )
    )
    for _ in range(data.draw(st.integers(1, 4))):
        sound[data.draw(st.integers(0, len(sound) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path / "x.gguf"
    path.write_bytes(sound[: data.draw(st.integers(4, len(sound)))])
    try:
        source = open_source(path)
        for key in source.specs:
            read(source, key)
        source.close()
    except SdopsError:
        pass
