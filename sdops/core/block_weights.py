"""Block weights as people pass them around: lists of numbers and named presets, read as one weight per block slot.

A family's slots are names in the order of depth, for example BASE, IN00 .. IN11, M00, OUT00 .. OUT11 (SD1: 26) or
BASE, IN00 .. IN08, M00, OUT00 .. OUT08 (SDXL: 20). Weights are always looked up by name, never by position.

Sources: bbc-mc/sdweb-merge-block-weighted-gui (the 26 slots and the presets), hako-mikan/sd-webui-lora-block-weight
(the 12 and 17 slots of LoRAs and their presets). No torch, no numpy.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import cos, pi
from typing import NamedTuple

from sdops.errors import UsageError
from sdops.text import suggest

# Slots that have no place in the order of depth: presets leave them with the first model.
OUTSIDE = frozenset({"BASE", "VAE", "CLIP", "CLIPL", "CLIPG", "T5", "TIME", "LABEL"})


def _numbered(stem: str, *numbers: int) -> tuple[str, ...]:
    return tuple(f"{stem}{number:02d}" for number in numbers)


SD1_SLOTS = ("BASE", *_numbered("IN", *range(12)), "M00", *_numbered("OUT", *range(12)))
# Blocks that hold a transformer, hence LoRA weights.
LORA_SD1_SLOTS = ("BASE", *_numbered("IN", 1, 2, 4, 5, 7, 8), "M00", *_numbered("OUT", *range(3, 12)))
LORA_SDXL_SLOTS = ("BASE", *_numbered("IN", 4, 5, 7, 8), "M00", *_numbered("OUT", *range(6)))


class BlockWeights(NamedTuple):
    """One weight per slot.

    Attributes:
        weights: Slot name -> weight, every slot of the family in its order (and `VAE`, if it was listed beside them).
        note: What was assumed in reading the list, for the user; empty if nothing.
    """

    weights: dict[str, float]
    note: str = ""


def find_slot(name: str, slots: Sequence[str]) -> str | None:
    """The slot that a user's spelling means: case, missing zeros (`IN4`) and M00 = MID = MID00 do not matter."""
    wanted = _plain(name)
    return next((slot for slot in slots if _plain(slot) == wanted), None)


def _plain(name: str) -> str:
    """`mid` -> `M0`, `IN04` -> `IN4`."""
    upper = name.strip().upper()
    stem = upper.rstrip("0123456789")
    number = upper[len(stem) :]
    if stem == "MID":
        stem, number = "M", number or "0"
    return stem + (str(int(number)) if number else "")


# Lists of numbers


def from_numbers(numbers: Sequence[float], slots: Sequence[str]) -> BlockWeights:
    """Weights from a list, told apart by its length.

    With n slots of the family, VAE not counted: n numbers are for the slots in order; n - 1 leave out BASE, which gets
    0; as many as there are numbered blocks leave out all others; n + 1 add the VAE of a UNet family. A family with the
    input and output blocks 0 to 8 also takes the 26 or 25 numbers of SD1: those of the blocks it lacks are left out.
    The 17 (SD1) or 12 (SDXL) numbers of LoRA block weights name the blocks that hold transformers; the others get 0.

    Raises:
        UsageError: no layout of the family has that many slots.
    """
    own = [slot for slot in slots if slot != "VAE"]
    for layout in _layouts(own):
        if len(layout) == len(numbers):
            return _place(dict(zip(layout, map(float, numbers), strict=True)), own, slots)
    lengths = sorted({len(layout) for layout in _layouts(own)})
    raise UsageError(
        f"{len(numbers)} block weights do not fit this model, which has {_named(own) or 'no known blocks'}",
        hint=f"give {_listed(lengths)} numbers, or name blocks: `{own[-1]}=0.3`" if own else "give one number",
        count=len(numbers),
        lengths=lengths,
        slots=tuple(own),
    )


def _layouts(own: Sequence[str]) -> list[tuple[str, ...]]:
    """The slot lists that a list of numbers for this family may follow; own ones first."""
    if not own:
        return []
    blocks = tuple(slot for slot in own if slot != "BASE")
    layouts = [tuple(own), blocks, tuple(slot for slot in blocks if slot[-1].isdigit() and slot not in OUTSIDE)]
    numbered = {_plain(slot) for slot in own}
    if "OUT0" in numbered:
        layouts.append((*own, "VAE"))
    if numbered == {_plain(slot) for slot in SD1_SLOTS}:
        layouts.append(LORA_SD1_SLOTS)
    if numbered < {_plain(slot) for slot in SD1_SLOTS} and "IN8" in numbered and "IN9" not in numbered:
        layouts += [SD1_SLOTS, SD1_SLOTS[1:], LORA_SDXL_SLOTS]
    return layouts


