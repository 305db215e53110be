"""Weights that are not plain numbers: which they are, how they were packed, and which keys hold their scales."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from sdops.core.spec import FP8, Spec

# What stands beside `X.weight`, by what is appended to X; the first group names the scale to multiply with.
_SCALES = (".scale_weight", ".weight_scale", ".weight_scale_2", ".weight.absmax", ".SCB", ".wscales")
_SIDES = (
    *_SCALES, ".scale_input", ".input_scale", ".comfy_quant", ".weight_format", ".wzeros", ".weight.quant_map",
    ".weight.nested_absmax", ".weight.nested_quant_map",
    ".weight.quant_state.bitsandbytes__nf4", ".weight.quant_state.bitsandbytes__fp4",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Quantised:
    """How a weight is stored: the kind, and the keys beside it (`X.scale_weight`, `X.weight.absmax` ...)."""

    kind: str
    scale: str | None
    sides: tuple[str, ...]


def quantised(specs: Mapping[str, Spec]) -> dict[str, Quantised]:
    """The quantised weights of a file.

    Kinds: `fp8` (plain, without a scale), `fp8-scaled`, `nf4` and `fp4` (bitsandbytes), `nvfp4`, `int8`,
    `svdquant` (nunchaku) and `packed` (another format, told by the JSON in `X.comfy_quant`).
    """
    sides: dict[str, list[str]] = {}
    for key in specs:
        if key.endswith(_SIDES):
            sides.setdefault(_weight_of(key, specs), []).append(key)
    found = {weight: _describe(weight, keys, specs) for weight, keys in sides.items() if weight in specs}
    for key, spec in specs.items():
        if spec.dtype in FP8 and key not in found and not key.endswith(_SIDES):
            found[key] = Quantised("fp8", None, ())
    return found


def _weight_of(key: str, specs: Mapping[str, Spec]) -> str:
    stem = next(key.removesuffix(side) for side in _SIDES if key.endswith(side))
    return f"{stem}.qweight" if f"{stem}.qweight" in specs else f"{stem}.weight"


def _describe(weight: str, sides: list[str], specs: Mapping[str, Spec]) -> Quantised:
    scale = next((key for end in _SCALES for key in sides if key.endswith(end)), None)
    return Quantised(_kind(weight, sides, specs[weight].dtype), scale, tuple(sides))


def _kind(weight: str, sides: list[str], dtype: str) -> str:
    ends = tuple(sides)
    if any(key.endswith("__nf4") for key in ends):
        return "nf4"
    if any(key.endswith("__fp4") for key in ends):
        return "fp4"
    if weight.endswith(".qweight"):
        return "svdquant"
    if dtype in FP8:
        return "fp8-scaled"
    if dtype == "I8":
        return "int8"
    if any(key.endswith(".weight_scale_2") for key in ends):
        return "nvfp4"
    return "packed"
