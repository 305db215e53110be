"""What a merge does with tensors that cannot simply be merged, and what it says about them."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sdops.archs.junk import ema_key_of
from sdops.core.source import read
from sdops.core.spec import Spec
from sdops.errors import FormatError, MismatchError, UsageError
from sdops.verbs.merge import Merge, merge
from tests import tiny
from tests.tiny import CLIP, FIRST, IDS, LARGE, UNET, VAE, Memory, Model, checkpoint, encoded, numbers, same

KEYS = Path(__file__).parents[2] / "fixtures" / "keys"
BIAS = f"{UNET}out.2.bias"


def lazy(*sources: Any, **options: Any) -> Merge:
    named = zip("abcd", sources, strict=False)
    made = merge(*[Memory(s, f"{n}.safetensors") if isinstance(s, dict) else s for n, s in named], **options)
    assert isinstance(made, Merge)
    return made


def result(made: Merge) -> Model:
    """All tensors of a merge, with nothing written."""
    kinds = {"BF16": "u2", "F16": "f2", "F32": "f4", "F64": "f8", "I64": "i8", "I32": "i4", "BOOL": "u1", "U8": "u1"}
    return {
        key: (spec.dtype, np.frombuffer(read(made, key), kinds[spec.dtype]).reshape(spec.shape))
        for key, spec in made.specs.items()
    }


def without(model: Model, *keys: str) -> Model:
    return {key: tensor for key, tensor in model.items() if key not in keys}


def part(model: Model, prefix: str, new: str = "") -> Model:
    """One component under another prefix."""
    return {new + key.removeprefix(prefix): tensor for key, tensor in model.items() if key.startswith(prefix)}


def midway(a: tuple[str, Any], b: tuple[str, Any]) -> tuple[str, Any]:
    return encoded((numbers(a) + numbers(b)) / 2, a[0])


class Shapes:
    """A real model's names and shapes without values."""

    def __init__(self, name: str) -> None:
        listed = json.loads(gzip.decompress((KEYS / f"{name}.json.gz").read_bytes()))
        self.name, self.metadata = name, {}
        self.specs = {key: Spec(dtype, tuple(shape)) for key, (dtype, shape) in listed.items()}

    def read_into(self, key: str, start: int, buffer: memoryview) -> None:
        right = b"".join(i.to_bytes(8, "little") for i in range(77))
        assert key.endswith("position_ids"), "a tensor was read"
        buffer[:] = right[start : start + len(buffer)]

    def close(self) -> None:
        pass


# --- families, layouts, prefixes ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("a", "b", "words"),
    [
        ("sd15-ldm", "sdxl-base-sgm", ["Stable Diffusion 1.x", "XL"]),
        ("sdxl-base-sgm", "sdxl-refiner-sgm", ["XL", "efiner"]),
        ("sd15-ldm", "sd21-ldm", ["Stable Diffusion 1.x", "Stable Diffusion 2.x"]),
        ("flux1-dev-bfl-transformer", "chroma-bfl-transformer", ["Flux", "Chroma"]),
        ("flux1-dev-bfl-transformer", "sd3-medium-sai", ["Flux", "3"]),
        ("sd15-ldm", "clip_l-hf", ["Stable Diffusion 1.x", "CLIP"]),
    ],
)
def test_other_families_are_refused_by_name(a: str, b: str, words: list[str]) -> None:
    with pytest.raises(MismatchError) as caught:
        merge(Shapes(a), Shapes(b))
    assert all(word in caught.value.message for word in (a, b, *words)), caught.value.message
    assert "inspect" in caught.value.hint


FAMILIES = """
    sd15-ldm sd21-ldm sdxl-base-sgm sd3-medium-sai flux1-dev-bfl-transformer flux2-klein4b-bfl-transformer
    sd15-diffusers z-image-comfy-transformer chroma-bfl-transformer
    qwen-image-diffusers-transformer wan21-t2v-1.3b-native-transformer
"""


