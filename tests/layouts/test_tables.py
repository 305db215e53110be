"""Every table of the shelf, on the key lists of real models in both spellings."""

from __future__ import annotations

import gzip
import json
import time
from functools import cache
from hashlib import sha256
from typing import Any

import numpy as np
import pytest

from sdops.archs.tables import tables as archs
from sdops.errors import MismatchError
from sdops.layouts.equations import parse
from sdops.layouts.tables import Part, aliases, layouts, made_of, modules, tables
from tests.archs.lists import KEYS, part

# family, component, and for each spelling key list:prefix:layout
TWINS = """
sd1 unet sd15-ldm:model.diffusion_model.:ldm sd15-diffusers:unet/:diffusers
sd2 unet sd21-ldm:model.diffusion_model.:ldm sd21-diffusers:unet/:diffusers
sdxl unet sdxl-base-sgm:model.diffusion_model.:sgm sdxl-base-diffusers:unet/:diffusers
sdxl_refiner unet sdxl-refiner-sgm:model.diffusion_model.:sgm sdxl-refiner-diffusers:unet/:diffusers
controlnet controlnet controlnet-sd15-ldm:control_model.:ldm controlnet-sd15-diffusers::diffusers
vae vae sd15-ldm:first_stage_model.:ldm sd15-diffusers:vae/:diffusers
sd2 vae sd21-ldm:first_stage_model.:ldm sd21-diffusers:vae/:diffusers
sdxl vae sdxl-base-sgm:first_stage_model.:ldm sdxl-base-diffusers:vae/:diffusers
sd3 vae sd3-medium-sai:first_stage_model.:ldm sd3-medium-diffusers:vae/:diffusers
flux1 vae flux-ae-ldm::ldm flux1-dev-diffusers:vae/:diffusers
sdxl clip_g sdxl-base-sgm:conditioner.embedders.1.model.:openclip sdxl-base-diffusers:text_encoder_2/:hf
sdxl_refiner clip_g sdxl-refiner-sgm:conditioner.embedders.0.model.:openclip sdxl-refiner-diffusers:text_encoder_2/:hf
sd2 clip_h sd21-ldm:cond_stage_model.model.:openclip sd21-diffusers:text_encoder/:hf
sd3 transformer sd3-medium-sai:model.diffusion_model.:sai sd3-medium-diffusers:transformer/:diffusers
sd3 transformer sd35-medium-sai:model.diffusion_model.:sai sd35-medium-diffusers:transformer/:diffusers
sd3 transformer sd35-large-sai:model.diffusion_model.:sai sd35-large-diffusers:transformer/:diffusers
flux1 transformer flux1-dev-bfl-transformer::bfl flux1-dev-diffusers:transformer/:diffusers
flux1 transformer flux1-schnell-bfl-transformer::bfl flux1-schnell-diffusers-transformer::diffusers
chroma transformer chroma-bfl-transformer::bfl chroma-diffusers-transformer::diffusers
flux2 transformer flux2-dev-bfl-transformer::bfl flux2-dev-diffusers-transformer::diffusers
flux2 transformer flux2-klein4b-bfl-transformer::bfl flux2-klein4b-diffusers-transformer::diffusers
flux2 transformer flux2-klein9b-bfl-transformer::bfl flux2-klein9b-diffusers-transformer::diffusers
z_image transformer z-image-comfy-transformer::comfy z-image-diffusers-transformer::diffusers
wan transformer wan21-t2v-1.3b-native-transformer::native wan21-t2v-1.3b-diffusers-transformer::diffusers
wan transformer wan21-t2v-14b-native-transformer::native wan21-t2v-14b-diffusers-transformer::diffusers
"""
PAIRS = [
    (family, component, tuple(left.split(":")), tuple(right.split(":")))
    for family, component, left, right in map(str.split, TWINS.strip().splitlines())
]
# What the other spelling has no place for. In SD2 the last layer is not used, and Hugging Face's file leaves it out.
NO_PLACE = {"logit_scale"}
UNUSED_IN_SD2 = ("transformer.resblocks.23.", "text_projection")
MAPS = {
    "flux1-dev": ("flux1", "transformer", "flux1-dev-bfl-transformer", "", "bfl"),
    "sd15-unet": ("sd1", "unet", "sd15-ldm", "model.diffusion_model.", "ldm"),
    "sd21-unet": ("sd2", "unet", "sd21-ldm", "model.diffusion_model.", "ldm"),
    "sd3-medium": ("sd3", "transformer", "sd3-medium-sai", "model.diffusion_model.", "sai"),
    "sdxl-base-unet": ("sdxl", "unet", "sdxl-base-sgm", "model.diffusion_model.", "sgm"),
    "sdxl-clipg": ("sdxl", "clip_g", "sdxl-base-sgm", "conditioner.embedders.1.model.", "openclip"),
    "vae4": ("vae", "vae", "sd15-ldm", "first_stage_model.", "ldm"),
}

