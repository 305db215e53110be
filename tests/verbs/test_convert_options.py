"""Conversions that choose, drop, cast, swap and cut; containers; and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import sdops
from fixtures import make
from sdops.core import files
from sdops.core.casting import cast, raw_dtype
from sdops.core.fp8 import fp8_values
from sdops.core.source import read
from sdops.errors import FormatError, MismatchError, OutputError, UsageError
from sdops.formats import open_source
from tests import tiny


@pytest.fixture
def file(tmp_path):
    return tiny.write(tmp_path / "m.safetensors", tiny.checkpoint(1), {"modelspec.title": "M", "sshs_model_hash": "00"})


def same_tensors(one: tiny.Model, other: tiny.Model) -> bool:
    return one.keys() == other.keys() and all(tiny.same(one[key], other[key]) for key in one)


# ----------------------------------------------------------------------------------------------------------- containers


def test_a_ckpt_and_back(file, tmp_path):
    sdops.convert(file, to="ckpt", output=tmp_path / "m.ckpt")
    sdops.convert(tmp_path / "m.ckpt", to="safetensors", output=tmp_path / "b.safetensors")
    assert same_tensors(tiny.load(file), tiny.load(tmp_path / "b.safetensors"))


def test_embeddings_are_sent_to_the_verb_that_knows_them(tmp_path):
    tiny.write(tmp_path / "e.safetensors", {"emb_params": tiny.encoded(np.zeros((2, 768)), "F32")})
    report = sdops.convert(tmp_path / "e.safetensors", to="ckpt", output=tmp_path / "e.ckpt")
    assert any("sdops embed convert" in hint for hint in report.hints)


def test_torch_reads_the_ckpt(file, tmp_path):
    torch = pytest.importorskip("torch")
    sdops.convert(file, to="ckpt", output=tmp_path / "m.ckpt")
    found = torch.load(tmp_path / "m.ckpt", weights_only=True)["state_dict"]
    wanted = tiny.load(file)
    assert found.keys() == wanted.keys()
    assert all(np.array_equal(found[key].numpy(), array) for key, (_, array) in wanted.items())


def test_shards_and_their_join(file, tmp_path):
    (tmp_path / "s").mkdir()
    report = sdops.convert(file, to="safetensors", output=tmp_path / "s" / "m.safetensors", shard=1_000_000)
    shards = sorted((tmp_path / "s").glob("*.safetensors"))
    assert len(shards) > 1
    assert report.result == [str(tmp_path / "s" / "m.safetensors.index.json")]
    for start in (shards[0], tmp_path / "s" / "m.safetensors.index.json"):
        sdops.convert(start, output=tmp_path / "j.safetensors", force=True)
        assert same_tensors(tiny.load(file), tiny.load(tmp_path / "j.safetensors"))


def test_shards_of_a_folder(small_checkpoint, tmp_path):
    file = small_checkpoint("sd15")
    sdops.convert(file, to="diffusers", output=tmp_path / "f", shard=500_000)
    assert (tmp_path / "f" / "unet" / "diffusion_pytorch_model.safetensors.index.json").is_file()
    sdops.convert(tmp_path / "f", to="original", output=tmp_path / "b.safetensors")
    assert (tmp_path / "b.safetensors").read_bytes() == file.read_bytes()


@pytest.mark.parametrize(("dtype", "kinds"), [("fp16", {"F16", "F32"}), ("q8_0", {"Q8_0", "F16", "F32"})])
def test_gguf_holds_the_model(small_checkpoint, tmp_path, dtype, kinds):
    file = small_checkpoint("flux1-dev", dtype="F16")
    sdops.convert(file, to="gguf", dtype=dtype, output=tmp_path / "m.gguf")
    source = open_source(tmp_path / "m.gguf")
    assert set(source.types.values()) <= kinds
    assert source.fields["general.architecture"] == "flux"
    wanted = tiny.load(file)
    assert {key: spec.shape for key, spec in source.specs.items()} == {key: a.shape for key, (_, a) in wanted.items()}
    key = next(key for key, kind in source.types.items() if kind in ("F16", "Q8_0"))
    values = np.frombuffer(read(source, key), {"F16": np.float16, "F32": np.float32}[source.specs[key].dtype])
    assert np.allclose(values, tiny.numbers(wanted[key]).reshape(-1), atol=0.02 * np.abs(values).max())
    source.close()
    sdops.convert(tmp_path / "m.gguf", to="safetensors", dtype="fp16", output=tmp_path / "b.safetensors")
    assert tiny.load(tmp_path / "b.safetensors").keys() == wanted.keys()


def test_gguf_holds_convolutions_in_rows_of_blocks(small_checkpoint, tmp_path):
    model, wide = tiny.load(small_checkpoint("sd15")), np.random.default_rng(0).normal(size=(64, 64, 3, 3))
    start = "model.diffusion_model."
    inside, outside = (f"{start}{name}" for name in ("input_blocks.1.0.out_layers.3.weight", "input_blocks.0.0.weight"))
    model |= {inside: tiny.encoded(wide, "F16"), outside: tiny.encoded(wide, "F16")}
    tiny.write(tmp_path / "m.safetensors", model)
    sdops.convert(tmp_path / "m.safetensors", to="gguf", dtype="q8_0", output=tmp_path / "m.gguf")
    source = open_source(tmp_path / "m.gguf")
    assert (source.types[inside], source.types[outside]) == ("Q8_0", "F16")
    assert source.specs[inside].shape == wide.shape
    values = np.frombuffer(read(source, inside), "f4")
    assert np.allclose(values, wide.reshape(-1), atol=np.abs(wide).max() / 250)
    source.close()


def test_gguf_holds_no_ballast_and_no_empty_tensors(small_checkpoint, tmp_path):
    model = tiny.load(small_checkpoint("sd15-ema")) | {"v_pred": ("F32", np.zeros(0, np.float32))}
    report = sdops.convert(tiny.write(tmp_path / "m.safetensors", model), to="gguf", output=tmp_path / "m.gguf")
    source = open_source(tmp_path / "m.gguf")
    assert source.specs.keys() == {key for key in model if key.startswith("model.diffusion_model.")}
    source.close()
    assert source.specs.keys() | report.data["dropped"].keys() == model.keys()
    assert report.data["dropped"]["v_pred"] == "a GGUF file cannot hold it"
    assert any("`v_pred`" in line for line in report.warnings)


def test_gguf_has_the_original_names_and_the_types_of_the_file(small_checkpoint, tmp_path):
    wanted = tiny.load(small_checkpoint("flux1-dev"))
    folder = small_checkpoint("flux1-dev-diffusers") / "transformer"
    sdops.convert(folder, to="gguf", output=tmp_path / "m.gguf")
    source = open_source(tmp_path / "m.gguf")
    assert source.specs.keys() == wanted.keys()
    large = [key for key, spec in source.specs.items() if len(spec.shape) > 1 and spec.numel > 1024]
    assert {source.types[key] for key in large} == {"BF16"}
    assert source.fields["general.file_type"] == 32
    source.close()


def test_patterns_choose_what_a_gguf_file_packs(small_checkpoint, tmp_path):
    file, packed = small_checkpoint("flux1-dev", dtype="F16"), []
    for name, exclude in (("a", []), ("b", ["double_blocks.0.*"])):
        sdops.convert(file, to="gguf", dtype="q8_0", exclude=exclude, output=tmp_path / f"{name}.gguf")
        source = open_source(tmp_path / f"{name}.gguf")
        packed.append({key for key, kind in source.types.items() if kind == "Q8_0"})
        source.close()
    assert packed[1] == {key for key in packed[0] if not key.startswith("double_blocks.0.")} < packed[0]


def test_what_gguf_does_to_numbers_is_accounted_for(tmp_path):
    model = tiny.load(
        tiny.write(
            tmp_path / "x.safetensors",
            {"double_blocks.0.img_attn.qkv.weight": ("F32", np.full((64, 64), 1e6, np.float32))},
        )
    )
    wide = {
        "double_blocks.0.img_mlp.0.weight": ("F32", np.ones((64, 64), np.float32)),
        "n": ("F32", np.ones(3, np.float32)),
    }
    file = tiny.write(tmp_path / "m.safetensors", {**model, **wide})
    kept = sdops.convert(file, to="gguf", output=tmp_path / "k.gguf", unknown="keep")
    assert (kept.data["tensors"]["cast"], kept.data["overflows"]) == (0, {})
    report = sdops.convert(file, to="gguf", dtype="fp16", output=tmp_path / "h.gguf", unknown="keep")
    assert report.data["tensors"] | {"cast": 2, "copied": 1} == report.data["tensors"]
    assert report.data["overflows"] == {"double_blocks.0.img_attn.qkv.weight": 64 * 64}
    with pytest.raises(FormatError, match="too large"):
        sdops.convert(file, to="gguf", dtype="fp16", output=tmp_path / "s.gguf", strict=True)
    sdops.convert(file, to="gguf", dtype="q8_0", output=tmp_path / "q.gguf")
    back = sdops.convert(tmp_path / "q.gguf", output=tmp_path / "b.safetensors")
    assert back.data["tensors"]["cast"] == 2
    assert any("2 tensors from Q8_0 to F32" in " ".join(row) for row in back.sections[0].rows)


def test_a_ckpt_keeps_the_text(file, tmp_path):
    sdops.convert(file, to="ckpt", output=tmp_path / "m.ckpt")
    sdops.convert(tmp_path / "m.ckpt", to="safetensors", output=tmp_path / "b.safetensors")
    assert tiny.metadata_of(tmp_path / "b.safetensors")["modelspec.title"] == "M"
    torch = pytest.importorskip("torch")
    assert torch.load(tmp_path / "m.ckpt", weights_only=True)["modelspec.title"] == "M"


# ------------------------------------------------------------------------------------------------------ what is chosen


def test_components_come_out_alone(small_checkpoint, tmp_path):
    model = tiny.load(small_checkpoint("sdxl"))
    start = "first_stage_model."
    vae = {key.removeprefix(start): value for key, value in model.items() if key.startswith(start)}
    report = sdops.convert(
        small_checkpoint("sdxl"), to="original", components=["vae"], output=tmp_path / "vae.safetensors"
    )
    assert same_tensors(tiny.load(tmp_path / "vae.safetensors"), vae)
    assert len(report.data["dropped"]) == len(model) - len(vae)
    sdops.convert(
        small_checkpoint("sdxl"), to="original", components=["vae"], prefix=True, output=tmp_path / "p.safetensors"
    )
    assert tiny.load(tmp_path / "p.safetensors").keys() == {start + key for key in vae}
    sdops.convert(tmp_path / "vae.safetensors", to="diffusers", output=tmp_path / "vae")
    assert json.loads((tmp_path / "vae" / "config.json").read_text())["_class_name"] == "AutoencoderKL"
    sdops.convert(tmp_path / "vae", to="original", output=tmp_path / "b.safetensors")
    assert (tmp_path / "b.safetensors").read_bytes() == (tmp_path / "vae.safetensors").read_bytes()


def test_text_encoders_by_their_kind(small_checkpoint, tmp_path):
    sdops.convert(
        small_checkpoint("sdxl"), to="safetensors", components=["text_encoder"], output=tmp_path / "t.safetensors"
    )
    assert {key.split(".")[0] for key in tiny.load(tmp_path / "t.safetensors")} == {"conditioner"}
    with pytest.raises(UsageError, match="did you mean `clip_g`"):
        sdops.convert(small_checkpoint("sdxl"), to="safetensors", components=["clipg"], output=tmp_path / "x")


def test_the_moving_average(small_checkpoint, tmp_path):
    file = small_checkpoint("sd15-ema")
    model = tiny.load(file)
    dropped = sdops.convert(file, to="safetensors", ema="drop", output=tmp_path / "d.safetensors")
    found = tiny.load(tmp_path / "d.safetensors")
    assert found.keys() == {key for key in model if not key.startswith("model_ema")}
    assert set(dropped.data["dropped"]) == {key for key in model if key.startswith("model_ema")}
    sdops.convert(file, to="safetensors", ema="use", prune=True, output=tmp_path / "u.safetensors")
    used = tiny.load(tmp_path / "u.safetensors")
    start = "model.diffusion_model."
    for key in used:
        other = "model_ema.diffusion_model" + key.removeprefix(start).replace(".", "") if key.startswith(start) else key
        assert tiny.same(used[key], model[other])
    assert used.keys() == found.keys() - make.SCHEDULE.keys()
    with pytest.raises(MismatchError, match="no moving average"):
        sdops.convert(tmp_path / "u.safetensors", to="safetensors", ema="use", output=tmp_path / "x.safetensors")


def test_the_moving_average_in_a_side_file(small_checkpoint, tmp_path):
    file = small_checkpoint("sd15-ema")
    sdops.convert(file, to="diffusers", output=tmp_path / "f")
    reports = [
        sdops.convert(origin, to="original", ema="use", output=tmp_path / f"{name}.safetensors")
        for name, origin in (("a", file), ("b", tmp_path / "f"))
    ]
    assert same_tensors(*(tiny.load(tmp_path / f"{name}.safetensors") for name in "ab"))
    dropped = [list(report.data["dropped"].values()).count("replaced by its moving average") for report in reports]
    assert dropped == [686, 686]
    assert len(reports[0].data["dropped"]) == len(reports[1].data["dropped"])


def test_pruning_leaves_the_model(small_checkpoint, tmp_path):
    report = sdops.convert(
        small_checkpoint("sd15-ema"), to="safetensors", prune=True, output=tmp_path / "p.safetensors"
    )
    assert tiny.load(tmp_path / "p.safetensors").keys() == tiny.load(small_checkpoint("sd15")).keys()
    assert "pruned: schedule" in report.data["dropped"].values()


def test_a_vae_from_another_file(small_checkpoint, tmp_path):
    file, other = small_checkpoint("sd15"), tmp_path / "vae"
    donor = tiny.load(small_checkpoint("sd15-diffusers") / "vae" / "diffusion_pytorch_model.safetensors")
    changed = {key: (dtype, array + np.float16(1)) for key, (dtype, array) in donor.items()}
    other.mkdir()
    tiny.write(other / "diffusion_pytorch_model.safetensors", changed)
    report = sdops.convert(file, to="safetensors", vae=other, output=tmp_path / "s.safetensors")
    found, before = tiny.load(tmp_path / "s.safetensors"), tiny.load(file)
    assert found.keys() == before.keys()
    assert all(tiny.same(found[key], before[key]) != key.startswith("first_stage_model.") for key in found)
    assert np.array_equal(
        found["first_stage_model.decoder.mid.attn_1.q.weight"][1].reshape(-1),
        changed["decoder.mid_block.attentions.0.to_q.weight"][1].reshape(-1),
    )
    assert report.data["taken"] == {"vae": "vae"}
    assert not report.warnings
    with pytest.raises(MismatchError, match="no text encoder"):
        sdops.convert(file, to="safetensors", text_encoder=other, output=tmp_path / "x.safetensors")


def test_odd_text_encoders_become_usual_ones(small_checkpoint, tmp_path):
    """NovelAI's files, and those of programs that save what new versions of transformers make, lack `text_model.`."""
    model = tiny.load(small_checkpoint("sd15"))
    odd = {key.replace("transformer.text_model.", "transformer."): value for key, value in model.items()}
    file = tiny.write(tmp_path / "m.safetensors", odd)
    sdops.convert(file, to="original", output=tmp_path / "o.safetensors")
    assert tiny.load(tmp_path / "o.safetensors").keys() == model.keys()
    sdops.convert(file, to="diffusers", output=tmp_path / "f")
    keys = tiny.load(tmp_path / "f" / "text_encoder" / "model.safetensors").keys()
    assert all(key.startswith("text_model.") for key in keys)
    sdops.convert(tmp_path / "f", to="original", output=tmp_path / "b.safetensors")
    assert (tmp_path / "b.safetensors").read_bytes() == file.read_bytes()