@pytest.mark.parametrize("name", FAMILIES.split())
@pytest.mark.parametrize("method", ["weighted-sum", "ties"])
def test_every_family_is_planned_whole(name: str, method: str) -> None:
    options = {"base": Shapes(name)} if method == "ties" else {}
    made = merge(Shapes(name), Shapes(name), method=method, **options)
    assert isinstance(made, Merge)
    floats = sum(spec.is_float for spec in made.specs.values())
    assert made.plan.count("merge") == floats
    assert made.specs == Shapes(name).specs
    assert not made.plan.dropped


def test_one_component_under_another_prefix() -> None:
    a, b = checkpoint(1), checkpoint(2)
    bare = lazy(a, part(b, UNET, "diffusion_model."))
    assert same(result(bare)[LARGE], midway(a[LARGE], b[LARGE]))
    out = result(lazy(part(a, UNET), b))
    assert out.keys() == part(a, UNET).keys()
    assert same(out[LARGE.removeprefix(UNET)], midway(a[LARGE], b[LARGE]))


@pytest.mark.parametrize("flat", ["a", "b", "donor"])
def test_defect_12_text_encoders_without_text_model_in_their_names(flat: str) -> None:
    """The first anime models spell `transformer.encoder...`; nothing is added twice, nothing is missed."""
    a, b, donor = checkpoint(1), checkpoint(2), checkpoint(3)
    short = {name: {key.replace("text_model.", ""): t for key, t in m.items()} for name, m in (("a", a), ("b", b))}
    bare = {key.replace(CLIP, ""): tensor for key, tensor in donor.items() if key.startswith(CLIP)}
    key = f"{CLIP}encoder.layers.11.layer_norm1.weight"
    if flat == "donor":
        out = result(lazy(a, b, text_encoder=Memory(bare)))
        assert same(out[key], donor[key])
    else:
        out = result(lazy(short["a"] if flat == "a" else a, short["b"] if flat == "b" else b))
        spelled = key.replace("text_model.", "") if flat == "a" else key
        assert same(out[spelled], midway(a[key], b[key]))
    assert out.keys() == (short["a"] if flat == "a" else a).keys()


def test_a_component_that_another_model_lacks_stays() -> None:
    a, b = checkpoint(1), checkpoint(2)
    made = lazy(a, part(b, UNET, UNET))
    out = result(made)
    assert out.keys() == a.keys()
    assert all(same(out[key], a[key]) for key in a if not key.startswith(UNET))
    reasons = {step.reason for key, step in made.plan.steps.items() if key.startswith((VAE, CLIP)) and key != IDS}
    assert reasons == {"missing in `b.safetensors`"}
    assert made.plan.count("merge") == len(tiny.UNET_SHAPES)


# --- missing and extra tensors --------------------------------------------------------------------------------------


@pytest.mark.parametrize("who", ["b", "a"])
@pytest.mark.parametrize("missing", ["error", "keep", "drop"])
@pytest.mark.parametrize("method", ["weighted-sum", "slerp"])
def test_defect_4_a_missing_tensor_is_never_dropped_in_silence(who: str, missing: str, method: str) -> None:
    a, b = checkpoint(1), checkpoint(2)
    lacking, having = (without(a, BIAS), b) if who == "a" else (without(b, BIAS), a)
    models = (lacking, b) if who == "a" else (a, lacking)
    if missing == "error":
        with pytest.raises(MismatchError, match=rf"`{who}.safetensors` lacks 1 tensor") as caught:
            lazy(*models, method=method)
        assert BIAS in caught.value.message
        assert "--missing keep" in caught.value.hint
        return
    made = lazy(*models, method=method, missing=missing)
    report = made.dry_run("out.safetensors")
    if missing == "keep":
        assert same(result(made)[BIAS], having[BIAS])
        told = "only in `b.safetensors`" if who == "a" else "missing in `b.safetensors`"
        assert made.plan.steps[BIAS].reason == told
        assert told in str(report)
    else:
        assert BIAS not in made.specs
        assert BIAS in made.plan.dropped
        assert BIAS in str(report)