# component and key list -> the first digits of the SHA-256 of what is made of it
MADE = {
    ("unet", "sd15-ldm"): "f3fd1c9a7a757d6c",
    ("unet", "sd21-ldm"): "f3fd1c9a7a757d6c",
    ("unet", "sdxl-base-sgm"): "b2aa4941d279dc4e",
    ("unet", "sdxl-refiner-sgm"): "33d62a769bd32a3b",
    ("controlnet", "controlnet-sd15-ldm"): "0463467d70f1b9df",
    ("vae", "sd15-ldm"): "649cce568ec2e9fd",
    ("vae", "sd21-ldm"): "649cce568ec2e9fd",
    ("vae", "sdxl-base-sgm"): "649cce568ec2e9fd",
    ("vae", "sd3-medium-sai"): "7b7ce233b47dc558",
    ("vae", "flux-ae-ldm"): "7b7ce233b47dc558",
    ("clip_g", "sdxl-base-sgm"): "82e8f5e2cfdb7d0a",
    ("clip_g", "sdxl-refiner-sgm"): "82e8f5e2cfdb7d0a",
    ("clip_h", "sd21-ldm"): "957974cc7b456688",
    ("transformer", "sd3-medium-sai"): "0afd89c9f1aa262d",
    ("transformer", "sd35-medium-sai"): "f4e0e0ac10969d87",
    ("transformer", "sd35-large-sai"): "d6df6f5259716180",
    ("transformer", "flux1-dev-bfl-transformer"): "882a77f6899662ed",
    ("transformer", "flux1-schnell-bfl-transformer"): "f3183177fb2121db",
    ("transformer", "chroma-bfl-transformer"): "fc80d4f473c204e6",
    ("transformer", "flux2-dev-bfl-transformer"): "84e55f21bd5c974f",
    ("transformer", "flux2-klein4b-bfl-transformer"): "d2ded9310a68f81a",
    ("transformer", "flux2-klein9b-bfl-transformer"): "5effdc9579535785",
    ("transformer", "z-image-comfy-transformer"): "71aa5ef5ac752c23",
    ("transformer", "wan21-t2v-1.3b-native-transformer"): "174420fd955a80e1",
    ("transformer", "wan21-t2v-14b-native-transformer"): "44e681f3dafb6207",
}

Shapes = dict[str, tuple[int, ...]]
both_spellings = pytest.mark.parametrize(
    ("family", "component", "left", "right"), PAIRS, ids=[f"{pair[1]}-{pair[2][0]}" for pair in PAIRS]
)


@cache
def shapes(name: str, prefix: str) -> Shapes:
    found = {key: spec.shape for key, spec in part(name, prefix).items()}
    if (name, prefix) == ("sd21-ldm", "cond_stage_model.model."):
        return {key: shape for key, shape in found.items() if not key.startswith(UNUSED_IN_SD2)}
    return found


def rows_of(share: tuple[int, int, int] | None, rows: int) -> tuple[int, int]:
    if share is None:
        return 0, rows
    start, stop, total = share
    assert rows % total == 0
    return rows // total * start, rows // total * stop