# --------------------------------------------------------------------------------------------------------------- dtypes


def test_a_cast_rounds_every_float_and_nothing_else(file, tmp_path):
    tiny.write(file, tiny.checkpoint(1, "F32"))
    report = sdops.convert(file, to="safetensors", dtype="fp16", output=tmp_path / "h.safetensors")
    before, found = tiny.load(file), tiny.load(tmp_path / "h.safetensors")
    for key, (dtype, array) in found.items():
        assert dtype == ("I64" if key == tiny.IDS else "F16")
        assert np.array_equal(array, before[key][1].astype(array.dtype))
    assert report.data["tensors"]["cast"] == len(found) - 1
    assert json.loads(tiny.metadata_of(tmp_path / "h.safetensors")["sdops"])["dtype"] == "fp16"


def test_dtypes_by_component_and_pattern(file, tmp_path):
    sdops.convert(
        file, to="safetensors", dtype="bf16,vae=fp32,clip_l=keep", exclude=["*.bias"], output=tmp_path / "d.safetensors"
    )
    for key, (dtype, _) in tiny.load(tmp_path / "d.safetensors").items():
        vae = key.startswith(tiny.VAE)
        wanted = "F16" if key.startswith(tiny.CLIP) or key.endswith(".bias") else "F32" if vae else "BF16"
        assert dtype == ("I64" if key == tiny.IDS else wanted), key
    with pytest.raises(UsageError, match="did you mean `vae`"):
        sdops.convert(file, to="safetensors", dtype="vea=fp32", output=tmp_path / "x.safetensors")
    with pytest.raises(UsageError, match="no dtype `fp61`"):
        sdops.convert(file, to="safetensors", dtype="fp61", output=tmp_path / "x.safetensors")


