"""LoRA files as the changes that the kernels take: factors on the device, in the file's dtype, with the scale apart.

Whatever has no short form there (OFT, (IA)^3, Tucker kernels, biases ...) becomes a dense change, made by the adapters
shelf from the pristine weight.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sdops.adapters import Settings
from sdops.adapters._dora import PARTS as MAGNITUDES
from sdops.adapters._dora import is_per_output
from sdops.adapters._parts import scale_of, unfolded
from sdops.core import accel
from sdops.core.applied import Dense, LowRank
from sdops.core.patch import Patch
from sdops.core.precision import Singles
from sdops.verbs._adapters import read_parts
from sdops.verbs._apply_changes import Changes
from sdops.verbs._apply_loras import Lora

Weight = Callable[[str], Tensor]  # parameter -> its pristine value
_SHORT = {
    "lora": {"up", "down"},
    "loha": {"w1_a", "w1_b", "w2_a", "w2_b"},
    "lokr": {"w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2"},
}


class _Directed(NamedTuple):
    """A change whose DoRA gain is still to be made."""

    change: Any
    magnitude: Tensor
    axis: int


def changes_of(found: Changes, loras: list[Lora], weight: Weight) -> dict[str, list[tuple[int, Any]]]:
    """What is added to each parameter: place of the LoRA, and the kernels' change at strength 1.

    Args:
        found: Changes of LoRAs whose strength is 1.
        loras: As `found` has them.
        weight: Gives pristine parameters, on the device where the changes shall be.
    """
    places = {id(lora): place for place, lora in enumerate(loras)}
    made: dict[str, list[tuple[int, Any]]] = {key: [] for key in found.terms}
    directed: list[tuple[str, int, _Directed]] = []
    for key, terms in found.terms.items():
        for term in terms:
            source: Any = term.factors if isinstance(term, LowRank) else term.delta
            own = _plain(source, term.start, weight(key)) if isinstance(term, LowRank) else _other(source, key, weight)
            if isinstance(own, _Directed):
                directed.append((key, len(made[key]), own))
            made[key].append((places[id(source.lora)], own))
    if directed:  # the norms of all layers at once
        changes, magnitudes, axes = zip(*(own for *_, own in directed), strict=True)
        gains = accel.kernels().dora_gains([weight(key) for key, *_ in directed], changes, magnitudes, axes)
        for (key, position, own), gain in zip(directed, gains, strict=True):
            made[key][position] = made[key][position][0], replace(own.change, gain=gain, gain_axis=own.axis)
    return made


def _plain(source: Any, start: int, weight: Tensor) -> Any:
    """up @ down for some rows, or columns of a weight that is stored transposed."""
    parts = _parts(source, weight.device)
    up, down = parts["up"].flatten(1), parts["down"].flatten(1)
    piece = source.piece
    up = up[piece.begin : piece.begin + piece.rows]
    if piece.turned:
        up, down = down.T.contiguous(), up.T.contiguous()
    scale = _scale(source.patch, parts, len(parts["down"]))
    return accel.kernels().LoRA(up.contiguous(), down.contiguous(), scale, first=start)


def _other(source: Any, key: str, weight: Weight) -> Any:
    """The short form where there is one, else the change itself."""
    kernels, own = accel.kernels(), weight(key)
    whole = len(source.pieces) == 1 and source.pieces[0][1:] == (0, 0, source.shape[0], False)
    short = _short(source.patch, _parts(source, own.device)) if whole and source.parameter == "weight" else None
    if short is None:
        values = Dense(source).delta(lambda name: _singles(weight(name)))
        change = torch.from_numpy(values).to(own.device)
        return kernels.Dense(change.reshape(1, -1) if own.ndim == 1 else change)
    magnitude = next((name for name in MAGNITUDES if name in source.patch.parts), None)
    if magnitude is None:
        return short
    strengths = _parts(source, own.device)[magnitude]
    return _Directed(short, strengths, 0 if is_per_output(magnitude, tuple(strengths.shape), len(own)) else 1)


def _short(patch: Patch, parts: dict[str, Tensor]) -> Any:
    """LoRA, LoHa or LoKr without settings of their own; None for all others."""
    kernels = accel.kernels()
    named = patch.parts.keys() - {"lora_alpha", *MAGNITUDES}
    if not named <= _SHORT.get(patch.family, set()) or not patch.settings.keys() <= {"lora_alpha", "use_rslora"}:
        return None
    if patch.family == "lora":
        return kernels.LoRA(parts["up"], parts["down"], _scale(patch, parts, len(parts["down"])))
    if patch.family == "loha":
        factors = [parts[name] for name in ("w1_a", "w1_b", "w2_a", "w2_b")]
        return kernels.LoHa(*factors, _scale(patch, parts, len(parts["w1_b"])))
    factored = [parts[name] for name in ("w2_b", "w1_b") if name in parts]
    scale = _scale(patch, parts, len(factored[0])) if factored else 1.0
    return kernels.LoKr(_product(parts, "1"), _product(parts, "2"), scale)


def _product(parts: dict[str, Tensor], side: str) -> Tensor:
    """w1 or w2 of a LoKr, multiplied out: they are small."""
    if f"w{side}" in parts:
        return parts[f"w{side}"].flatten(1)
    up, down = parts[f"w{side}_a"].float(), parts[f"w{side}_b"].float()
    if f"t{side}" in parts:
        return up.T @ unfolded(parts[f"t{side}"].float(), down).flatten(1)
    return up.flatten(1) @ down.flatten(1)


def _parts(source: Any, device: torch.device) -> dict[str, Tensor]:
    return {name: part.to(device) for name, part in read_parts(source.lora.adapter, source.patch).items()}


def _scale(patch: Patch, parts: dict[str, Tensor], rank: int) -> float:
    """alpha / rank, as the adapters shelf has it."""
    alpha = patch.settings.get("lora_alpha")
    settings = Settings(None if alpha is None else float(alpha), use_rslora=bool(patch.settings.get("use_rslora")))
    return scale_of(parts, rank, settings)


def _singles(weight: Tensor) -> Singles:
    values: Singles = weight.detach().to("cpu", torch.float32).numpy()
    return values.reshape(weight.shape if prod(weight.shape) else (0,))