def shape_of(parts: tuple[Part, ...], known: Shapes) -> tuple[int, ...]:
    """The shape that parts make."""
    made = []
    for piece in parts:
        start, stop = rows_of(piece.share, known[piece.key][0])
        shape = (stop - start, *known[piece.key][1:])
        match piece.operation:
            case "transpose":
                shape = shape[::-1]
            case "linear":
                assert shape[2:] == (1, 1)
                shape = shape[:2]
            case "conv":
                shape = (*shape, 1, 1)
        made.append(shape)
    assert len({shape[1:] for shape in made}) == 1
    return (sum(shape[0] for shape in made), *made[0][1:])


def taken(array: np.ndarray[Any, Any], piece: Part) -> np.ndarray[Any, Any]:
    """What a part says, done with numpy."""
    start, stop = rows_of(piece.share, len(array))
    array = array[start:stop]
    match piece.operation:
        case "":
            return array
        case "swap":
            return np.concatenate([array[len(array) // 2 :], array[: len(array) // 2]])
        case "transpose":
            return array.T
        case "linear":
            return array.reshape(array.shape[:2])
        case "conv":
            return array.reshape(*array.shape, 1, 1)
    raise AssertionError(piece)


def convert(arrays: dict[str, Any], pair: tuple[str, str], source: str, target: str) -> dict[str, Any]:
    made = made_of(*pair, source, target, arrays)
    return {
        key: np.concatenate([taken(arrays[p.key], p) for p in parts])
        if len(parts) > 1
        else taken(arrays[parts[0].key], parts[0])
        for key, parts in made.items()
    }


def numbered(wanted: Shapes) -> dict[str, Any]:
    """Arrays with rows in the true proportions and few columns, in which no number comes twice."""
    arrays, start = {}, 0
    for key, shape in wanted.items():
        rows = shape[0] // 64 if shape[0] % 128 == 0 else shape[0]
        small = (rows, *(min(size, 2) for size in shape[1:]))
        count = int(np.prod(small))
        arrays[key] = np.arange(start, start + count).reshape(small)
        start += count
    return arrays


@both_spellings
def test_keys_and_shapes_are_those_of_the_other_spelling(
    family: str, component: str, left: tuple[str, str, str], right: tuple[str, str, str]
) -> None:
    for (name, prefix, source), (other, other_prefix, target) in ((left, right), (right, left)):
        keys = {key: shape for key, shape in shapes(name, prefix).items() if key not in NO_PLACE}
        wanted = {key: shape for key, shape in shapes(other, other_prefix).items() if key not in NO_PLACE}
        made = made_of(family, component, source, target, keys)
        assert {key: shape_of(parts, keys) for key, parts in made.items()} == wanted


@both_spellings
def test_there_and_back_gives_every_bit(
    family: str, component: str, left: tuple[str, str, str], right: tuple[str, str, str]
) -> None:
    for (name, prefix, source), (_, _, target) in ((left, right), (right, left)):
        arrays = numbered({key: shape for key, shape in shapes(name, prefix).items() if key not in NO_PLACE})
        there = convert(arrays, (family, component), source, target)
        back = convert(there, (family, component), target, source)
        assert back.keys() == arrays.keys()
        assert all(np.array_equal(back[key], arrays[key]) for key in arrays)


@pytest.mark.parametrize("name", MAPS)
def test_rows_agree_with_the_published_converters(name: str) -> None:
    family, component, keys, prefix, layout = MAPS[name]
    wanted = json.loads(gzip.decompress((KEYS / f"map-{name}.json.gz").read_bytes()))
    known = shapes(keys, prefix)

    def rows(piece: Part) -> list[list[Any]]:
        if piece.operation == "transpose":
            return [[f"{piece.key}^T"]]
        start, stop = rows_of(piece.share, known[piece.key][0])
        key, half = prefix + piece.key, (start + stop) // 2
        return [[key, half, stop], [key, start, half]] if piece.operation == "swap" else [[key, start, stop]]

    target = "hf" if component == "clip_g" else "diffusers"
    made = made_of(family, component, layout, target, known)
    found = {key: [row for piece in parts for row in rows(piece)] for key, parts in made.items()}
    strip = "" if any(row[0].startswith(prefix) for parts in wanted.values() for row in parts) else prefix
    assert found == {
        key: [[strip + row[0], *row[1:]] if len(row) > 1 else row for row in parts] for key, parts in wanted.items()
    }


@both_spellings
def test_nothing_has_moved(
    family: str, component: str, left: tuple[str, str, str], right: tuple[str, str, str]
) -> None:
    """The rows were once compared with those that diffusers 0.42.1's own converters make of numbered tensors."""
    made = made_of(family, component, left[2], right[2], shapes(*left[:2]))
    text = json.dumps(sorted(made.items()))
    assert sha256(text.encode()).hexdigest()[:16] == MADE[component, left[0]]


def test_what_no_rule_knows_is_left_to_the_caller() -> None:
    keys = {"conv_in.weight": 0, "conv_in.weight_scale": 0, "motion.weight": 0, "down_blocks.7.resnets.0.norm1.bias": 0}
    assert made_of("sd1", "unet", "diffusers", "ldm", keys) == {"input_blocks.0.0.weight": (Part("conv_in.weight"),)}
    assert made_of("sdxl", "clip_g", "openclip", "hf", ["logit_scale"]) == {}


def test_a_fused_tensor_needs_all_its_parts() -> None:
    names = [f"transformer_blocks.0.attn.to_{name}.weight" for name in "qk"]
    assert made_of("flux1", "transformer", "diffusers", "bfl", names) == {}
    names.append("transformer_blocks.0.attn.to_v.weight")
    made = made_of("flux1", "transformer", "diffusers", "bfl", names)
    assert made == {"double_blocks.0.img_attn.qkv.weight": tuple(map(Part, names))}


def test_the_first_linear_layer_of_a_single_block_has_seven_shares() -> None:
    made = made_of("flux1", "transformer", "bfl", "diffusers", ["single_blocks.37.linear1.bias"])
    block = "single_transformer_blocks.37"
    ends = {"attn.to_q": (0, 1, 7), "attn.to_k": (1, 2, 7), "attn.to_v": (2, 3, 7), "proj_mlp": (3, 7, 7)}
    key = "single_blocks.37.linear1.bias"
    assert made == {f"{block}.{end}.bias": (Part(key, share),) for end, share in ends.items()}


@pytest.mark.parametrize(("file", "last"), [("sd3-medium-sai", 23), ("sd35-medium-sai", 23), ("sd35-large-sai", 37)])
def test_only_the_last_modulations_of_sd3_are_swapped(file: str, last: int) -> None:
    made = made_of("sd3", "transformer", "sai", "diffusers", shapes(file, "model.diffusion_model."))
    swapped = {key.rpartition(".")[0] for key, (piece, *_) in made.items() if piece.operation == "swap"}
    assert swapped == {"norm_out.linear", f"transformer_blocks.{last}.norm1_context.linear"}


def test_old_names_are_read_but_not_written() -> None:
    key, old = "decoder.mid.attn_1.q.weight", "decoder.mid_block.attentions.0.query.weight"
    new = "decoder.mid_block.attentions.0.to_q.weight"
    assert made_of("vae", "vae", "diffusers", "ldm", [old]) == {key: (Part(old, None, "conv"),)}
    assert made_of("vae", "vae", "ldm", "diffusers", [key]) == {new: (Part(key, None, "linear"),)}
    comfy = "double_blocks.0.img_attn.norm.key_norm.weight"
    read = made_of("flux1", "transformer", "bfl", "diffusers", [comfy])
    assert read == {"transformer_blocks.0.attn.norm_k.weight": (Part(comfy),)}
    assert [*made_of("flux1", "transformer", "diffusers", "bfl", read)] == [
        "double_blocks.0.img_attn.norm.key_norm.scale"
    ]


def test_flat_text_encoders() -> None:
    keys = [
        *shapes("sdxl-base-diffusers", "text_encoder/"),
        "text_projection.weight",
        "text_model.embeddings.position_ids",
    ]
    flat = made_of("sdxl", "clip_l", "hf", "hf-flat", keys)
    assert flat == {key.removeprefix("text_model."): (Part(key),) for key in keys}
    assert set(made_of("sdxl", "clip_l", "hf-flat", "hf", flat)) == set(keys)
    fused = made_of(
        "sdxl", "clip_g", "hf-flat", "openclip", [f"encoder.layers.0.self_attn.{n}_proj.bias" for n in "qkv"]
    )
    assert [*fused] == ["transformer.resblocks.0.attn.in_proj_bias"]


@pytest.mark.parametrize(
    ("file", "prefix", "family", "component", "source", "target"),
    [
        ("sd15-inpainting-ldm", "model.diffusion_model.", "sd1", "unet", "ldm", "diffusers"),
        ("flux1-fill-bfl-transformer", "", "flux1", "transformer", "bfl", "diffusers"),
        ("controlnet-sdxl-diffusers", "", "controlnet", "controlnet", "diffusers", "ldm"),
        ("clip_g-hf", "", "text_encoder", "clip_g", "hf", "openclip"),
        ("lumina2-diffusers-transformer", "", "lumina2", "transformer", "diffusers", "comfy"),
        ("qwen-image-diffusers-transformer", "", "qwen_image", "transformer", "diffusers", "diffusers"),
        ("t5xxl-hf", "", "flux1", "t5xxl", "hf", "hf"),
        ("clip_l-hf", "", "sd1", "clip_l", "hf", "hf-flat"),
    ],
)
def test_every_key_of_files_without_a_twin(
    file: str, prefix: str, family: str, component: str, source: str, target: str
) -> None:
    keys = shapes(file, prefix)
    there = made_of(family, component, source, target, keys)
    assert {piece.key for parts in there.values() for piece in parts} == set(keys)
    assert set(made_of(family, component, target, source, there)) == set(keys)


@pytest.mark.parametrize("name", ["ssd-1b", "vega", "lcm", "unclip-h", "schnell", "3.5-medium", "klein-4b", "14b"])
def test_variants_of_the_architecture_tables(name: str) -> None:
    """All keys of a variant in one spelling become all of its keys in the other."""
    listed = [(table, each) for table in archs() for each in table.variants if each.name == name and table.keys]
    assert len({table.layout for table, _ in listed}) >= 2
    for source, variant in listed:
        for target, same in listed:
            if (source.family, source.name) == (target.family, target.name) and source.layout != target.layout:
                keys = source.expected((variant,)) + (source.optional_names() if name == "lcm" else [])
                wanted = target.expected((same,)) + (target.optional_names() if name == "lcm" else [])
                assert set(made_of(source.family, source.name, source.layout, target.layout, keys)) == set(wanted)


def test_one_file_may_have_more_layers_than_the_other() -> None:
    """SD2's own file has 24 layers and a projection; all of them have a name in Hugging Face's spelling."""
    keys = part("sd21-ldm", "cond_stage_model.model.")
    there = made_of("sd2", "clip_h", "openclip", "hf", keys)
    assert {piece.key for parts in there.values() for piece in parts} == set(keys) - {"logit_scale"}
    assert set(made_of("sd2", "clip_h", "hf", "openclip", there)) == set(keys) - {"logit_scale"}


@both_spellings
def test_aliases_name_every_module_of_the_other_spelling(
    family: str, component: str, left: tuple[str, str, str], right: tuple[str, str, str]
) -> None:
    canonical, other = (right, left) if right[2] == "hf" else (left, right)
    variant = "3.5-large" if left[0] == "sd35-large-sai" else ""
    known, end = aliases(family, component, variant), ".weight"
    for key, parts in made_of(family, component, canonical[2], other[2], shapes(*canonical[:2])).items():
        if len(parts) == 1 and key.endswith(end) and parts[0].key.endswith(end):
            whole = parts[0]
            assert known[key.removesuffix(end)] == whole._replace(key=whole.key.removesuffix(end))
    named = {key.removesuffix(end) for key in shapes(*canonical[:2]) if key.endswith(end)}
    assert named <= set(modules(family, component, variant))


@pytest.mark.parametrize(
    ("file", "prefix", "family", "component", "extra"),
    [
        ("sd15-ldm", "model.diffusion_model.", "sd1", "unet", {"time_embed.cond_proj"}),
        ("sdxl-base-sgm", "model.diffusion_model.", "sdxl", "unet", {"time_embed.cond_proj"}),
        ("sdxl-refiner-sgm", "model.diffusion_model.", "sdxl_refiner", "unet", set()),
        ("sd15-ldm", "first_stage_model.", "sd1", "vae", set()),
        ("chroma-bfl-transformer", "", "chroma", "transformer", None),
        ("flux1-dev-bfl-transformer", "", "flux1", "transformer", None),
        ("z-image-comfy-transformer", "", "z_image", "transformer", set()),
        ("clip_g-hf", "", "sdxl", "clip_g", set()),
        ("t5xxl-hf", "", "sd3", "t5xxl", set()),
    ],
)
def test_modules_are_those_of_the_model(
    file: str, prefix: str, family: str, component: str, extra: set[str] | None
) -> None:
    end = ".weight"
    real = {key.removesuffix(end) for key in shapes(file, prefix) if key.endswith(end)}
    named = set(modules(family, component))
    if extra is None:  # the norms, which newer files spell as `.weight`
        extra = {
            key.removesuffix(".scale") for key in shapes(file, prefix) if "_blocks" in key and key.endswith(".scale")
        }
    assert named == real | extra


def test_adapters_of_all_depths_are_told_and_the_deep_ones_exactly() -> None:
    context = "norm1_context.linear"
    every, large = aliases("sd3", "transformer"), aliases("sd3", "transformer", "3.5-large")
    assert every["transformer_blocks.37.attn.to_q"] == ("joint_blocks.37.x_block.attn.qkv", (0, 1, 3), "")
    assert every[f"transformer_blocks.23.{context}"].operation == "swap"
    assert large[f"transformer_blocks.23.{context}"].operation == ""
    assert large[f"transformer_blocks.37.{context}"].operation == "swap"
    assert set(large) <= set(every)


def test_layouts_are_called_as_in_the_architecture_tables() -> None:
    known = {(table.family, table.name, table.layout) for table in archs()}
    for table in tables():
        for layout in table.layouts:
            assert (table.family, table.name, layout) in known
    assert layouts("sdxl", "unet") == ("sgm", "diffusers")
    assert layouts("flux1", "vae") == ("ldm", "diffusers")
    assert layouts("sdxl", "clip_g") == ("hf", "hf-flat", "openclip")
    assert layouts("sdxl", "nothing") == ()


def test_a_pair_without_equations_is_an_error() -> None:
    with pytest.raises(MismatchError, match="`bfl` to `ldm` for `unet` of `sd1`") as caught:
        made_of("sd1", "unet", "bfl", "ldm", [])
    assert caught.value.hint is not None
    assert "ldm diffusers" in caught.value.hint


def test_it_is_quick() -> None:
    keys = shapes("sdxl-base-sgm", "model.diffusion_model.")
    made_of("sdxl", "unet", "sgm", "diffusers", keys)
    start = time.process_time()
    made_of("sdxl", "unet", "sgm", "diffusers", keys)
    assert time.process_time() - start < 0.05


def test_equations() -> None:
    one, two = parse("a.{0,1}.<p> = b.{D}.<p>\nc", {"D": 2}, {"p": "x = y + 3*z"})[:2], parse("w = swap(v)", {}, {})
    assert [each.left for each in one] == ["a.0.x", "a.1.x"]
    assert list(one[1].forward()) == [("b.1.y", (Part("a.1.x", (0, 1, 4)),)), ("b.1.z", (Part("a.1.x", (1, 4, 4)),))]
    assert list(one[1].backward()) == [("a.1.x", (Part("b.1.y"), Part("b.1.z")))]
    assert list(two[0].backward()) == [("w", (Part("v", None, "swap"),))]
    with pytest.raises(ValueError, match="zip"):
        parse("a.{0,1} = b.{0-2}", {}, {})