def test_too_large_values_are_counted_clamped_or_refused(file, tmp_path):
    model = dict(tiny.checkpoint(1, "F32"))
    model[tiny.LARGE] = tiny.encoded(np.full((320, 768), 1e5), "F32")
    tiny.write(file, model)
    report = sdops.convert(file, to="safetensors", dtype="fp16", output=tmp_path / "h.safetensors")
    assert report.data["overflows"] == {tiny.LARGE: 320 * 768}
    assert (tiny.load(tmp_path / "h.safetensors")[tiny.LARGE][1] == 65504).all()
    assert any("clamped" in line for line in report.warnings)
    with pytest.raises(FormatError, match="too large"):
        sdops.convert(file, to="safetensors", dtype="fp16", strict=True, output=tmp_path / "s.safetensors")
    assert not (tmp_path / "s.safetensors").exists()


def test_fp8_is_for_the_matrices_of_blocks(small_checkpoint, tmp_path):
    file = small_checkpoint("flux1-dev", dtype="F16")
    sdops.convert(file, to="safetensors", dtype="fp8_e4m3", output=tmp_path / "e.safetensors")
    before, found = tiny.load(file), tiny.load(tmp_path / "e.safetensors")
    small = {key for key, (dtype, _) in found.items() if dtype == "F8_E4M3"}
    assert "double_blocks.0.img_attn.qkv.weight" in small
    assert "single_blocks.7.linear1.weight" in small
    assert all(before[key][1].ndim == 2 and "blocks." in key for key in small)
    key = "single_blocks.7.linear1.weight"
    out = np.empty(before[key][1].size, np.uint8)
    cast(before[key][1].reshape(-1).view(raw_dtype("F16")), "F16", out, "F8_E4M3")
    assert np.array_equal(found[key][1].reshape(-1), out)
    back = sdops.convert(tmp_path / "e.safetensors", to="safetensors", dtype="fp16", output=tmp_path / "b.safetensors")
    assert back.data["tensors"]["cast"] == len(small)
    assert np.array_equal(
        tiny.load(tmp_path / "b.safetensors")[key][1].reshape(-1), fp8_values("F8_E4M3")[out].astype(np.float16)
    )