def _place(given: dict[str, float], own: Sequence[str], slots: Sequence[str]) -> BlockWeights:
    """Weights of all slots from those that a list names; the note says what was left out or filled in."""
    by_name = {find_slot(name, slots) or name: weight for name, weight in given.items()}
    weights = {slot: by_name.pop(slot, 0.0) for slot in own}
    missing = [slot for slot in own if find_slot(slot, list(given)) is None]
    if "VAE" in by_name or "VAE" in slots:
        weights["VAE"] = by_name.pop("VAE", weights.get("BASE", 0.0))
    notes = []
    if by_name:
        notes.append(f"left out {_named(list(by_name))}: this model has no such blocks")
    if missing:
        notes.append(f"{_named(missing)} not listed: 0")
    return BlockWeights(weights, "; ".join(notes))


def _named(names: Sequence[str]) -> str:
    """`BASE, IN00 .. OUT08 (20 slots)`, or all of a few."""
    if len(names) <= 6:
        return ", ".join(names)
    return f"{names[0]}, {names[1]} .. {names[-1]} ({len(names)} slots)"


def _listed(numbers: Sequence[int]) -> str:
    *rest, last = map(str, numbers)
    return f"{', '.join(rest)} or {last}" if rest else last


# Presets. t is the block's place in depth, from 0 (first input block) to 1 (last output block).

Curve = Callable[[float], float]


def _smooth(t: float) -> float:
    return 3 * t**2 - 2 * t**3


def _zigzag(x: float) -> float:
    """x folded to [0, 1]: 0 at even numbers, 1 at odd ones, straight between."""
    return 1 - abs(1 - x % 2)


def _fake_cubic(t: float) -> float:
    return (38 * t**3 - 57 * t**2 + 25 * t) / 6


_TRUE_CUBIC = (
    0, 0.1990318769, 0.3257619599, 0.4246419271, 0.4984567901, 0.5499915606, 0.58203125, 0.59736087, 0.5987654321,
    0.5890299479, 0.570939429, 0.547278887, 0.5208333333, 0.4943877797, 0.4707272377, 0.4526367188, 0.4429012346,
    0.4443057967, 0.4596354167, 0.4916751061, 0.5432098765, 0.6170247396, 0.7159047068, 0.8426347897, 1,
)  # fmt: skip


def _true_cubic(t: float) -> float:
    """The published 25 numbers, which follow no simple formula; straight lines between them."""
    place = t * 24
    left = min(int(place), 23)
    return _TRUE_CUBIC[left] + (place - left) * (_TRUE_CUBIC[left + 1] - _TRUE_CUBIC[left])


def _steps(*plateaus: tuple[int, int, float]) -> Curve:
    """0 but for plateaus (first, last, height), given in the 25 blocks of SD1; nearest of those for other depths."""

    def curve(t: float) -> float:
        place = int(t * 24 + 0.5)
        return next((height for first, last, height in plateaus if first <= place <= last), 0.0)

    return curve


def _reverse(curve: Curve) -> Curve:
    return lambda t: 1 - curve(t)


def _multiplied(n: int) -> Curve:
    return lambda t: _zigzag(n * _smooth(t))


def _divided(n: int) -> Curve:
    return lambda t: _smooth(_zigzag(n * t))


_MIRRORED: dict[str, tuple[str, Curve]] = {
    "SMOOTHSTEP": ("REVERSE_SMOOTHSTEP", _smooth),
    "SMOOTHSTEP*2": ("R_SMOOTHSTEP*2", _multiplied(2)),
    "SMOOTHSTEP*3": ("R_SMOOTHSTEP*3", _multiplied(3)),
    "SMOOTHSTEP*4": ("R_SMOOTHSTEP*4", _multiplied(4)),
    "SMOOTHSTEP/2": ("R_SMOOTHSTEP/2", _divided(2)),
    "SMOOTHSTEP/3": ("R_SMOOTHSTEP/3", _divided(3)),
    "SMOOTHSTEP/4": ("R_SMOOTHSTEP/4", _divided(4)),
    "COSINE": ("REVERSE_COSINE", lambda t: (1 + cos(pi * t)) / 2),
    "TRUE_CUBIC_HERMITE": ("TRUE_REVERSE_CUBIC_HERMITE", _true_cubic),
    "FAKE_CUBIC_HERMITE": ("FAKE_REVERSE_CUBIC_HERMITE", _fake_cubic),
}

