"""Every known key list, every component alone, damaged, renamed and resized files, and files that are no models."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sdops.archs.detect import Detection, component_of, detect
from sdops.core.spec import DTYPE_BITS, Spec

from .lists import NAMES, load, part

TE_L, TE_H, TE_G, T5 = ("clip_l", 196), ("clip_h", 372), ("clip_g", 516), ("t5xxl", 219)
OPEN_H, OPEN_G = ("clip_h", 292), ("clip_g", 388)
VAE4, VAE16 = ("vae", 248), ("vae", 244)

# list -> family, layout, variants, (component, expected keys) ...
EXPECTED: dict[str, tuple[str, str, tuple[str, ...], set[tuple[str, int]]]] = {
    "sd15-ldm": ("sd1", "ldm", (), {("unet", 686), TE_L, VAE4}),
    "sd15-ldm-with-ema": ("sd1", "ldm", ("ema",), {("unet", 686), TE_L, VAE4}),
    "sd15-inpainting-ldm": ("sd1", "ldm", ("inpainting",), {("unet", 686), TE_L, VAE4}),
    "sd15-diffusers": ("sd1", "diffusers", (), {("unet", 686), TE_L, VAE4}),
    "sd21-ldm": ("sd2", "ldm", (), {("unet", 686), OPEN_H, VAE4}),
    "sd21-diffusers": ("sd2", "diffusers", (), {("unet", 686), TE_H, VAE4}),
    "sdxl-base-sgm": ("sdxl", "sgm", (), {("unet", 1680), TE_L, OPEN_G, VAE4}),
    "sdxl-base-diffusers": ("sdxl", "diffusers", (), {("unet", 1680), TE_L, TE_G, VAE4}),
    "sdxl-refiner-sgm": ("sdxl_refiner", "sgm", (), {("unet", 1220), OPEN_G, VAE4}),
    "sdxl-refiner-diffusers": ("sdxl_refiner", "diffusers", (), {("unet", 1220), TE_G, VAE4}),
    "sd3-medium-sai": ("sd3", "sai", ("medium",), {("transformer", 491), VAE16}),
    "sd3-medium-sai-incl-clips": ("sd3", "sai", ("medium",), {("transformer", 491), VAE16, TE_L, TE_G}),
    "sd3-medium-comfy-allinone": ("sd3", "sai", ("medium",), {("transformer", 491), VAE16, TE_L, TE_G, T5}),
    "sd3-medium-diffusers": ("sd3", "diffusers", ("medium",), {("transformer", 683), VAE16, TE_L, TE_G, T5}),
    "sd35-large-sai": ("sd3", "sai", ("3.5-large",), {("transformer", 923), VAE16}),
    "sd35-large-diffusers": ("sd3", "diffusers", ("3.5-large",), {("transformer", 1227), VAE16, TE_L, TE_G, T5}),
    "sd35-medium-sai": ("sd3", "sai", ("3.5-medium",), {("transformer", 665), VAE16}),
    "sd35-medium-diffusers": ("sd3", "diffusers", ("3.5-medium",), {("transformer", 909), VAE16, TE_L, TE_G, T5}),
    "flux1-dev-bfl-transformer": ("flux1", "bfl", ("dev",), {("transformer", 780)}),
    "flux1-schnell-bfl-transformer": ("flux1", "bfl", ("schnell",), {("transformer", 776)}),
    "flux1-fill-bfl-transformer": ("flux1", "bfl", ("dev", "fill"), {("transformer", 780)}),
    "flux1-dev-comfy-allinone": ("flux1", "bfl", ("dev",), {("transformer", 780), TE_L, T5, VAE16}),
    "flux1-dev-diffusers": ("flux1", "diffusers", ("dev",), {("transformer", 1160), TE_L, T5, VAE16}),
    "flux1-schnell-diffusers-transformer": ("flux1", "diffusers", ("schnell",), {("transformer", 1156)}),
    "flux-ae-ldm": ("vae", "ldm", (), {VAE16}),
    "chroma-bfl-transformer": ("chroma", "bfl", (), {("transformer", 643)}),
    "chroma-diffusers-transformer": ("chroma", "diffusers", (), {("transformer", 1023)}),
    "flux2-dev-bfl-transformer": ("flux2", "bfl", ("dev",), {("transformer", 299)}),
    "flux2-dev-diffusers-transformer": ("flux2", "diffusers", ("dev",), {("transformer", 331)}),
    "flux2-klein4b-bfl-transformer": ("flux2", "bfl", ("klein-4b",), {("transformer", 149)}),
    "flux2-klein4b-diffusers-transformer": ("flux2", "diffusers", ("klein-4b",), {("transformer", 169)}),
    "flux2-klein9b-bfl-transformer": ("flux2", "bfl", ("klein-9b",), {("transformer", 201)}),
    "flux2-klein9b-diffusers-transformer": ("flux2", "diffusers", ("klein-9b",), {("transformer", 233)}),
    "z-image-comfy-transformer": ("z_image", "comfy", (), {("transformer", 453)}),
    "z-image-diffusers-transformer": ("z_image", "diffusers", (), {("transformer", 521)}),
    "qwen-image-diffusers-transformer": ("qwen_image", "diffusers", (), {("transformer", 1933)}),
    "lumina2-diffusers-transformer": ("lumina2", "diffusers", (), {("transformer", 459)}),
    "wan21-t2v-1.3b-native-transformer": ("wan", "native", ("1.3b",), {("transformer", 825)}),
    "wan21-t2v-1.3b-diffusers-transformer": ("wan", "diffusers", ("1.3b",), {("transformer", 825)}),
    "wan21-t2v-14b-native-transformer": ("wan", "native", ("14b",), {("transformer", 1095)}),
    "wan21-t2v-14b-diffusers-transformer": ("wan", "diffusers", ("14b",), {("transformer", 1095)}),
    "controlnet-sd15-ldm": ("controlnet", "ldm", ("sd1",), {("controlnet", 340)}),
    "controlnet-sd15-diffusers": ("controlnet", "diffusers", ("sd1",), {("controlnet", 340)}),
    "controlnet-sdxl-diffusers": ("controlnet", "diffusers", ("sdxl",), {("controlnet", 844)}),
    "t2iadapter-sd15-diffusers": ("t2i_adapter", "diffusers", ("sd1",), {("t2i_adapter", 38)}),
    "clip_l-hf": ("text_encoder", "hf", (), {TE_L}),
    "clip_g-hf": ("text_encoder", "hf", (), {TE_G}),
    "t5xxl-hf": ("text_encoder", "hf", (), {T5}),
}


def names(found: Detection) -> set[tuple[str, int | None]]:
    return {(component.name, component.expected) for component in found.components}


def zeros(*keys: str, shape: tuple[int, ...] = (4, 4), dtype: str = "F16") -> dict[str, Spec]:
    return dict.fromkeys(keys, Spec(dtype, shape))


def test_every_list_is_expected() -> None:
    assert sorted(EXPECTED) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_known_list(name: str) -> None:
    family, layout, variants, components = EXPECTED[name]
    specs = load(name)
    found = detect(specs)
    assert (found.family, found.layout, found.variants) == (family, layout, variants)
    assert names(found) == components
    assert all(part.complete and not part.extra and part.evidence for part in found.components)
    assert not found.unclaimed
    claimed = [key for component in found.components for key in component.keys]
    assert sorted(claimed + [key for keys in found.junk.values() for key in keys]) == sorted(specs)
    assert sum(part.nbytes for part in found.components) == sum(specs[key].nbytes for key in claimed)


def test_equal_names_are_looked_at_once_and_changed_ones_again() -> None:
    specs = load("sd15-ldm")
    found = detect(specs)
    assert detect(dict(specs)) is found
    gone = next(iter(found.components[0].keys))
    spec = specs.pop(gone)  # the mapping that was asked about
    assert gone in detect(specs).components[0].missing
    specs[gone] = spec  # the same tensors in another order
    assert detect(specs).components[0].keys[-1] == gone


def test_the_junk_of_a_training_checkpoint() -> None:
    found = detect(load("sd15-ldm-with-ema"))
    assert {kind: len(keys) for kind, keys in found.junk.items()} == {"ema": 688, "schedule": 12}
    assert found.needs_values["zero_terminal_snr"] == "alphas_cumprod"
    assert component_of(found, "model_ema.decay") == "ema"
    assert component_of(found, "betas") == "schedule"


def test_the_junk_of_an_all_in_one_file() -> None:
    found = detect(load("sd3-medium-comfy-allinone"))
    assert found.junk["schedule"] == ("model.model_sampling.sigmas",)
    assert len(found.junk["logit_scale"]) == 3
    assert component_of(found, "text_encoders.t5xxl.transformer.shared.weight") == "t5xxl"


def test_openclip_keeps_its_logit_scale() -> None:
    found = detect(load("sd21-ldm"))
    assert not found.junk
    assert component_of(found, "cond_stage_model.model.logit_scale") == "clip_h"


# --------------------------------------------------------------------------------------------- components by themselves

UNET = "model.diffusion_model."
ALONE = [
    ("sd15-ldm", UNET, "sd1"),
    ("sd21-ldm", UNET, "sd2"),
    ("sdxl-base-sgm", UNET, "sdxl"),
    ("sdxl-refiner-sgm", UNET, "sdxl_refiner"),
    ("sd3-medium-sai", UNET, "sd3"),
    ("sd15-diffusers", "unet/", "sd1"),
    ("sd21-diffusers", "unet/", "sd2"),
    ("sdxl-base-diffusers", "unet/", "sdxl"),
    ("sdxl-refiner-diffusers", "unet/", "sdxl_refiner"),
    ("sd35-large-diffusers", "transformer/", "sd3"),
    ("flux1-dev-diffusers", "transformer/", "flux1"),
    ("sd15-ldm", "first_stage_model.", "vae"),
    ("sd15-diffusers", "vae/", "vae"),
    ("flux1-dev-diffusers", "vae/", "vae"),
    ("sd15-ldm", "cond_stage_model.transformer.", "text_encoder"),
    ("sd21-ldm", "cond_stage_model.model.", "text_encoder"),
    ("sdxl-base-sgm", "conditioner.embedders.1.model.", "text_encoder"),
    ("sdxl-base-sgm", "conditioner.embedders.0.transformer.", "text_encoder"),
    ("sd21-diffusers", "text_encoder/", "text_encoder"),
    ("sdxl-base-diffusers", "text_encoder_2/", "text_encoder"),
    ("flux1-dev-diffusers", "text_encoder_2/", "text_encoder"),
    ("controlnet-sd15-ldm", "control_model.", "controlnet"),
]


@pytest.mark.parametrize(("name", "prefix", "family"), ALONE)
@pytest.mark.parametrize("keep_prefix", [True, False])
def test_component_alone(name: str, prefix: str, family: str, keep_prefix: bool) -> None:
    specs = part(name, prefix, prefix if keep_prefix else "")
    found = detect(specs)
    assert found.family == family
    assert len(found.components) == 1
    assert found.components[0].complete
    assert len(found.components[0].keys) == len(specs)
    assert not found.unclaimed


@pytest.mark.parametrize("prefix", ["diffusion_model.", "model.", "model.model."])
def test_other_prefixes_of_a_unet(prefix: str) -> None:
    found = detect(part("sdxl-base-sgm", UNET, prefix))
    assert (found.family, found.components[0].prefix) == ("sdxl", prefix)


def test_clip_without_text_model() -> None:
    """NovelAI's spelling, and what recent transformers save."""
    prefix = "cond_stage_model.transformer.text_model."
    rest = {key: spec for key, spec in load("sd15-ldm").items() if not key.startswith(prefix)}
    found = detect(rest | part("sd15-ldm", prefix, "cond_stage_model.transformer."))
    clip = found.component("clip_l")
    assert clip is not None
    assert (found.family, clip.layout, clip.complete, clip.extra) == ("sd1", "hf-flat", True, ())
    assert found.position_ids == ("cond_stage_model.transformer.embeddings.position_ids",)
    assert not found.unclaimed