def test_keep_takes_everything_but_ballast_from_the_others() -> None:
    a, b = part(checkpoint(1), UNET, UNET), checkpoint(2)
    b |= {"betas": encoded(np.zeros(1000), "F32"), f"{UNET}counter": ("I64", np.array(7))}
    plain = lazy(a, b)
    assert plain.specs.keys() == a.keys()
    assert set(plain.plan.dropped) == set(b) - set(a)  # reported
    out = lazy(a, b, missing="keep")
    assert out.specs.keys() == set(b) - {"betas"}
    assert same(result(out)[f"{UNET}counter"], b[f"{UNET}counter"])


def test_position_ids_of_other_models_are_reported_not_missed() -> None:
    a = without(checkpoint(1), IDS)
    made = lazy(a, checkpoint(2))
    assert IDS not in made.specs
    assert made.plan.dropped == {IDS: "only in `b.safetensors`"}


def test_shapes_that_differ_are_refused() -> None:
    a, b = checkpoint(1), checkpoint(2)
    b[BIAS] = encoded(np.zeros(5), "F16")
    with pytest.raises(MismatchError, match=r"1 tensor of different shape.*out\.2\.bias.*\[4\].*\[5\]"):
        lazy(a, b)
    assert same(result(lazy(a, b, exclude=[BIAS]))[BIAS], a[BIAS])


# --- inpainting and edit models -------------------------------------------------------------------------------------


def wider(model: Model, channels: int, dtype: str = "F16") -> Model:
    """The first convolution with more input channels, all the rest the same."""
    more = np.random.default_rng(9).standard_normal((320, channels - 4, 3, 3)) * 0.1
    return model | {FIRST: encoded(np.concatenate([numbers(model[FIRST]), more], axis=1), dtype)}


@pytest.mark.parametrize("channels", [9, 8])
@pytest.mark.parametrize("method", ["weighted-sum", "slerp", "nearswap", "tensor-sum"])
def test_defect_5_and_19_and_21_first_convolutions_of_two_widths(method: str, channels: int) -> None:
    a, b = checkpoint(1), checkpoint(2)
    wide = wider(a, channels)
    made = lazy(wide, b, method=method)
    assert any(f"4 input channels in `b.safetensors`, {channels} in `a.safetensors`" in w for w in made.plan.warnings)
    out = numbers(result(made)[FIRST])
    assert out.shape == (320, channels, 3, 3)
    assert np.array_equal(out[:, 4:], numbers(wide[FIRST])[:, 4:]) or method == "slerp"
    assert not np.array_equal(out[:, :4], numbers(a[FIRST]))
    if method == "weighted-sum":
        assert np.array_equal(out[:, :4], numbers(midway(a[FIRST], b[FIRST])))
        assert same(result(lazy(a, wider(b, channels)))[FIRST], midway(a[FIRST], b[FIRST]))  # cut to 4


@pytest.mark.parametrize("channels", [9, 8])
def test_the_recipe_for_inpainting(channels: int) -> None:
    """inpainting + (tuned - base): the four channels in common receive the difference, the others stay."""
    inpainting, tuned, base = wider(checkpoint(3), channels), checkpoint(2), checkpoint(0)
    out = result(lazy(inpainting, tuned, base, method="add-difference", alpha=1.0))
    a, b, c = (numbers(model[FIRST]) for model in (inpainting, tuned, base))
    assert np.array_equal(numbers(out[FIRST])[:, 4:], a[:, 4:])
    assert np.array_equal(numbers(out[FIRST])[:, :4], numbers(encoded(a[:, :4] + (b - c), "F16")))
    a, b, c = (numbers(model[LARGE]) for model in (inpainting, tuned, base))
    assert same(out[LARGE], encoded(a + (b - c), "F16"))


def test_channels_of_another_dtype_stay_as_they_are() -> None:
    a = wider(checkpoint(1, "F32"), 9, "F32")
    out = result(lazy(a, checkpoint(2, "F16")))
    assert np.array_equal(out[FIRST][1][:, 4:], a[FIRST][1][:, 4:])
    assert out[FIRST][0] == "F32"