PRESETS: dict[str, Curve] = {
    "GRAD_V": lambda t: abs(1 - 2 * t),
    "GRAD_A": lambda t: 1 - abs(1 - 2 * t),
    "FLAT_25": lambda _: 0.25,
    "FLAT_75": lambda _: 0.75,
    "WRAP08": _steps((0, 3, 1), (21, 24, 1)),
    "WRAP12": _steps((0, 5, 1), (19, 24, 1)),
    "WRAP14": _steps((0, 6, 1), (18, 24, 1)),
    "WRAP16": _steps((0, 7, 1), (17, 24, 1)),
    "MID12_50": _steps((5, 18, 0.5)),
    "OUT07": _steps((18, 24, 1)),
    "OUT12": _steps((13, 24, 1)),
    "OUT12_5": _steps((12, 12, 0.5), (13, 24, 1)),
    "RING08_SOFT": _steps((5, 5, 0.5), (6, 8, 1), (9, 9, 0.5), (15, 15, 0.5), (16, 18, 1), (19, 19, 0.5)),
    "RING08_5": _steps((6, 9, 1), (15, 18, 1)),
    "RING10_5": _steps((5, 9, 1), (15, 19, 1)),
    "RING10_3": _steps((6, 10, 1), (14, 18, 1)),
    "ALL_A": lambda _: 0.0,
    "ALL_B": lambda _: 1.0,
}
for _name, (_mirror, _curve) in _MIRRORED.items():
    PRESETS[_name] = _curve
    PRESETS[_mirror] = _reverse(_curve)

# Presets of LoRA block weights: the slots of LORA_SD1_SLOTS that get 1.
LORA_PRESETS: dict[str, tuple[str, ...]] = {
    "NONE": (),
    "ALL": LORA_SD1_SLOTS,
    "INS": ("BASE", *_numbered("IN", 1, 2, 4)),
    "IND": ("BASE", *_numbered("IN", 5, 7, 8)),
    "INALL": LORA_SD1_SLOTS[:7],
    "MIDD": ("BASE", *_numbered("IN", 5, 7, 8), "M00", *_numbered("OUT", 3, 4, 5, 6)),
    "OUTD": ("BASE", *_numbered("OUT", 3, 4, 5, 6)),
    "OUTS": ("BASE", *_numbered("OUT", 7, 8, 9, 10, 11)),
    "OUTALL": ("BASE", *LORA_SD1_SLOTS[8:]),
}


def preset_name(text: str) -> str | None:
    """The preset that a user's spelling means, or None.

    `grad-v` is GRAD_V, `SMOOTHSTEP2` is SMOOTHSTEP*2; the prefix `SDXL_` that one project uses changes nothing.
    """
    name = text.strip().upper().replace("-", "_").removeprefix("SDXL_")
    if name.startswith(("SMOOTHSTEP", "R_SMOOTHSTEP")) and name[-1] in "234" and name[-2] not in "*/":
        name = f"{name[:-1].removesuffix('X')}*{name[-1]}"
    return name if name in PRESETS or name in LORA_PRESETS else None


def from_preset(text: str, slots: Sequence[str]) -> BlockWeights:
    """Weights of a named preset, or of two with a share of the second: `GRAD_V`, `GRAD_V:GRAD_A:0.3`.

    A curve is evaluated at t = i / (N - 1) for the N blocks of the family in order of depth, so that every family has
    the whole shape (others cut the 26 numbers of SD1 short). BASE, VAE and text encoders get 0, or 1 for ALL_B.

    Raises:
        UsageError: there is no such preset, or it is not defined for the family.
    """
    first, *rest = text.split(":")
    weights = _preset(first, slots)
    if not rest:
        return BlockWeights(weights)
    try:
        other, share = _preset(rest[0], slots), float(rest[1])
    except (IndexError, ValueError):
        raise UsageError(f"`{text}` is not PRESET:PRESET:SHARE", hint="for example GRAD_V:GRAD_A:0.3") from None
    return BlockWeights({slot: (1 - share) * weights[slot] + share * other[slot] for slot in weights})


def _preset(text: str, slots: Sequence[str]) -> dict[str, float]:
    name = preset_name(text)
    if name is None:
        close = suggest(text, [*PRESETS, *LORA_PRESETS])
        guess = f"; did you mean `{close}`?" if close else ""
        raise UsageError(f"there is no block preset `{text.strip()}`{guess}", hint=f"presets: {', '.join(PRESETS)}")
    if name in LORA_PRESETS:
        return _lora_preset(name, slots)
    blocks = [slot for slot in slots if slot not in OUTSIDE]
    outside = 1.0 if name == "ALL_B" else 0.0
    depth = {slot: i / max(len(blocks) - 1, 1) for i, slot in enumerate(blocks)}
    return {slot: float(PRESETS[name](depth[slot])) if slot in depth else outside for slot in slots}


def _lora_preset(name: str, slots: Sequence[str]) -> dict[str, float]:
    if name in ("ALL", "NONE"):
        return dict.fromkeys(slots, float(name == "ALL"))
    chosen = {find_slot(slot, slots) for slot in LORA_PRESETS[name]}
    if find_slot("OUT11", slots) is None or None in chosen:
        raise UsageError(
            f"the LoRA block preset `{name}` is defined for SD1 and SD2 only",
            hint="name the blocks: `0, IN04-IN08=1`",
            preset=name,
        )
    return {slot: float(slot in chosen) for slot in slots}