def test_scaled_fp8_is_multiplied_out(small_checkpoint, tmp_path):
    model = dict(tiny.load(small_checkpoint("flux1-dev", dtype="F16")))
    key = "double_blocks.0.img_attn.qkv.weight"
    codes = np.arange(model[key][1].size, dtype=np.uint8).reshape(model[key][1].shape) & 0x3F
    model[key] = ("F8_E4M3", codes)
    model[key.replace(".weight", ".scale_weight")] = ("F32", np.float32(0.5))
    model["scaled_fp8"] = ("F8_E4M3", np.zeros(0, np.uint8))
    file = tiny.write(tmp_path / "m.safetensors", model)
    sdops.convert(file, to="ckpt", output=tmp_path / "as-it-is.ckpt")
    with pytest.raises(FormatError, match="fp8-scaled") as caught:
        sdops.convert(file, to="diffusers", output=tmp_path / "f")
    assert "--dtype fp16" in str(caught.value)
    sdops.convert(file, to="diffusers", dtype="fp16", output=tmp_path / "f")
    found = tiny.load(tmp_path / "f" / "diffusion_pytorch_model.safetensors")
    wanted = (fp8_values("F8_E4M3")[codes] * np.float32(0.5)).astype(np.float16)
    rows = len(codes) // 3
    assert np.array_equal(found["transformer_blocks.0.attn.to_k.weight"][1], wanted[rows : 2 * rows])