def test_sd2_in_the_layout_of_sdxl() -> None:
    """SD-Turbo: the prefix of the refiner's text encoder, told apart by width."""
    text = part("sd21-ldm", "cond_stage_model.model.", "conditioner.embedders.0.model.")
    found = detect(part("sd21-ldm", UNET, UNET) | text)
    assert found.family == "sd2"
    assert names(found) == {("unet", 686), OPEN_H}


def test_sd2_text_encoder_without_its_last_layer() -> None:
    specs = {k: s for k, s in load("sd21-ldm").items() if ".resblocks.23." not in k and not k.endswith("logit_scale")}
    clip = detect(specs).component("clip_h")
    assert clip is not None
    assert (clip.variants, clip.complete) == (("23-layers",), True)


# ------------------------------------------------------------------------------------------------------------- variants


def with_conv_in(name: str, key: str, channels: int) -> dict[str, Spec]:
    specs = load(name)
    out, _, height, width = specs[key].shape
    return specs | {key: Spec(specs[key].dtype, (out, channels, height, width))}


@pytest.mark.parametrize(
    ("name", "channels", "variant"),
    [
        ("sd15-ldm", 8, "edit"),
        ("sd15-ldm", 9, "inpainting"),
        ("sd21-ldm", 5, "depth"),
        ("sdxl-base-sgm", 9, "inpainting"),
    ],
)
def test_input_channels(name: str, channels: int, variant: str) -> None:
    found = detect(with_conv_in(name, f"{UNET}input_blocks.0.0.weight", channels))
    assert (found.family, found.variants) == (EXPECTED[name][0], (variant,))
    diffusers = {"sd15-ldm": "sd15", "sd21-ldm": "sd21", "sdxl-base-sgm": "sdxl-base"}[name] + "-diffusers"
    assert detect(with_conv_in(diffusers, "unet/conv_in.weight", channels)).variants == (variant,)