# --- integers, position ids, markers, ballast -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stored", "said"),
    [
        (("F16", np.arange(77).astype("f2").reshape(1, 77)), "stored as F16"),
        (encoded(np.arange(77).reshape(1, 77), "BF16"), "stored as BF16"),
        (("F32", (np.arange(77) * 0.97).astype("f4").reshape(1, 77)), "stored as F32"),
        (("I64", np.minimum(np.arange(77), 75).reshape(1, 77)), "broken by an earlier merge"),
        (("I32", np.zeros((1, 77), "i4")), "broken by an earlier merge"),
    ],
)
@pytest.mark.parametrize("method", ["weighted-sum", "slerp", "tensor-sum"])
def test_defect_1_and_13_position_ids_are_put_right(stored: tuple[str, Any], said: str, method: str) -> None:
    a, b = checkpoint(1) | {IDS: stored}, checkpoint(2)
    made = lazy(a, b, method=method, dtype="bf16")
    assert same(result(made)[IDS], ("I64", tiny.POSITIONS))
    assert said in made.plan.repaired[IDS]
    assert any(IDS in text and said in text for text in made.dry_run("out.safetensors").warnings)


def test_right_position_ids_are_copied_whatever_the_other_holds() -> None:
    broken = checkpoint(2) | {IDS: ("F16", np.zeros((1, 77), "f2"))}
    made = lazy(checkpoint(1), broken, dtype="fp32")
    assert same(result(made)[IDS], ("I64", tiny.POSITIONS))
    assert made.plan.repaired == {}
    small = ("I32", np.arange(77, dtype="i4").reshape(1, 77))
    assert same(result(lazy(checkpoint(1) | {IDS: small}, broken))[IDS], small)


def test_integers_are_copied_not_averaged() -> None:
    name = f"{UNET}num_batches_tracked"
    for dtype, code in (("I64", "i8"), ("I32", "i4"), ("U8", "u1"), ("BOOL", "u1")):
        a, b = (checkpoint(seed) | {name: (dtype, np.array([seed % 2], code))} for seed in (1, 2))
        assert same(result(lazy(a, b, dtype="fp16"))[name], a[name])


def test_a_number_here_and_an_integer_there() -> None:
    a, b = checkpoint(1), checkpoint(2) | {BIAS: ("I64", np.arange(4))}
    made = lazy(a, b)
    assert same(result(made)[BIAS], a[BIAS])
    assert made.plan.steps[BIAS].reason == "I64 in `b.safetensors`, not merged"


def with_ballast(seed: int, dtype: str = "F16") -> Model:
    model = checkpoint(seed, dtype)
    model[ema_key_of(LARGE)] = model[LARGE]
    model[ema_key_of(BIAS)] = model[BIAS]
    model["model_ema.decay"] = encoded(0.9999, "F32")
    model["model_ema.num_updates"] = ("I32", np.array(seed, "i4"))
    model["betas"] = encoded(np.linspace(1e-4, 2e-2, 1000) * seed, "F32")
    model["alphas_cumprod"] = encoded(np.linspace(1, 0, 1000), "F32")
    return model


def test_moving_averages_and_schedules_are_the_first_models() -> None:
    a, b = with_ballast(1), with_ballast(2)
    made = lazy(a, b, dtype="bf16")
    out = result(made)
    assert same(out["betas"], a["betas"])  # in its own precision
    assert same(out["model_ema.num_updates"], a["model_ema.num_updates"])
    assert same(out[ema_key_of(LARGE)], encoded(numbers(a[LARGE]), "BF16"))
    reasons = made.dry_run("out.safetensors").data["reasons"]
    assert reasons["schedule, not merged"] == 2
    assert reasons["ema, not merged"] == 3
    assert result(lazy(a, checkpoint(2))).keys() == a.keys()  # another model without ballast is nothing to complain of
    assert result(lazy(checkpoint(1), b)).keys() == checkpoint(1).keys()


