"""Block weight lists and presets, against the published tables and the mistakes of others."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sdops.core.block_weights import (
    LORA_PRESETS,
    LORA_SD1_SLOTS,
    LORA_SDXL_SLOTS,
    PRESETS,
    SD1_SLOTS,
    find_slot,
    from_numbers,
    from_preset,
    preset_name,
)
from sdops.errors import UsageError

SDXL_SLOTS = ("BASE", *(f"IN{i:02d}" for i in range(9)), "M00", *(f"OUT{i:02d}" for i in range(9)))
FLUX_SLOTS = ("BASE", *(f"D{i:02d}" for i in range(19)), *(f"S{i:02d}" for i in range(38)))

# The 25 numbers that bbc-mc/sdweb-merge-block-weighted-gui publishes in csv/preset.tsv, IN00 first.
PUBLISHED = {
    "GRAD_V": [abs(12 - i) / 12 for i in range(25)],
    "GRAD_A": [1 - abs(12 - i) / 12 for i in range(25)],
    "FLAT_25": [0.25] * 25,
    "FLAT_75": [0.75] * 25,
    "WRAP08": [1] * 4 + [0] * 17 + [1] * 4,
    "WRAP12": [1] * 6 + [0] * 13 + [1] * 6,
    "WRAP14": [1] * 7 + [0] * 11 + [1] * 7,
    "WRAP16": [1] * 8 + [0] * 9 + [1] * 8,
    "MID12_50": [0] * 5 + [0.5] * 14 + [0] * 6,
    "OUT07": [0] * 18 + [1] * 7,
    "OUT12": [0] * 13 + [1] * 12,
    "OUT12_5": [0] * 12 + [0.5] + [1] * 12,
    "RING08_SOFT": [0] * 5 + [0.5, 1, 1, 1, 0.5] + [0] * 5 + [0.5, 1, 1, 1, 0.5] + [0] * 5,
    "RING08_5": [0] * 6 + [1] * 4 + [0] * 5 + [1] * 4 + [0] * 6,
    "RING10_5": [0] * 5 + [1] * 5 + [0] * 5 + [1] * 5 + [0] * 5,
    "RING10_3": [0] * 6 + [1] * 5 + [0] * 3 + [1] * 5 + [0] * 6,
    # published there as NORMAL-SIGMOID
    "SMOOTHSTEP": [
        0, 0.00506365740740741, 0.0196759259259259, 0.04296875, 0.0740740740740741, 0.112123842592593, 0.15625,
        0.205584490740741, 0.259259259259259, 0.31640625, 0.376157407407407, 0.437644675925926, 0.5, 0.562355324074074,
        0.623842592592592, 0.68359375, 0.740740740740741, 0.794415509259259, 0.84375, 0.887876157407408,
        0.925925925925926, 0.95703125, 0.980324074074074, 0.994936342592593, 1,
    ],
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_presets_are_the_published_tables(name: str) -> None:
    weights = from_preset(name, SD1_SLOTS).weights
    assert list(weights) == list(SD1_SLOTS)
    assert weights.pop("BASE") == 0
    assert list(weights.values()) == pytest.approx(PUBLISHED[name], abs=1e-10)


def test_there_are_38_presets() -> None:
    assert len(PRESETS) == 38


@pytest.mark.parametrize("name", [*PRESETS, *(f"SDXL_{name}" for name in PRESETS)])
@pytest.mark.parametrize("slots", [SD1_SLOTS, SDXL_SLOTS, FLUX_SLOTS])
def test_every_preset_works_for_every_family(name: str, slots: tuple[str, ...]) -> None:
    """One project looks its SDXL presets up in the table of SD1 and fails."""
    weights = from_preset(name.lower(), slots).weights
    assert list(weights) == list(slots)
    assert all(-1e-9 <= weight <= 1 + 1e-9 for weight in weights.values())


@pytest.mark.parametrize("name", [name for name in PRESETS if name.startswith(("R_", "REVERSE_"))])
def test_reversed_presets_mirror(name: str) -> None:
    straight = from_preset(name.removeprefix("R_").removeprefix("REVERSE_"), SDXL_SLOTS).weights
    for slot, weight in from_preset(name, SDXL_SLOTS).weights.items():
        if slot != "BASE":
            assert weight == pytest.approx(1 - straight[slot])


def test_shape_presets_keep_their_shape_in_other_depths() -> None:
    weights = from_preset("GRAD_V", SDXL_SLOTS).weights
    assert (weights["IN00"], weights["M00"], weights["OUT08"]) == (1, 0, 1)
    cubic = from_preset("TRUE_CUBIC_HERMITE", SD1_SLOTS).weights
    assert cubic["IN01"] == 0.1990318769
    assert cubic["OUT11"] == 1
    wrap = from_preset("WRAP08", SDXL_SLOTS).weights
    assert [slot for slot in SDXL_SLOTS if wrap[slot]] == ["IN00", "IN01", "IN02", "OUT06", "OUT07", "OUT08"]


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("grad-v", "GRAD_V"),
        ("REVERSE-SMOOTHSTEP", "REVERSE_SMOOTHSTEP"),
        ("SMOOTHSTEP2", "SMOOTHSTEP*2"),
        ("r_smoothstepx3", "R_SMOOTHSTEP*3"),
        ("SMOOTHSTEP/4", "SMOOTHSTEP/4"),
        ("midd", "MIDD"),
        ("nonsense", None),
    ],
)
def test_preset_spellings(text: str, name: str | None) -> None:
    assert preset_name(text) == name


def test_two_presets_mix() -> None:
    mixed = from_preset("GRAD_V:GRAD_A:0.25", SD1_SLOTS).weights
    assert mixed["IN00"] == 0.75
    assert mixed["M00"] == 0.25


def test_unknown_preset_suggests() -> None:
    with pytest.raises(UsageError, match="did you mean `GRAD_V`"):
        from_preset("GRAD_W", SD1_SLOTS)


@given(st.lists(st.floats(-2, 2), min_size=26, max_size=26))
def test_26_numbers_go_to_the_slots_of_the_same_place(numbers: list[float]) -> None:
    """One project reads IN00's weight from BASE, IN01's from IN00, and never OUT11's."""
    weights, note = from_numbers(numbers, SD1_SLOTS)
    assert list(weights.values()) == numbers
    assert (weights["BASE"], weights["IN00"], weights["M00"], weights["OUT11"]) == (
        numbers[0], numbers[1], numbers[13], numbers[25],
    )  # fmt: skip
    assert not note