@pytest.mark.parametrize(
    ("markers", "variants"),
    [
        (["v_pred"], ("v-prediction",)),
        (["v_pred", "ztsnr"], ("v-prediction", "zero-terminal-snr")),
        (["edm_vpred.sigma_max", "edm_vpred.sigma_min"], ("cosxl",)),
        (["edm_mean", "edm_std"], ("playground-2.5",)),
    ],
)
def test_markers_of_sdxl_are_kept(markers: list[str], variants: tuple[str, ...]) -> None:
    found = detect(load("sdxl-base-sgm") | zeros(*markers, shape=(0,)))
    assert found.variants == variants
    assert found.markers == tuple(markers)
    assert not found.junk
    assert not found.unclaimed
    assert component_of(found, markers[0]) == "marker"


def is_layer(key: str, block: str, layers: range) -> bool:
    return any(f"{block}.transformer_blocks.{layer}." in key for layer in layers)


def test_distilled_sdxl() -> None:
    """SSD-1B: no second half of the middle block, fewer transformer layers."""
    shorter = {
        **{f"input_blocks.{block}.1": range(4, 10) for block in (7, 8)},
        **{f"output_blocks.{block}.1": range(4, 10) for block in (0, 1)},
        **{f"output_blocks.{block}.1": range(1, 2) for block in (4, 5)},
    }
    gone = ("middle_block.1.", "middle_block.2.")
    specs = {
        key: spec
        for key, spec in load("sdxl-base-sgm").items()
        if not any(is_layer(key, *cut) for cut in shorter.items()) and not any(part in key for part in gone)
    }
    found = detect(specs)
    assert found.variants == ("ssd-1b",)
    assert found.main is not None
    assert found.main.complete
    assert not found.main.extra