def test_every_scaled_component_has_its_marker_and_dtype(small_checkpoint, tmp_path):
    """ComfyUI looks for `scaled_fp8` in every model by itself."""
    dtype = "transformer=fp8_e4m3_scaled_old,t5xxl=fp8_e5m2_scaled_old"
    sdops.convert(small_checkpoint("flux1-dev-comfy-allinone"), dtype=dtype, output=tmp_path / "s.safetensors")
    found = tiny.load(tmp_path / "s.safetensors")
    for prefix, kind, key in (
        ("model.diffusion_model.", "F8_E4M3", "double_blocks.0.img_attn.qkv.weight"),
        ("text_encoders.t5xxl.transformer.", "F8_E5M2", "encoder.block.0.layer.0.SelfAttention.q.weight"),
    ):
        assert found[f"{prefix}scaled_fp8"][0] == found[prefix + key][0] == kind
    assert sum(key.endswith("scaled_fp8") for key in found) == 2


@pytest.mark.parametrize(("dtype", "scale"), [("fp8_scaled", "weight_scale"), ("fp8_scaled_old", "scale_weight")])
def test_scaled_fp8_is_written_and_read(small_checkpoint, tmp_path, dtype, scale):
    file = small_checkpoint("flux1-dev", dtype="F16")
    report = sdops.convert(file, to="safetensors", dtype=dtype, output=tmp_path / "s.safetensors")
    before, found = tiny.load(file), tiny.load(tmp_path / "s.safetensors")
    key = "single_blocks.7.linear1.weight"
    assert found[key][0] == "F8_E4M3"
    assert found[key.replace("weight", scale)][1] == np.float32(np.abs(before[key][1]).max() / np.float32(448))
    assert found.keys() - before.keys() == report.data["invented"].keys()
    sdops.convert(tmp_path / "s.safetensors", to="safetensors", dtype="fp16", output=tmp_path / "b.safetensors")
    back = tiny.load(tmp_path / "b.safetensors")
    assert back.keys() == before.keys()
    assert np.allclose(back[key][1], before[key][1], rtol=1 / 14, atol=2e-3 * np.abs(before[key][1]).max())
    with pytest.raises(UsageError, match="no dtype"):
        sdops.convert(file, to="diffusers", dtype=dtype, output=tmp_path / "f")


def test_rounding_at_random_is_repeatable(file, tmp_path):
    tiny.write(file, tiny.checkpoint(1, "F32"))
    outputs = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        path = tmp_path / f"{name}.safetensors"
        sdops.convert(file, to="safetensors", dtype="bf16", seed=seed, output=path)
        outputs.append(tiny.load(path)[tiny.LARGE][1].tobytes())
    assert outputs[0] == outputs[1] != outputs[2]


# ----------------------------------------------------------------------------------------------------- what is refused


def test_what_is_unknown_is_never_lost_silently(small_checkpoint, tmp_path):
    model = tiny.load(small_checkpoint("sd15"))
    strange = {
        "model.diffusion_model.new.weight": ("F16", np.ones(3, np.float16)),
        "x.y": ("F32", np.ones((2, 2), "f4")),
    }
    file = tiny.write(tmp_path / "m.safetensors", {**model, **strange})
    with pytest.raises(MismatchError, match="2 tensors that sdops does not know") as caught:
        sdops.convert(file, to="diffusers", output=tmp_path / "f")
    assert set(caught.value.data["keys"]) == strange.keys()
    kept = sdops.convert(file, to="diffusers", unknown="keep", output=tmp_path / "f")
    assert strange.keys() <= set(kept.data["set_aside"])
    sdops.convert(tmp_path / "f", to="original", output=tmp_path / "b.safetensors")
    assert same_tensors(tiny.load(tmp_path / "b.safetensors"), {**model, **strange})
    dropped = sdops.convert(file, to="diffusers", unknown="drop", output=tmp_path / "f", force=True)
    assert dropped.data["dropped"] == dict.fromkeys(strange, "unknown")
    copied = sdops.convert(file, to="ckpt", output=tmp_path / "m.ckpt")
    assert copied.data["dropped"] == {}


