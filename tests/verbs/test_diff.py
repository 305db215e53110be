"""What counts as a difference and what does not: values, dtypes, shapes, names, prefixes, scales."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from sdops.errors import OutputError
from sdops.verbs.diff import diff
from sdops.verbs.meta import meta
from tests import tiny

KEY = f"{tiny.UNET}middle_block.1.transformer_blocks.0.attn1.to_q.weight"
OTHER = f"{tiny.UNET}out.0.weight"


@pytest.fixture
def model() -> tiny.Model:
    return tiny.checkpoint(1)


@pytest.fixture
def base(tmp_path, model) -> Path:
    return tiny.write(tmp_path / "a.safetensors", model)


@pytest.fixture
def against(tmp_path, base):
    """The report of the base against another model."""

    def compare(other, **options):
        return diff(base, tiny.write(tmp_path / "b.safetensors", other), **options)

    return compare


def test_a_copy_is_the_same(against, model):
    report = against(model)
    assert (report.failed, report.data["same"], report.result, report.warnings) == (False, True, [], [])
    assert report.data["tensors"] == {
        "identical": len(model), "equal": 0, "rounded": 0, "changed": 0, "shape": 0, "only_a": 0, "only_b": 0,
    }  # fmt: skip
    assert "Change by block" not in report.text()
    json.dumps(report.as_dict(), allow_nan=False)


def test_a_changed_tensor_is_measured_and_lands_in_its_block(against, model):
    values = tiny.numbers(model[KEY])
    model[KEY] = tiny.encoded(values * 2, "F16")
    report = against(model)
    assert report.failed
    assert report.result == [f"changed {KEY}"]
    found = report.data["differences"][KEY]
    assert (found["relative"], found["cosine"], found["block"]) == (1.0, 1.0, "M00")
    assert found["max_abs"] == np.abs(values).max()
    assert report.data["blocks"]["M00"]["relative"] == 1.0
    assert report.data["blocks"]["M00"]["kinds"]["self"]["changed"] == np.count_nonzero(values)
    assert report.data["blocks"]["vae"]["changed"] == 0
    row = next(line for line in report.text().splitlines() if line.strip().startswith("M00"))
    assert "██" in row
    json.dumps(report.as_dict(), allow_nan=False)


def test_another_dtype_of_the_same_values_is_told_apart(against, model):
    model[KEY] = tiny.encoded(tiny.numbers(model[KEY]), "F32")
    model[OTHER] = tiny.encoded(tiny.numbers(model[OTHER]) + 1, "F32")
    report = against(model)
    assert report.result == [f"equal {KEY}", f"changed {OTHER}"] or report.result == [
        f"changed {OTHER}",
        f"equal {KEY}",
    ]
    assert report.data["differences"][KEY]["dtype"] == ["F16", "F32"]
    assert report.data["tensors"]["equal"] == 1


def test_fp16_of_fp32_is_rounded_and_not_changed(tmp_path, model):
    wide = {
        key: tiny.encoded(tiny.numbers(tensor) * 1.001, "F32") for key, tensor in model.items() if tensor[0] == "F16"
    }
    narrow = {key: tiny.encoded(tiny.numbers(tensor), "F16") for key, tensor in wide.items()}
    a, b = tiny.write(tmp_path / "wide.safetensors", wide), tiny.write(tmp_path / "narrow.safetensors", narrow)
    report = diff(a, b, html=tmp_path / "page.html")
    assert report.failed
    assert report.data["tensors"]["rounded"] + report.data["tensors"]["equal"] == len(wide)
    assert report.data["blocks"]["M00"]["changed"] == 0
    assert "the same values but for rounding" in report.text()
    assert "The tensors have the same values but for rounding." in (tmp_path / "page.html").read_text()
    narrow[KEY] = tiny.encoded(tiny.numbers(narrow[KEY]) * 2, "F16")
    report = diff(a, tiny.write(b, narrow))
    assert report.data["tensors"]["changed"] == 1
    assert report.data["blocks"]["M00"]["relative"] > 0.1


@pytest.mark.parametrize("way", ["left", "right"])
def test_sound_position_ids_may_be_left_out(tmp_path, base, model, way):
    without = tiny.write(tmp_path / "without.safetensors", {k: t for k, t in model.items() if k != tiny.IDS})
    report = diff(base, without) if way == "left" else diff(without, base)
    assert (report.failed, report.data["derived"]) == (False, [tiny.IDS])
    assert "1 table of position ids in one of them (not counted)" in report.text()
    model[tiny.IDS] = ("I64", tiny.POSITIONS + 1)
    broken = tiny.write(tmp_path / "broken.safetensors", model)
    assert diff(broken, without).data["only_a"] == [tiny.IDS]


def test_missing_tensors_and_other_shapes(against, model):
    del model[KEY]
    model["extra"] = tiny.encoded([1.0], "F16")
    model[OTHER] = tiny.encoded(np.zeros(5), "F16")
    report = against(model)
    assert report.failed
    assert report.data["only_a"] == [KEY]
    assert report.data["only_b"] == ["extra"]
    assert report.data["differences"][OTHER]["state"] == "shape"
    assert "F16[9] -> F16[5]" in report.text()


def test_another_prefix_is_no_difference(tmp_path, base, model):
    bare = {key.removeprefix(tiny.UNET): tensor for key, tensor in model.items() if key.startswith(tiny.UNET)}
    report = diff(base, tiny.write(tmp_path / "unet.safetensors", bare))
    assert report.data["tensors"]["identical"] == len(bare)
    assert report.data["tensors"]["only_b"] == 0
    assert set(report.data["respelled"]) == {"unet"}


def test_text_encoders_without_text_model_are_the_same(against, model):
    flat = {key.replace("transformer.text_model.", "transformer."): tensor for key, tensor in model.items()}
    assert flat.keys() != model.keys()
    assert against(flat).data["same"]


def test_scaled_fp8_is_compared_by_value(against, model):
    codes = np.random.default_rng(0).integers(0, 120, (12, 10)).astype(np.uint8)
    unet = {key: tensor for key, tensor in model.items() if key.startswith(tiny.UNET)}
    from sdops.core.views import Dequantised

    packed = {**unet, KEY: ("F8_E4M3", codes), KEY.replace("weight", "scale_weight"): tiny.encoded([0.5], "F32")}
    view = Dequantised(tiny.Memory(packed))
    data = bytearray(480)
    view.read_into(KEY, 0, memoryview(data))
    model[KEY] = ("F32", np.frombuffer(bytes(data), "f4").reshape(12, 10))
    model[KEY.replace("weight", "unrelated")] = tiny.encoded([1.0], "F16")
    plain = against(model).data["a"]
    report = diff(Path(plain).with_name("b.safetensors"), tiny.write(Path(plain).with_name("q.safetensors"), packed))
    assert report.data["differences"][KEY]["state"] == "equal"
    assert report.data["differences"][KEY]["dtype"] == ["F32", "F8_E4M3"]


def test_metadata_are_in_the_order_of_their_numbers(tmp_path):
    """And as `inspect` and `meta` order them."""
    model = tiny.checkpoint(1, clip=False, vae=False)
    keys = [f"unet:{number}:rank" for number in (0, 2, 10, 100)]
    a = tiny.write(tmp_path / "a.safetensors", model, dict.fromkeys(sorted(keys, reverse=True), "4"))
    b = tiny.write(tmp_path / "b.safetensors", model, dict.fromkeys(["note", "modelspec.title"], "x"))
    found = diff(a, b).data["metadata"]
    assert found == {"only_a": keys, "only_b": ["modelspec.title", "note"], "changed": []}
    assert [line.split("=")[0] for line in meta(a).result] == keys


def test_metadata_are_told_and_do_not_count(tmp_path, model):
    a = tiny.write(tmp_path / "a.safetensors", model, {"x": "1", "same": "s", "gone": ""})
    b = tiny.write(tmp_path / "b.safetensors", model, {"x": "2", "same": "s"})
    report = diff(a, b)
    assert report.data["metadata"] == {"only_a": ["gone"], "only_b": [], "changed": ["x"]}
    assert not report.failed


def test_nan_is_warned_of(against, model):
    values = tiny.numbers(model[OTHER])
    values[2] = np.nan
    model[OTHER] = ("F32", values.astype(np.float32))
    report = against(model)
    assert report.warnings == ["NaN or infinity in 1 tensor: the sums leave them out"]
    assert report.data["differences"][OTHER]["changed"] == 1
    json.dumps(report.as_dict(), allow_nan=False)


def test_a_number_that_became_nan_is_no_small_change(against, model):
    dtype, array = model[KEY]
    model[KEY] = dtype, np.where(np.arange(array.size).reshape(array.shape) == 0, np.nan, array).astype(array.dtype)
    row = next(line for line in against(model).text().splitlines() if line.strip().startswith("M00"))
    assert "██" in row
    assert "NaN" in row


def test_a_component_that_is_missing_is_named(tmp_path, base, model):
    rest = {key: tensor for key, tensor in model.items() if not key.startswith("first_stage_model.")}
    number = len(model) - len(rest)
    assert f"{number} only in A ({number} vae)" in diff(base, tiny.write(tmp_path / "rest.safetensors", rest)).text()


def test_strangers_have_nothing_in_common(tmp_path, base):
    report = diff(base, tiny.write(tmp_path / "x.safetensors", {"w": tiny.encoded([1.0], "F16")}))
    assert report.failed
    assert "have no tensor in common" in report.warnings[0]


def test_the_page_is_complete_in_itself_and_escapes_names(tmp_path, base, model):
    evil = "</style><script>alert(1)</script>\x1b[0m"
    a = tiny.write(tmp_path / "evil.safetensors", {**model, evil: tiny.encoded([1.0], "F16")})
    model[KEY] = tiny.encoded(tiny.numbers(model[KEY]) * 1.1, "F16")
    page = tmp_path / "page.html"
    report = diff(a, tiny.write(tmp_path / "b.safetensors", model), html=page)
    text = page.read_text()
    assert report.data["html"] == str(page)
    assert "<script" not in text
    assert "\x1b" not in text
    assert "M00" in text
    assert "<svg" in text
    assert "default-src 'none'" in text
    assert not [word for word in ("http://", "https://", "src=", "url(", "@import") if word in text]
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_the_page_replaces_nothing_by_itself(tmp_path, base, model):
    page = tmp_path / "page.html"
    page.write_text("mine")
    with pytest.raises(OutputError):
        diff(base, base, html=page)
    assert page.read_text() == "mine"
    diff(base, base, html=page, force=True)
    assert "the same" in page.read_text()
    with pytest.raises(OutputError):
        diff(base, base, html=base, force=True)


def test_an_embedding_is_the_same_in_every_layout(tmp_path):
    pytest.importorskip("torch")
    from sdops.verbs import embed

    vectors = np.random.default_rng(0).normal(size=(3, 768))
    a = tiny.write(tmp_path / "word.safetensors", {"emb_params": tiny.encoded(vectors, "F32")})
    for layout in ("a1111", "diffusers"):
        b = tmp_path / layout / "word.pt"
        b.parent.mkdir()
        embed.convert(a, to=layout, output=b)
        assert not diff(a, b).failed
    tiny.write(a, {"emb_params": tiny.encoded(vectors + 1, "F32")})
    assert diff(a, b).data["differences"].keys() == {"clip_l"}