def test_flux_with_norms_called_weight() -> None:
    specs = {key.replace("norm.scale", "norm.weight"): spec for key, spec in load("flux1-dev-bfl-transformer").items()}
    found = detect(specs)
    assert found.variants == ("dev", "norms-as-weight")
    assert found.main is not None
    assert found.main.complete
    assert not found.main.extra


def test_sd2_tells_where_its_prediction_type_can_be_read() -> None:
    key = f"{UNET}output_blocks.11.1.transformer_blocks.0.norm1.bias"
    assert detect(load("sd21-ldm")).needs_values == {"prediction": key}
    assert detect(load("sd21-diffusers")).needs_values["prediction"].startswith("unet/up_blocks.3.attentions.2.")
    assert "prediction" not in detect(load("sd15-ldm")).needs_values


# ------------------------------------------------------------------------------------------------------------ quantised


def as_dtype(name: str, dtype: str) -> dict[str, Spec]:
    """All matrices of a transformer in another dtype."""
    return {key: Spec(dtype, spec.shape) if len(spec.shape) == 2 else spec for key, spec in load(name).items()}


def test_plain_fp8() -> None:
    found = detect(as_dtype("flux1-dev-bfl-transformer", "F8_E4M3"))
    assert found.variants == ("dev", "fp8")
    assert found.quantised["img_in.weight"].scale is None