def test_ballast_is_pruned_on_request() -> None:
    made = lazy(with_ballast(1), with_ballast(2), prune=True)
    assert made.specs.keys() == checkpoint(1).keys()
    assert made.plan.dropped["betas"] == "pruned: schedule"
    assert "6 tensors" in str(made.dry_run("out.safetensors")) or len(made.plan.dropped) == 6


def test_markers_say_what_the_first_model_is() -> None:
    a, b = checkpoint(1) | {"v_pred": encoded(np.zeros(0), "F32")}, checkpoint(2)
    made = lazy(a, b, dtype="fp16", prune=True)
    assert same(result(made)["v_pred"], a["v_pred"])
    made = lazy(b, a)
    assert "v_pred" not in made.specs
    assert made.plan.dropped == {"v_pred": "only in `b.safetensors`"}
    assert any("`v_pred`" in text for text in made.plan.warnings)


# --- parts from other files -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", [VAE, "", "vae."])
def test_a_vae_from_another_file(prefix: str) -> None:
    a, b, donor = checkpoint(1), checkpoint(2), checkpoint(3)
    file = donor if prefix == VAE else part(donor, VAE, prefix)
    made = lazy(a, b, vae=Memory(file, "vae.safetensors"))
    out = result(made)
    assert all(same(out[key], donor[key]) for key in a if key.startswith(VAE))
    assert same(out[LARGE], midway(a[LARGE], b[LARGE]))
    assert out.keys() == a.keys()
    assert made.dry_run("out.safetensors").data["reasons"]["from `vae.safetensors`"] == len(tiny.VAE_SHAPES)
    assert [item["role"] for item in made.made["inputs"]] == ["a", "b", "vae"]


@pytest.mark.parametrize("prefix", [CLIP, "text_model."])
def test_a_text_encoder_from_another_file(prefix: str) -> None:
    a, b, donor = checkpoint(1), checkpoint(2), checkpoint(3)
    broken = ("F16", np.zeros((1, 77), "f2"))
    file = part(donor | {IDS: broken}, CLIP, prefix) if prefix != CLIP else donor | {IDS: broken}
    out = result(lazy(a, b, method="slerp", text_encoder=Memory(file, "clip.safetensors")))
    assert all(same(out[key], donor[key]) for key in a if key.startswith(CLIP) and key != IDS)
    assert same(out[IDS], ("I64", tiny.POSITIONS))  # not the donor's broken ones


def test_a_part_keeps_its_precision_unless_told_otherwise() -> None:
    donor = part(checkpoint(3, "F32"), VAE)
    key = f"{VAE}decoder.conv_in.weight"
    kept = result(lazy(checkpoint(1), checkpoint(2), vae=Memory(donor)))
    assert same(kept[key], donor[key.removeprefix(VAE)])
    assert result(lazy(checkpoint(1), checkpoint(2), vae=Memory(donor), dtype="bf16"))[key][0] == "BF16"


def test_parts_that_do_not_fit_are_refused() -> None:
    a, b = checkpoint(1), checkpoint(2)
    with pytest.raises(MismatchError, match="`x` has no vae"):
        lazy(a, b, vae=Memory(part(checkpoint(3), UNET, UNET), "x"))
    with pytest.raises(MismatchError, match=r"`a\.safetensors` has no vae that `x`"):
        lazy(part(a, UNET, ""), part(b, UNET, ""), vae=Memory(checkpoint(3), "x"))  # no place: it is a bare UNet
    other = part(checkpoint(3), VAE)
    other["decoder.conv_in.weight"] = encoded(np.zeros((512, 16, 3, 3)), "F16")
    with pytest.raises(MismatchError, match=r"vae of `x` differs .* in \d+ tensors?"):
        lazy(a, b, vae=Memory(other, "x"))
    short = without(part(checkpoint(3), VAE), "encoder.conv_in.weight")
    with pytest.raises(MismatchError, match=r"differs .* in 1 tensor.*encoder\.conv_in\.weight"):
        lazy(a, b, vae=Memory(short, "x"))


