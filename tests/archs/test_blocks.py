"""Merge slots: complete, in order, and the same in every layout of a model."""

from __future__ import annotations

from collections import Counter

import pytest

from sdops.archs.blocks import BASE, block_of, block_slots, ema_key_of, is_ema, is_position_ids, is_schedule
from sdops.archs.detect import detect

from .lists import NAMES, load

UNET = "model.diffusion_model."
SD1 = ["BASE", *[f"IN{i:02}" for i in range(12)], "M00", *[f"OUT{i:02}" for i in range(12)]]
SDXL = ["BASE", *[f"IN{i:02}" for i in range(9)], "M00", *[f"OUT{i:02}" for i in range(9)], "VAE"]
FLUX = ["BASE", "CLIP", "T5", "IN", *[f"D{i:02}" for i in range(19)], *[f"S{i:02}" for i in range(38)], "OUT"]
WITHOUT_SLOTS = {"clip_l-hf", "clip_g-hf", "t5xxl-hf", "flux-ae-ldm", "t2iadapter-sd15-diffusers"}


@pytest.mark.parametrize(
    ("name", "slots"),
    [
        ("sd15-ldm", SD1),
        ("sd15-diffusers", SD1),
        ("sd21-ldm", SD1),
        ("sd21-diffusers", SD1),
        ("sdxl-base-sgm", SDXL),
        ("sdxl-base-diffusers", SDXL),
        ("sdxl-refiner-sgm", SD1),
        ("flux1-dev-comfy-allinone", FLUX),
        ("flux1-dev-diffusers", FLUX),
        ("sd3-medium-sai", ["BASE", "IN", *[f"J{i:02}" for i in range(24)], "OUT"]),
        ("sd35-large-diffusers", ["BASE", "IN", *[f"J{i:02}" for i in range(38)], "OUT"]),
    ],
)
def test_slot_lists(name: str, slots: list[str]) -> None:
    assert block_slots(detect(load(name))) == slots


@pytest.mark.parametrize("name", NAMES)
def test_every_key_has_a_slot_and_every_slot_a_key(name: str) -> None:
    specs = load(name)
    found = detect(specs)
    used = Counter(block_of(found, key) for key in specs)
    slots = block_slots(found)
    assert set(used) <= set(slots)
    assert (slots == [BASE]) == (name in WITHOUT_SLOTS)
    alone = len(found.components) == 1
    assert set(slots) - set(used) <= ({BASE, "CLIP", "T5"} if alone else set())


@pytest.mark.parametrize("name", NAMES)
def test_no_key_of_the_model_itself_is_without_a_slot(name: str) -> None:
    found = detect(load(name))
    if found.main is not None and name not in WITHOUT_SLOTS:
        assert not [key for key in found.main.keys if block_of(found, key) == BASE]


@pytest.mark.parametrize(
    ("original", "diffusers"),
    [
        ("sd15-ldm", "sd15-diffusers"),
        ("sd21-ldm", "sd21-diffusers"),
        ("sdxl-base-sgm", "sdxl-base-diffusers"),
        ("sdxl-refiner-sgm", "sdxl-refiner-diffusers"),
    ],
)
def test_both_layouts_of_a_unet_fill_the_slots_alike(original: str, diffusers: str) -> None:
    def filled(name: str) -> Counter[str]:
        found = detect(load(name))
        assert found.main is not None
        return Counter(block_of(found, key) for key in found.main.keys)

    assert filled(original) == filled(diffusers)


@pytest.mark.parametrize("name", ["flux1-dev", "sd3-medium", "sd15-unet", "sd21-unet", "sdxl-base-unet"])
def test_slots_follow_the_published_row_maps(name: str) -> None:
    """A diffusers tensor and the original tensors it is cut from have the same slot."""
    lists = {
        "flux1-dev": ("flux1-dev-bfl-transformer", "", "flux1-dev-diffusers", "transformer/"),
        "sd3-medium": ("sd3-medium-sai", UNET, "sd3-medium-diffusers", "transformer/"),
        "sd15-unet": ("sd15-ldm", UNET, "sd15-diffusers", "unet/"),
        "sd21-unet": ("sd21-ldm", UNET, "sd21-diffusers", "unet/"),
        "sdxl-base-unet": ("sdxl-base-sgm", UNET, "sdxl-base-diffusers", "unet/"),
    }
    original, prefix, diffusers, folder = lists[name]
    originals, others = detect(load(original)), detect(load(diffusers))
    compared = 0
    for key, sources in row_map(name).items():
        for source, *_ in sources:
            there = prefix + source.removeprefix(UNET)
            assert block_of(others, folder + key) == block_of(originals, there), key
            compared += 1
    assert compared > 400


def row_map(name: str) -> dict[str, list[list[str]]]:
    import gzip
    import json

    from .lists import KEYS

    rows: dict[str, list[list[str]]] = json.loads(gzip.decompress((KEYS / f"map-{name}.json.gz").read_bytes()))
    return rows


def test_where_the_parts_without_a_number_go() -> None:
    sdxl = detect(load("sdxl-base-sgm"))
    assert block_of(sdxl, f"{UNET}time_embed.0.weight") == "IN00"
    assert block_of(sdxl, f"{UNET}label_emb.0.0.weight") == "IN00"
    assert block_of(sdxl, f"{UNET}out.2.weight") == "OUT08"
    assert block_of(sdxl, "first_stage_model.decoder.conv_in.weight") == "VAE"
    assert block_of(sdxl, "conditioner.embedders.1.model.ln_final.weight") == BASE
    sd1 = detect(load("sd15-ldm"))
    assert block_of(sd1, f"{UNET}out.0.weight") == "OUT11"
    assert block_of(sd1, "first_stage_model.decoder.conv_in.weight") == BASE
    assert block_of(sd1, "unheard of") == BASE


def test_tens_are_not_mistaken_for_ones() -> None:
    sd1 = detect(load("sd15-ldm"))
    assert block_of(sd1, f"{UNET}input_blocks.1.0.in_layers.0.weight") == "IN01"
    assert block_of(sd1, f"{UNET}input_blocks.11.0.in_layers.0.weight") == "IN11"


def test_the_moving_average_follows_its_weights() -> None:
    specs = load("sd15-ldm-with-ema")
    found = detect(specs)
    weights = [key for key in specs if key.startswith(UNET)]
    assert {ema_key_of(key) for key in weights} == {key for key in specs if is_ema(key)} - {
        "model_ema.decay",
        "model_ema.num_updates",
    }
    assert all(block_of(found, ema_key_of(key)) == block_of(found, key) for key in weights)
    assert block_of(found, "model_ema.decay") == BASE


def test_predicates() -> None:
    specs = load("sd15-ldm-with-ema")
    assert sum(map(is_schedule, specs)) == 12
    assert sum(map(is_ema, specs)) == 688
    assert [key for key in specs if is_position_ids(key)] == [
        "cond_stage_model.transformer.text_model.embeddings.position_ids"
    ]