def test_scaled_fp8() -> None:
    specs = as_dtype("flux1-dev-bfl-transformer", "F8_E4M3")
    stems = [key.removesuffix(".weight") for key, spec in specs.items() if spec.dtype == "F8_E4M3"]
    scales = zeros(*[f"{stem}.scale_weight" for stem in stems], shape=(), dtype="F32")
    found = detect(specs | scales | zeros("scaled_fp8", shape=(0,)))
    assert found.variants == ("dev", "fp8-scaled")
    assert found.quantised["img_in.weight"].scale == "img_in.scale_weight"
    assert found.markers == ("scaled_fp8",)
    assert found.main is not None
    assert found.main.complete
    assert not found.main.extra
    assert not found.unclaimed


def test_nf4() -> None:
    specs: dict[str, Spec] = {}
    for key, spec in load("flux1-dev-comfy-allinone").items():
        if key.startswith(UNET) and len(spec.shape) == 2:
            specs[key] = Spec("U8", (spec.numel // 2, 1))
            sides = (".absmax", ".quant_map", ".quant_state.bitsandbytes__nf4")
            specs |= zeros(*[key + side for side in sides], shape=(16,), dtype="U8")
        else:
            specs[key] = spec
    found = detect(specs)
    assert (found.family, found.variants) == ("flux1", ("dev", "nf4"))
    assert found.main is not None
    assert found.main.complete
    assert not found.main.extra
    assert component_of(found, f"{UNET}img_in.weight.absmax") == "transformer"


# -------------------------------------------------------------------------------------------------- damaged and resized


@settings(max_examples=50, deadline=None)
@given(data=st.data())
def test_removing_keys_is_counted(data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(NAMES))
    specs = load(name)
    keys = sorted(specs)
    removed = set(data.draw(st.lists(st.sampled_from(keys), max_size=len(keys) // 20, unique=True)))
    whole = detect(specs)
    found = detect({key: spec for key, spec in specs.items() if key not in removed})
    assert found.family == whole.family
    for component in found.components:
        before = whole.component(component.name)
        if before is None or (before.title, before.variants) != (component.title, component.variants):
            continue
        assert component.expected == before.expected
        gone = removed & set(before.keys)
        optional = len(before.keys) - (before.expected or 0)
        assert set(component.missing) <= gone
        assert len(gone) - len(component.missing) <= optional
        assert component.found == (before.expected or 0) - len(component.missing)
        assert len(component.keys) == len(before.keys) - len(gone)


@pytest.mark.parametrize("name", NAMES)
def test_an_eighth_of_the_keys_is_lost(name: str) -> None:
    specs = load(name)
    kept = dict(random.Random(7).sample(sorted(specs.items()), len(specs) * 7 // 8))
    whole, found = detect(specs), detect(kept)
    assert found.family == whole.family
    assert names(found) == names(whole)
    assert {key for part in found.components for key in part.missing} <= set(specs) - set(kept)
    assert not found.unclaimed


@pytest.mark.parametrize("name", ["sd15-ldm", "sd21-ldm", "sdxl-base-sgm", "sd15-diffusers", "sd21-diffusers"])
def test_a_key_that_recognition_leans_on_is_missing(name: str) -> None:
    specs = load(name)
    key = next(key for key in specs if key.endswith(("input_blocks.0.0.weight", "unet/conv_in.weight")))
    del specs[key]
    found = detect(specs)
    assert found.family == EXPECTED[name][0]
    assert found.main is not None
    assert found.main.missing == (key,)
    assert any("is missing" in line for line in found.main.evidence)


def shrunk(name: str) -> dict[str, Spec]:
    """The same names and kernel sizes, all widths of 32 and more divided by 8."""
    return {
        key: Spec(spec.dtype, tuple(max(8, size // 8) if size >= 32 else size for size in spec.shape))
        for key, spec in load(name).items()
    }


@pytest.mark.parametrize("name", NAMES)
def test_a_shrunk_model_is_recognised_by_its_names(name: str) -> None:
    found = detect(shrunk(name))
    family, layout, variants, components = EXPECTED[name]
    by_width_alone = {"flux1-fill-bfl-transformer": ("dev",), "t2iadapter-sd15-diffusers": ()}
    told_by_width = {"sd1", "sd2", "sdxl", "1.3b"}
    assert (found.family, found.layout) == (family, layout)
    expected = set(by_width_alone.get(name, variants)) - told_by_width
    assert set(found.variants) - {"unusual-widths"} == expected
    assert {component.name for component in found.components} == {component for component, _ in components}
    assert all(component.complete for component in found.components)


@pytest.mark.parametrize("name", ["sd15-ldm", "sd21-ldm", "sdxl-base-sgm", "sdxl-refiner-sgm"])
def test_a_shrunk_u_net_alone_is_no_controlnet(name: str) -> None:
    prefix = "model.diffusion_model."
    specs = {key.removeprefix(prefix): spec for key, spec in shrunk(name).items() if key.startswith(prefix)}
    assert [component.name for component in detect(specs).components] == ["unet"]


@pytest.mark.parametrize("name", ["sd15-diffusers", "sd21-diffusers", "sdxl-base-diffusers"])
def test_a_shrunk_u_net_of_diffusers_is_no_controlnet(name: str) -> None:
    specs = {key.removeprefix("unet/"): spec for key, spec in shrunk(name).items() if key.startswith("unet/")}
    assert [component.name for component in detect(specs).components] == ["unet"]


# ------------------------------------------------------------------------------------------ not whole models, no models


@pytest.mark.parametrize(
    "path", sorted(Path(__file__).parents[3].glob("shared/data/lora_keys/*.json")), ids=lambda p: p.stem
)
def test_adapters(path: Path) -> None:
    specs = {key: Spec("F16", tuple(shape)) for key, shape in json.loads(path.read_text()).items()}
    found = detect(specs)
    assert (found.family, found.unclaimed) == ("adapter", ())
    assert len(found.components[0].keys) == len(specs)


@pytest.mark.parametrize(
    "end",
    [
        "lora_down.weight",
        "lora_B.weight",
        "hada_w1_a",
        "lokr_w1",
        "oft_blocks",
        "lora.up.weight",
        "lora_linear_layer.up.weight",
    ],
)
def test_one_adapter_tensor_is_enough(end: str) -> None:
    assert detect(zeros(f"lora_unet_down_blocks_0.{end}", "lora_unet_down_blocks_0.alpha")).family == "adapter"


def test_a_model_with_stray_adapter_keys_is_a_model() -> None:
    found = detect(load("sd15-ldm") | zeros("lora_unet_x.lora_up.weight", "lora_unet_x.alpha"))
    assert found.family == "sd1"
    assert component_of(found, "lora_unet_x.alpha") == "adapter"


@pytest.mark.parametrize(
    ("specs", "family"),
    [
        (zeros("emb_params", shape=(8, 768)), "embedding"),
        (zeros("<cat>", shape=(1024,)), "embedding"),
        (zeros("clip_l", shape=(4, 768)) | zeros("clip_g", shape=(4, 1280)), "embedding"),
        (zeros("768.0.linear.0.weight", "768.1.linear.0.weight", shape=(768, 768)), "hypernetwork"),
        (zeros("conv_first.weight", "body.0.rdb1.conv1.weight"), "upscaler"),
        (zeros("model.0.weight", "model.1.sub.0.RDB1.conv1.0.weight"), "upscaler"),
        (zeros("image_proj.proj.weight", "ip_adapter.1.to_k_ip.weight"), "ip_adapter"),
        (zeros("down_blocks.0.motion_modules.0.temporal_transformer.norm.weight"), "motion_module"),
        (zeros("model.diffusion_model.double_layers.0.attn.w1q.weight"), "auraflow"),
        (zeros("txt_in.individual_token_refiner.blocks.0.norm1.weight", "img_in.proj.weight"), "hunyuan_video"),
        (zeros("net.blocks.0.mlp.layer1.weight", "net.x_embedder.proj.1.weight"), "cosmos"),
        (zeros("lora_controlnet", "input_hint_block.0.weight"), "controlnet"),
        (zeros("model.layers.0.self_attn.k_proj.bias", shape=(512,)), "text_encoder"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_other_files(specs: dict[str, Spec], family: str) -> None:
    assert detect(specs).family == family


def test_nothing() -> None:
    found = detect({})
    assert (found.family, found.components, found.main) == ("unknown", (), None)


def test_foreign_keys_beside_a_model_are_reported() -> None:
    found = detect(load("sd15-ldm") | zeros("something.else") | zeros(f"{UNET}new_thing.weight"))
    assert found.unclaimed == ("something.else",)
    assert found.main is not None
    assert found.main.extra == (f"{UNET}new_thing.weight",)
    assert component_of(found, "something.else") == "other"
    assert component_of(found, "not in the file") == "other"


@settings(max_examples=100, deadline=None)
@given(
    st.dictionaries(
        st.text(alphabet="abcdefgh._0123", min_size=1, max_size=30),
        st.builds(Spec, st.sampled_from(sorted(DTYPE_BITS)), st.lists(st.integers(0, 9), max_size=4).map(tuple)),
        max_size=40,
    )
)
def test_any_keys_get_an_answer(specs: dict[str, Spec]) -> None:
    found = detect(specs)
    told = {key for component in found.components for key in component.keys}
    told |= {*found.unclaimed, *found.markers, *(key for keys in found.junk.values() for key in keys)}
    assert told == set(specs)


def test_unrelated_models_are_unknown() -> None:
    specs = zeros(*[f"bert.encoder.layer.{layer}.attention.self.query.weight" for layer in range(40)])
    found = detect(specs)
    assert found.family == "unknown"
    assert found.unclaimed == tuple(specs)


def test_a_hundred_thousand_keys_are_no_trouble() -> None:
    specs = zeros(*[f"a.b.{number}.weight" for number in range(100_000)])
    assert len(detect(specs).unclaimed) == 100_000


@pytest.mark.parametrize(
    ("name", "word"),
    [
        ("sd15-ldm", "stable-diffusion-v1"),
        ("sd15-inpainting-ldm", "stable-diffusion-v1-inpainting"),
        ("sd21-ldm", ""),  # 512 epsilon and 768 v have the same shapes
        ("sdxl-base-sgm", "stable-diffusion-xl-v1-base"),
        ("sdxl-refiner-sgm", "stable-diffusion-xl-v1-refiner"),
        ("sd35-large-sai", "stable-diffusion-3-5-large"),
        ("flux1-dev-bfl-transformer", "flux-1-dev"),
        ("flux1-schnell-bfl-transformer", "flux-1-schnell"),
        ("qwen-image-diffusers-transformer", ""),
    ],
)
def test_the_architecture_in_the_words_of_modelspec(name: str, word: str) -> None:
    assert detect(load(name)).modelspec == word