@pytest.mark.parametrize("prefix", [VAE, ""])
def test_a_part_that_the_models_lack_is_added(prefix: str) -> None:
    a, b = (part(checkpoint(seed), UNET, UNET) for seed in (1, 2))
    donor = part(checkpoint(3, "F32"), VAE, prefix)
    made = lazy(a, b, vae=Memory(donor, "vae.safetensors"))
    out = result(made)
    assert all(same(out[VAE + key], donor[prefix + key]) for key in tiny.VAE_SHAPES)
    assert out.keys() == a.keys() | {VAE + key for key in tiny.VAE_SHAPES}
    assert same(out[LARGE], midway(a[LARGE], b[LARGE]))
    clip = part(checkpoint(3), CLIP, "text_model.")
    both = result(lazy(a, b, vae=Memory(donor), text_encoder=Memory(clip, "clip"), dtype="fp32"))
    assert both[f"{CLIP}encoder.layers.0.mlp.fc1.bias"][0] == "F32"
    assert {key for key in both if key.startswith(CLIP)} >= {CLIP + key for key in tiny.CLIP_SHAPES}


def test_what_only_the_donor_has_is_reported() -> None:
    donor = checkpoint(3) | {f"{VAE}decoder.extra": encoded([1.0], "F16")}
    made = lazy(checkpoint(1), checkpoint(2), vae=Memory(donor, "vae.safetensors"))
    assert made.plan.dropped == {f"{VAE}decoder.extra": "only in `vae.safetensors`"}


# --- dtypes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["weighted-sum", "slerp", "nearswap", "ties", "nuslerp-rows", "tensor-sum"])
@pytest.mark.parametrize(("first", "second"), [("F16", "F32"), ("BF16", "F16"), ("F32", "BF16"), ("F64", "F16")])
def test_models_of_two_dtypes(first: str, second: str, method: str) -> None:
    keys = (BIAS, f"{UNET}input_blocks.4.0.in_layers.2.weight")
    a, b = ({key: checkpoint(seed, dtype)[key] for key in keys} for seed, dtype in ((1, first), (2, second)))
    options = {"base": Memory(a)} if method == "ties" else {}
    models = (b,) if method == "ties" else (a, b)
    made = lazy(*models, method=method, **options)
    assert {spec.dtype for spec in made.specs.values()} == {second if method == "ties" else first}
    if method == "weighted-sum":
        assert all(same(tensor, midway(a[key], b[key])) for key, tensor in result(made).items())
    for name, dtype in (("fp32", "F32"), ("fp16", "F16"), ("bf16", "BF16")):
        out = result(lazy(*models, method=method, dtype=name, **options))
        assert {found for found, _ in out.values()} == {dtype}


def test_keep_goes_tensor_by_tensor_and_by_the_first_model() -> None:
    a = checkpoint(1) | {BIAS: encoded([1, 2, 3, 4], "F32")}
    b = checkpoint(2, "BF16")
    base = checkpoint(0, "F64")
    out = lazy(a, b, method="ties", base=Memory(base)).specs
    assert {key: spec.dtype for key, spec in out.items()} == {key: dtype for key, (dtype, _) in a.items()}


def test_defect_14_and_40_the_dtype_is_never_changed_unasked() -> None:
    for dtype in ("F32", "F16", "BF16"):
        made = lazy(checkpoint(1, dtype), checkpoint(2, dtype))
        assert {spec.dtype for spec in made.specs.values()} == {dtype, "I64"}


# --- fp8 and other quantised models ---------------------------------------------------------------------------------


def eight_bits(model: Model, key: str, scale: float | None, name: str = "scale_weight") -> Model:
    """A weight as fp8 e4m3 codes 0x30 + ..., values 0.5 to 1.875, and its scale."""
    codes = np.random.default_rng(4).integers(0x30, 0x40, size=np.shape(model[key][1])).astype(np.uint8)
    model = model | {key: ("F8_E4M3", codes)}
    if scale is not None:
        model[key.removesuffix("weight") + name] = encoded(scale, "F32")
        model[f"{UNET}scaled_fp8"] = ("F8_E4M3", np.zeros(2, np.uint8))
    return model