def test_25_numbers_have_no_base() -> None:
    weights, note = from_numbers(range(1, 26), SD1_SLOTS)
    assert (weights["BASE"], weights["IN00"], weights["OUT11"]) == (0, 1, 25)
    assert note == "BASE not listed: 0"


def test_sdxl_lengths() -> None:
    assert from_numbers(range(20), SDXL_SLOTS).weights["OUT08"] == 19
    assert from_numbers(range(19), SDXL_SLOTS).weights["OUT08"] == 18
    with_vae = from_numbers(range(21), SDXL_SLOTS).weights
    assert (with_vae["OUT08"], with_vae["VAE"]) == (19, 20)
    # where the VAE is a slot of its own it follows BASE unless it is listed
    assert from_numbers(range(3, 23), (*SDXL_SLOTS, "VAE")).weights["VAE"] == 3
    assert from_numbers(range(21), (*SDXL_SLOTS, "VAE")).weights["VAE"] == 20


def test_lists_of_other_families() -> None:
    sd3 = ("BASE", "IN", *(f"J{i:02d}" for i in range(24)), "OUT")
    weights, note = from_numbers(range(1, 25), sd3)  # the 24 numbers that model-mixer takes
    assert (weights["J00"], weights["J23"], weights["IN"], weights["BASE"]) == (1, 24, 0, 0)
    assert note == "BASE, IN, OUT not listed: 0"
    flux = ("BASE", "CLIP", "T5", "IN", *FLUX_SLOTS[1:], "OUT")
    weights, note = from_numbers(range(61), flux)  # supermerger's
    assert (weights["CLIP"], weights["IN"], weights["D00"], weights["OUT"]) == (0, 2, 3, 60)
    assert note == "BASE not listed: 0"
    assert from_preset("GRAD_V", flux).weights["T5"] == 0


