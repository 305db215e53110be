"""Dials: what each form means, what is refused, and that the canonical text says the same again."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Mapping

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sdops.core.block_weights import SD1_SLOTS
from sdops.core.dial import Dial, Place, parse_dial
from sdops.errors import UsageError

COMPONENTS = ("unet", "vae", "clip_l")
UNET = "model.diffusion_model"
PLACES = [
    Place(f"{UNET}.input_blocks.1.1.transformer_blocks.0.attn1.to_k.weight", "IN01", "unet"),
    Place(f"{UNET}.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight", "IN01", "unet"),
    Place(f"{UNET}.input_blocks.7.0.in_layers.0.weight", "IN07", "unet"),
    Place(f"{UNET}.output_blocks.7.0.in_layers.0.weight", "OUT07", "unet"),
    Place("first_stage_model.decoder.conv_in.weight", "BASE", "vae"),
    Place("cond_stage_model.transformer.text_model.final_layer_norm.bias", "BASE", "clip_l"),
]
ATTN1, ATTN2, IN07, OUT07, VAE, CLIP = PLACES


def dial(value: float | str | Mapping[str, float] | list[float], default: float = 0.5) -> Dial:
    return parse_dial(value, knob="alpha", default=default, slots=SD1_SLOTS, components=COMPONENTS)


def values(text: str | Mapping[str, float]) -> list[float]:
    return [dial(text).resolve(*place) for place in PLACES]


def test_one_number() -> None:
    for value in (0.3, "0.3", " .3 ", "3e-1", {"": 0.3}, {"default": 0.3}, np.float32(0.3)):
        assert dial(value).is_constant
        assert dial(value).resolve(*VAE) == pytest.approx(0.3)
    assert dial(0.3).to_json() == 0.3
    assert dial(1).resolve(*VAE) == 1


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0.3, IN00-IN05=0.1, vae=0, *attn2*=0.6", [0.1, 0.6, 0.3, 0.3, 0, 0.3]),
        ("0.3, *attn2*=0.6, IN00-IN05=0.1", [0.1, 0.1, 0.3, 0.3, 0.3, 0.3]),  # the last rule wins
        ("vae=0", [0.5, 0.5, 0.5, 0.5, 0, 0.5]),  # the knob's default
        ("0\nIN01=1;OUT7=0.25", [1, 1, 0, 0.25, 0, 0]),
        ("1, component:clip-l=0, block:IN05-OUT08=2", [1, 1, 2, 2, 1, 0]),
        ("1, /attn[12]\\.to_k/=0", [0, 0, 1, 1, 1, 1]),
        ("1, /to_k{1,1}, |zz/=0, unet=1, /attn2,?/=2", [1, 2, 1, 1, 1, 1]),  # dividers inside an expression
        ("1, first_stage_model.decoder.conv_in.weight=0", [1, 1, 1, 1, 0, 1]),
        # supermerger's elemental lines
        ("1, IN00-IN05:attn2:0.5", [1, 0.5, 1, 1, 1, 1]),
        ("1, OUT07:in_layers:0.5", [1, 1, 1, 0.5, 1, 1]),  # OUT07 is a preset's name as well
        ("1\nNOT IN00-IN05:to_k in_layers:0\n:NOT attn2 in_layers:2", [2, 1, 0, 0, 2, 2]),
        ("1,IN07 OUT07::0", [1, 1, 0, 0, 1, 1]),
        ("1,:attn:0.5,IN01:attn2:0.75", [0.5, 0.75, 1, 1, 1, 1]),
    ],
)
def test_rules(text: str, expected: list[float]) -> None:
    assert values(text) == expected


def test_a_mapping_is_the_same_as_text() -> None:
    mapping = {"": 0.3, "IN00-IN05": 0.1, "vae": 0, "*attn2*": 0.6, "OUT07:in_layers": 2}
    assert values(mapping) == [0.1, 0.6, 0.3, 2, 0, 0.3]


def test_block_weights() -> None:
    numbers = [round(i / 10, 1) for i in range(26)]
    expected = [0.2, 0.2, 0.8, 2.1, 0, 0]
    assert [dial(numbers).resolve(*place) for place in PLACES] == expected
    assert values(",".join(map(str, numbers))) == expected
    assert values("\n".join(map(str, numbers))) == expected
    assert values(" ".join(map(str, numbers)) + ", vae=9") == [*expected[:4], 9, 0]
    # a tensor in no slot gets BASE's weight
    assert dial(numbers).resolve("elsewhere", "", "") == numbers[0]


def test_presets() -> None:
    assert values("GRAD_V, BASE=0.5") == pytest.approx([11 / 12, 11 / 12, 5 / 12, 8 / 12, 0.5, 0.5])
    assert values("OUT07") == [0, 0, 0, 1, 0, 0]
    assert values("ALL_A:ALL_B:0.25, *attn2*=3") == [0.25, 3, 0.25, 0.25, 0.25, 0.25]
    assert values("SMOOTHSTEP*2")[4] == 0


def test_a_listed_vae_becomes_a_rule_where_it_is_no_slot() -> None:
    twenty_seven = dial([0.5] * 26 + [0.9])
    assert twenty_seven.resolve(*VAE) == 0.9
    assert twenty_seven.resolve(*CLIP) == 0.5


def test_notes_say_what_was_assumed() -> None:
    assert dial([0.5] * 25).notes == ("`alpha`: BASE not listed: 0",)
    assert not dial([0.5] * 26).notes


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "empty"),
        ("0.3x", "`0.3x` is neither"),
        ("nan", "`nan` is neither"),
        ("0.3, vae=nan", "`nan` at character 6 is not a number"),
        ("0.3, vae=inf", "`inf` at character 6 is not a number"),
        ("1e999", "not a finite number"),
        ("0.3, vae=", "`` at character 6 is not a number"),
        ("0.3, =1", "nothing before"),
        ("0.3, vae=0, 0.4", "`0.4` at character 13 comes after rules"),
        ("0.3, vea=0", "`vea` at character 6 is no block or component"),
        ("0.3, IN12=0", "`IN12` at character 6"),
        ("0.3, IN05-IN00=0", "runs backwards"),
        ("0.3, component:unet2=0", "no component"),
        ("0.3, block:XX=0", "no block"),
        ("0.3, /(/=0", "no regular expression"),
        ("0.3, /" + "a" * 300 + "/=0", "too long"),
        ("0.3 0.4", "2 block weights do not fit this model"),
        ("GRAD_W", "`GRAD_W` is neither"),
        ("1_0", "neither"),
        ("0.3, attn2=0", "no block or component"),
        ("GRAD_V:GRAD_A:x", "PRESET:PRESET:SHARE"),
        ("x" * 30_000, "30,000 characters"),
    ],
)
def test_refusals(text: str, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        dial(text)
    assert message in caught.value.message
    assert "`alpha`" in caught.value.message
    assert caught.value.hint


@pytest.mark.parametrize("value", [float("nan"), float("inf"), True, {"vae": float("nan")}, {"vae": "x"}, ["a"] * 26])
def test_python_values_refused(value: object) -> None:
    with pytest.raises(UsageError, match="alpha"):
        dial(value)  # type: ignore[arg-type]


def test_typos_get_suggestions() -> None:
    for text, meant in [("0.3, vea=0", "`vae`"), ("0.3, clip_1=0", "`clip_l`"), ("0.3, attn2=0", "`*attn2*`")]:
        with pytest.raises(UsageError) as caught:
            dial(text)
        assert meant in (caught.value.hint or "")


def test_unmatched_rules_are_errors() -> None:
    assert [t.matched for t in dial("0.3, vae=0, *to_k*=1").check(PLACES)] == [1, 2]
    for text, hint in [
        ("0.3, attn2.to_k*=1", "`*attn2.to_k*`"),
        ("0.3, IN11=1", "IN01, IN07, OUT07"),
        ("0.3, /nothing/=1", "inspect"),
    ]:
        with pytest.raises(UsageError, match="matches none of the 6 tensors") as caught:
            dial(text).check(PLACES)
        assert hint in (caught.value.hint or "")
    with pytest.raises(UsageError) as caught:
        dial("0.3, vae=1").check([ATTN1])
    assert "components here are unet" in (caught.value.hint or "")
    # a list of block weights is not a list of demands
    dial("GRAD_V").check(PLACES)


def test_tally_counts_what_decides() -> None:
    tallies = dial("0.3, unet=1, *attn2*=2, IN01=3").tally(PLACES)
    assert [(t.matched, t.decided) for t in tallies] == [(4, 2), (1, 0), (2, 2)]


def test_explain() -> None:
    assert dial("0.3, unet=1, *attn2*=2").explain(*ATTN2) == "alpha 2 from `*attn2*=2.0`, which comes after `unet=1.0`"
    assert dial("0.3, unet=1").explain(*VAE) == "alpha 0.3, the default"
    assert dial("GRAD_A").explain(*IN07) == "alpha 0.583333 from the weight of block IN07"


@pytest.mark.parametrize("text", ["0.3", "0.3, vae=0.3", "ALL_A", "FLAT_25, BASE=0.25"])
def test_constant(text: str) -> None:
    assert dial(text).is_constant == (text != "FLAT_25, BASE=0.25")


SELECTORS = st.sampled_from(
    ["IN04", "IN00-OUT03", "mid", "vae", "component:unet", "*attn2*", "/a,b{1,2}/", "NOT IN01:attn1 attn2", ":", "x.y"]
)
NUMBERS = st.floats(-3, 3)


@given(
    first=st.one_of(NUMBERS, st.lists(NUMBERS, min_size=26, max_size=26), st.sampled_from(["GRAD_V", "cosine"])),
    rules=st.lists(st.tuples(SELECTORS, NUMBERS), max_size=5),
)
def test_the_canonical_text_reads_back(first: float | list[float] | str, rules: list[tuple[str, float]]) -> None:
    start = ", ".join(map(repr, first)) if isinstance(first, list) else str(first)
    read = dial(", ".join([start, *(f"{selector}={number!r}" for selector, number in rules)]))
    again = dial(read.to_json())
    assert [again.resolve(*place) for place in PLACES] == [read.resolve(*place) for place in PLACES]
    assert again.to_json() == read.to_json()
    assert again.rules == read.rules


@given(st.text(max_size=60))
def test_any_text_is_read_or_refused(text: str) -> None:
    with contextlib.suppress(UsageError):
        dial(text)


def test_needs_no_torch_or_numpy() -> None:
    code = "import sys, sdops.core.dial; print([m for m in ('torch', 'numpy') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