def test_outputs_are_not_overwritten(file, small_checkpoint, tmp_path):
    with pytest.raises(OutputError, match="is the input"):
        sdops.convert(file, to="safetensors", output=file, force=True)
    sdops.convert(file, to="safetensors", output=tmp_path / "o.safetensors")
    with pytest.raises(OutputError, match="exists already"):
        sdops.convert(file, to="safetensors", output=tmp_path / "o.safetensors")
    folder = tmp_path / "f"
    sdops.convert(small_checkpoint("controlnet-sd15-ldm"), to="diffusers", output=folder)
    with pytest.raises(OutputError, match="holds the input"):
        sdops.convert(folder, to="diffusers", output=folder, force=True)


def test_a_dry_run_tells_that_there_is_no_room(small_checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(files, "free_space", lambda _: 1000)
    for to, shard in (("diffusers", None), ("safetensors", None), ("safetensors", 100_000)):
        arguments = {"to": to, "output": tmp_path / "new", "shard": shard}
        report = sdops.convert(small_checkpoint("sd15"), dry_run=True, **arguments)
        assert "1.00 kB free" in report.warnings[-1]
        assert report.data["tensors"]["copied"] > 0
        with pytest.raises(OutputError, match="kB free"):
            sdops.convert(small_checkpoint("sd15"), **arguments)
    assert not list(tmp_path.iterdir())


def test_a_dry_run_checks_and_writes_nothing(small_checkpoint, tmp_path):
    before = sorted(tmp_path.rglob("*"))
    report = sdops.convert(small_checkpoint("sd21"), to="diffusers", output=tmp_path / "f", dry_run=True)
    assert report.data["dry_run"]
    assert sorted(tmp_path.rglob("*")) == before
    done = sdops.convert(small_checkpoint("sd21"), to="diffusers", output=tmp_path / "f")
    assert done.data["tensors"] == report.data["tensors"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"to": "difusers"}, "did you mean `diffusers`"),
        ({"to": "ckpt", "shard": 5}, "cannot be cut"),
        ({"to": "safetensors", "ema": "yes"}, "keep, drop, use"),
    ],
)
def test_wrong_words_are_refused_before_anything_is_read(arguments, words):
    with pytest.raises(UsageError) as caught:
        sdops.convert("nothing", **arguments)
    assert words in f"{caught.value} {caught.value.hint}"


def test_hashes_and_metadata(file, tmp_path):
    """Hashes that are no longer true go; the rest is carried over."""
    sdops.convert(file, to="safetensors", output=tmp_path / "o.safetensors")
    assert tiny.metadata_of(tmp_path / "o.safetensors") == {"format": "pt", "modelspec.title": "M"}
    tiny.write(file, tiny.checkpoint(1), {"sdops": "old recipe"})
    sdops.convert(file, to="safetensors", dtype="fp32", output=tmp_path / "c.safetensors")
    recipe = json.loads(tiny.metadata_of(tmp_path / "c.safetensors")["sdops"])
    assert recipe["inputs"] == [{"role": "a", "file": "m.safetensors", "made": "old recipe"}]


def test_a_folder_as_a_folder_keeps_its_files(small_checkpoint, tmp_path):
    file, folder = small_checkpoint("sd15"), tmp_path / "f"
    sdops.convert(file, to="diffusers", output=folder)
    config = folder / "unet" / "config.json"
    config.write_text(config.read_text().replace('"sample_size": 64', '"sample_size": 96'))
    sdops.convert(folder, to="diffusers", dtype="fp32", output=tmp_path / "g")
    assert '"sample_size": 96' in (tmp_path / "g" / "unet" / "config.json").read_text()
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert names == {
        path.relative_to(tmp_path / "g").as_posix() for path in (tmp_path / "g").rglob("*") if path.is_file()
    }
    found = tiny.load(tmp_path / "g" / "unet" / "diffusion_pytorch_model.safetensors")
    assert {dtype for dtype, _ in found.values()} == {"F32"}
    sdops.convert(tmp_path / "g", to="original", dtype="fp16", output=tmp_path / "b.safetensors")
    assert same_tensors(tiny.load(tmp_path / "b.safetensors"), tiny.load(file))


def test_a_reference_gives_tokenizers(small_checkpoint, tmp_path):
    reference = tmp_path / "r"
    index = {"tokenizer_2": ["transformers", "T5TokenizerFast"], "safety_checker": ["a", "B"]}
    files = {
        "model_index.json": json.dumps({"_class_name": "FluxPipeline", **index}),
        "tokenizer_2/spiece.model": "words",
        "safety_checker/config.json": "{}",
        "safety_checker/preprocessor_config.json": "{}",
    }
    for name, text in files.items():
        (reference / name).parent.mkdir(parents=True, exist_ok=True)
        (reference / name).write_text(text)
    file = small_checkpoint("flux1-dev-comfy-allinone")
    without = sdops.convert(file, to="diffusers", output=tmp_path / "w")
    assert any("tokenizer_2=None" in line for line in without.warnings)
    report = sdops.convert(file, to="diffusers", reference=reference, output=tmp_path / "f")
    index = json.loads((tmp_path / "f" / "model_index.json").read_text())
    assert index["tokenizer_2"] == ["transformers", "T5TokenizerFast"]
    assert index["safety_checker"] == [None, None]
    assert (tmp_path / "f" / "tokenizer_2" / "spiece.model").read_text() == "words"
    assert not (tmp_path / "f" / "safety_checker").exists()
    assert not any("tokenizer_2" in line for line in report.warnings)