def fp8_values(codes: Any) -> Any:
    return (1 + (codes & 7) / 8.0) * 2.0 ** ((codes >> 3 & 15).astype(float) - 7)


@pytest.mark.parametrize(("scale", "name"), [(None, ""), (0.125, "scale_weight"), (0.3, "weight_scale")])
def test_fp8_is_multiplied_by_its_scale(scale: float | None, name: str) -> None:
    plain = checkpoint(2)
    packed = eight_bits(checkpoint(1), LARGE, scale, name)
    values = fp8_values(packed[LARGE][1]).astype("f4") * np.float32(1 if scale is None else scale)
    made = lazy(plain, packed)
    exact = (numbers(plain[LARGE]) + values.astype(float)) / 2
    assert same(result(made)[LARGE], encoded(exact, "F16"))
    assert made.specs.keys() == plain.keys()
    assert made.plan.warnings == []
    made = lazy(packed, plain)
    assert same(result(made)[LARGE], encoded(exact, "BF16"))
    assert made.specs.keys() == plain.keys()
    assert made.plan.warnings == ["`a.safetensors` holds 1 fp8 tensor, the result holds them as bf16"]
    copied = result(lazy(packed, plain, exclude=[LARGE]))
    assert same(copied[LARGE], encoded(values.astype(float), "BF16"))
    assert result(lazy(packed, plain, dtype="fp16"))[LARGE][0] == "F16"


@pytest.mark.parametrize(
    "extra",
    [
        {f"{UNET}x.weight": ("I8", np.zeros((2, 2), "i1")), f"{UNET}x.SCB": encoded([1, 1], "F32")},
        {
            f"{UNET}x.weight": ("U8", np.zeros((2, 1), "u1")),
            f"{UNET}x.weight.absmax": encoded([1.0], "F32"),
            f"{UNET}x.weight.quant_state.bitsandbytes__nf4": ("U8", np.zeros(3, "u1")),
        },
        {f"{UNET}x.qweight": ("I32", np.zeros((2, 2), "i4")), f"{UNET}x.wscales": encoded([1.0], "F16")},
    ],
)
def test_codes_are_refused(extra: Model) -> None:
    for models in ((checkpoint(1) | extra, checkpoint(2)), (checkpoint(1), checkpoint(2) | extra)):
        with pytest.raises(FormatError, match="quantised"):
            lazy(*models)


# --- include and exclude --------------------------------------------------------------------------------------------


def test_include_and_exclude() -> None:
    a, b = checkpoint(1), checkpoint(2)
    out = result(lazy(a, b, include=[f"{UNET}*", f"{VAE}*"], exclude=["*.bias", LARGE]))
    for key in a:
        merged = key.startswith((UNET, VAE)) and not key.endswith(".bias") and key != LARGE
        expected = midway(a[key], b[key]) if merged else a[key]
        assert same(out[key], expected), key


@pytest.mark.parametrize("option", ["include", "exclude"])
def test_a_pattern_that_matches_nothing_is_an_error(option: str) -> None:
    with pytest.raises(UsageError, match=rf"--{option} '\*attn7\*'` matches no tensor of `a.safetensors`"):
        lazy(checkpoint(1), checkpoint(2), **{option: [f"{UNET}*", "*attn7*"]})


def test_a_merge_of_nothing_is_remarked_upon() -> None:
    made = lazy(checkpoint(1), checkpoint(2), include=[IDS])
    assert made.plan.warnings == ["nothing is merged: the result is a copy of `a.safetensors`"]


def test_what_is_excluded_may_be_missing_or_misshapen() -> None:
    a, b = checkpoint(1), without(checkpoint(2), LARGE)
    b[BIAS] = encoded(np.zeros(7), "F16")
    out = result(lazy(a, b, exclude=[LARGE, BIAS]))
    assert same(out[LARGE], a[LARGE])
    assert same(out[BIAS], a[BIAS])