def test_numbers_of_sd1_lose_the_blocks_that_sdxl_lacks() -> None:
    numbers = list(range(26))
    weights, note = from_numbers(numbers, SDXL_SLOTS)
    assert list(weights.values()) == [n for n, slot in zip(numbers, SD1_SLOTS, strict=True) if slot in SDXL_SLOTS]
    assert "IN09, IN10, IN11, OUT09, OUT10, OUT11" in note
    assert from_numbers(numbers[1:], SDXL_SLOTS).weights == {**weights, "BASE": 0}


@pytest.mark.parametrize(("layout", "slots"), [(LORA_SD1_SLOTS, SD1_SLOTS), (LORA_SDXL_SLOTS, SDXL_SLOTS)])
def test_lora_lists_name_the_transformer_blocks(layout: tuple[str, ...], slots: tuple[str, ...]) -> None:
    assert len(layout) == (17 if slots == SD1_SLOTS else 12)
    weights = from_numbers(range(1, len(layout) + 1), slots).weights
    assert [weights[slot] for slot in layout] == list(range(1, len(layout) + 1))
    assert all(weights[slot] == 0 for slot in slots if slot not in layout)


LBW = {
    "NONE": "0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0",
    "ALL": "1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1",
    "INS": "1,1,1,1,0,0,0,0,0,0,0,0,0,0,0,0,0",
    "IND": "1,0,0,0,1,1,1,0,0,0,0,0,0,0,0,0,0",
    "INALL": "1,1,1,1,1,1,1,0,0,0,0,0,0,0,0,0,0",
    "MIDD": "1,0,0,0,1,1,1,1,1,1,1,1,0,0,0,0,0",
    "OUTD": "1,0,0,0,0,0,0,0,1,1,1,1,0,0,0,0,0",
    "OUTS": "1,0,0,0,0,0,0,0,0,0,0,0,1,1,1,1,1",
    "OUTALL": "1,0,0,0,0,0,0,0,1,1,1,1,1,1,1,1,1",
}


@pytest.mark.parametrize("name", LBW)
def test_lora_presets_are_the_known_table(name: str) -> None:
    assert set(LBW) == set(LORA_PRESETS)
    weights = from_preset(name, SD1_SLOTS).weights
    assert [weights[slot] for slot in LORA_SD1_SLOTS] == [float(n) for n in LBW[name].split(",")]


def test_lora_presets_of_parts_are_refused_elsewhere() -> None:
    with pytest.raises(UsageError, match="SD1 and SD2 only"):
        from_preset("INS", SDXL_SLOTS)


@pytest.mark.parametrize(
    ("count", "slots", "lengths"),
    [
        (24, SD1_SLOTS, "17, 25, 26 or 27"),
        (20, SD1_SLOTS, "17, 25, 26 or 27"),
        (61, SDXL_SLOTS, "12, 19, 20, 21, 25 or 26"),
    ],
)
def test_wrong_lengths_say_the_right_ones(count: int, slots: tuple[str, ...], lengths: str) -> None:
    with pytest.raises(UsageError, match=f"{count} block weights") as caught:
        from_numbers([0.5] * count, slots)
    assert caught.value.hint is not None
    assert lengths in caught.value.hint


@pytest.mark.parametrize(
    ("name", "slot"), [("in4", "IN04"), ("MID", "M00"), ("mid00", "M00"), ("out011", "OUT11"), ("IN12", None)]
)
def test_slot_spellings(name: str, slot: str | None) -> None:
    assert find_slot(name, SD1_SLOTS) == slot