def test_a_name_is_derived(file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = sdops.convert(file, to="safetensors", dtype="fp32", prune=True, components=["vae"])
    assert done.result == ["m.fp32.pruned.vae.safetensors"]
    assert Path(done.result[0]).is_file()


def test_components_that_a_model_lacks_come_from_other_files(small_checkpoint, tmp_path):
    names = {"vae": "flux-ae-ldm", "clip_l": "clip_l-hf", "t5xxl": "t5xxl-hf"}
    files = {part: small_checkpoint(name) for part, name in names.items()}
    given = {"vae": files["vae"], "text_encoder": [files["clip_l"], files["t5xxl"]]}
    report = sdops.convert(small_checkpoint("flux1-dev"), to="diffusers", output=tmp_path / "f", **given)
    index = json.loads((tmp_path / "f/model_index.json").read_text())
    assert index["text_encoder_2"] == ["transformers", "T5EncoderModel"]
    assert index["tokenizer_2"] == [None, None]
    assert "tokenizer_2=None" in report.warnings[-1]
    sdops.convert(small_checkpoint("flux1-dev"), to="original", output=tmp_path / "o.safetensors", **given)
    sdops.convert(tmp_path / "f", to="original", output=tmp_path / "b.safetensors")
    one, other = tiny.load(tmp_path / "o.safetensors"), tiny.load(tmp_path / "b.safetensors")
    assert "model.diffusion_model.img_in.weight" in one
    assert same_tensors(one, other)


def test_components_of_any_layout_are_put_together(small_checkpoint, tmp_path):
    file, folder = small_checkpoint("sd15"), small_checkpoint("sd15-diffusers")
    given = {"vae": folder / "vae", "text_encoder": folder / "text_encoder"}
    sdops.convert(folder / "unet", to="safetensors", output=tmp_path / "j.safetensors", **given)
    sdops.convert(folder, to="original", output=tmp_path / "o.safetensors")
    found = tiny.load(tmp_path / "j.safetensors")
    assert same_tensors(found, tiny.load(tmp_path / "o.safetensors"))
    assert found.keys() == {key for key in tiny.load(file) if not key.endswith("position_ids")}


def test_a_replaced_component_has_the_place_of_the_old_one_on_the_way_back(small_checkpoint, tmp_path):
    file = small_checkpoint("sd15")
    sdops.convert(file, to="original", components=["vae"], output=tmp_path / "vae.safetensors")
    sdops.convert(file, to="diffusers", vae=tmp_path / "vae.safetensors", output=tmp_path / "f")
    sdops.convert(tmp_path / "f", to="original", output=tmp_path / "back.safetensors")
    assert tiny.load(tmp_path / "back.safetensors").keys() == tiny.load(file).keys()


def test_a_vae_for_other_latents_is_told(small_checkpoint, tmp_path):
    for donor, told in (("sdxl", 1), ("sd21", 0)):
        swapped = sdops.convert(
            small_checkpoint("sd15"), vae=small_checkpoint(donor), output=tmp_path / f"{donor}.safetensors"
        )
        assert sum("latents" in line for line in swapped.warnings) == told


def test_a_vae_of_other_sizes_is_refused(small_checkpoint, tmp_path):
    with pytest.raises(MismatchError, match="does not fit"):
        sdops.convert(
            small_checkpoint("sd15"), to="diffusers", vae=small_checkpoint("flux-ae-ldm"), output=tmp_path / "f"
        )


UNIGRAM = {"model": {"type": "Unigram", "vocab": [["<pad>", 0.0], ["</s>", 0.0], ["<unk>", 0.0]]}}


@pytest.mark.parametrize("given", ["file", "folder", "pipeline"])
def test_a_tokenizer_of_t5_from_the_disk(small_checkpoint, tmp_path, given):
    place = {"file": "t.json", "folder": "d/tokenizer.json", "pipeline": "d/tokenizer_2/tokenizer.json"}[given]
    (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / place).write_text(json.dumps(UNIGRAM))
    tokenizer = tmp_path / place.partition("/")[0]
    report = sdops.convert(
        small_checkpoint("flux1-dev-comfy-allinone"), to="diffusers", tokenizer=tokenizer, output=tmp_path / "f"
    )
    assert not report.warnings
    assert json.loads((tmp_path / "f/tokenizer_2/tokenizer.json").read_text()) == UNIGRAM
    assert json.loads((tmp_path / "f/tokenizer_2/tokenizer_config.json").read_text())["eos_token"] == "</s>"
    assert json.loads((tmp_path / "f/model_index.json").read_text())["tokenizer_2"] == [
        "transformers",
        "T5TokenizerFast",
    ]


def test_other_tokenizers_are_refused(small_checkpoint, tmp_path):
    (tmp_path / "clip.json").write_text(json.dumps({"model": {"type": "BPE", "vocab": {"!": 0}}}))
    for model, tokenizer, said in (
        ("flux1-dev-comfy-allinone", "clip.json", "no tokenizer of T5"),
        ("flux1-dev-comfy-allinone", "missing", "there is no"),
        ("sd15", "clip.json", "has no T5"),
    ):
        with pytest.raises(UsageError, match=said):
            sdops.convert(
                small_checkpoint(model), to="diffusers", tokenizer=tmp_path / tokenizer, output=tmp_path / "f"
            )


def test_without_a_form_a_file_keeps_it_and_a_pickle_becomes_safetensors(small_checkpoint, tmp_path):
    file = small_checkpoint("sd15", dtype="F16")
    sdops.convert(file, dtype="bf16", output=tmp_path / "bf16.safetensors")
    assert {spec.dtype for spec in open_source(tmp_path / "bf16.safetensors").specs.values()} <= {"BF16", "I64"}
    sdops.convert(file, to="ckpt", output=tmp_path / "m.ckpt")
    sdops.convert(tmp_path / "m.ckpt", output=tmp_path / "back.safetensors")
    assert tiny.load(tmp_path / "back.safetensors").keys() == tiny.load(file).keys()
    sdops.convert(file, to="diffusers", output=tmp_path / "folder")
    sdops.convert(tmp_path / "folder", dtype="bf16", output=tmp_path / "other")
    assert (tmp_path / "other" / "model_index.json").is_file()
    with pytest.raises(UsageError, match="what to convert to is not said"):
        sdops.convert(file)


def test_another_denoiser_brings_what_tells_of_it(small_checkpoint, tmp_path):
    plain = small_checkpoint("sdxl")
    tells = {"v_pred": ("F32", np.zeros(0, np.float32)), "ztsnr": ("F32", np.zeros(0, np.float32))}
    other = tiny.write(
        tmp_path / "v.safetensors", {key: (d, a + a.dtype.type(1)) for key, (d, a) in tiny.load(plain).items()} | tells
    )
    report = sdops.convert(plain, unet=other, output=tmp_path / "s.safetensors")
    found, own, given = (tiny.load(path) for path in (tmp_path / "s.safetensors", plain, other))
    assert found.keys() == given.keys()
    start = ("model.diffusion_model.", *tells)
    assert all(tiny.same(array, (given if key.startswith(start) else own)[key]) for key, array in found.items())
    assert report.data["taken"] == {"unet": "v.safetensors"}
    for model, donor, predicted in ((plain, other, "v_prediction"), (other, plain, "epsilon")):
        sdops.convert(model, to="diffusers", unet=donor, output=tmp_path / "f", force=True)
        scheduler = json.loads((tmp_path / "f/scheduler/scheduler_config.json").read_text())
        assert scheduler["prediction_type"] == predicted


def test_the_average_of_a_replaced_denoiser_goes(small_checkpoint, tmp_path):
    file, donor = small_checkpoint("sd15-ema"), small_checkpoint("sd15-diffusers") / "unet"
    report = sdops.convert(file, unet=donor, output=tmp_path / "s.safetensors")
    model, found = tiny.load(file), tiny.load(tmp_path / "s.safetensors")
    assert found.keys() == {key for key in model if not key.startswith("model_ema")}
    assert model.keys() - found.keys() <= report.data["dropped"].keys()
    with pytest.raises(UsageError, match="own U-Net"):
        sdops.convert(file, unet=donor, ema="use", output=tmp_path / "x.safetensors")
    with pytest.raises(MismatchError, match="Stable Diffusion XL"):
        sdops.convert(file, unet=small_checkpoint("sdxl"), output=tmp_path / "x.safetensors")


def test_markers_of_scaled_components_come_and_go_with_them(small_checkpoint, tmp_path):
    plain, scaled = small_checkpoint("flux1-dev-comfy-allinone"), tmp_path / "s.safetensors"
    sdops.convert(plain, dtype="fp8_scaled_old", output=scaled)
    for model, donor, marked in ((plain, scaled, {"text_encoders"}), (scaled, plain, {"model"})):
        sdops.convert(model, text_encoder=donor, output=tmp_path / "o.safetensors", force=True)
        keys = tiny.load(tmp_path / "o.safetensors").keys()
        assert {key.split(".")[0] for key in keys if key.endswith(".scaled_fp8")} == marked


@pytest.mark.parametrize(
    ("to", "name", "hint"),
    [
        ("ckpt", "m.safetensors", "`.ckpt`"),
        ("gguf", "m.ckpt", "`.gguf`"),
        ("diffusers", "m.safetensors", "folder"),
        ("safetensors", "m.gguf", "`.safetensors`"),
    ],
)
def test_an_ending_of_another_container_is_refused(file, tmp_path, to, name, hint):
    with pytest.raises(UsageError, match="is not the name of what") as caught:
        sdops.convert(file, to=to, output=tmp_path / "out" / name)
    assert hint in caught.value.hint
