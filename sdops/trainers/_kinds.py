"""Kinds of layers, and the rank that each gets. By names alone: no torch."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from sdops.errors import UsageError
from sdops.text import instead_of
from sdops.training.config import Config
from sdops.training.forms import Form

# Kind of layer -> what its name in diffusers' UNet looks like. The first that fits is meant.
KINDS = {
    "cross": re.compile(r".*\.attn2\.(to_[qkv]|to_out\.0)"),
    "attention": re.compile(r".*\.attn\d\.(to_[qkv]|to_out\.0)"),
    "feedforward": re.compile(r".*\.ff\.net\.\d(\.proj)?"),
    "projection": re.compile(r".*\.proj_(in|out)"),
    "resnet": re.compile(r".*resnets\.\d+\.(conv\d|conv_shortcut)"),
    "sampler": re.compile(r".*samplers\.\d+\.conv"),
    "time": re.compile(r".*time_emb_proj|\.(time|add)_embedding\.linear_\d"),
}
TEXT = "text"
TEXT_LAYERS = re.compile(r".*\.(self_attn\.(q|k|v|out)_proj|mlp\.fc\d)")


@dataclass(frozen=True, slots=True)
class Rank:
    """Rank and alpha of a kind of layers."""

    rank: int
    lora_alpha: float


def ranks_of(config: Config) -> dict[str, Rank]:
    """Kind -> rank and alpha, as `ranks` says: 'attention=16/8 resnet=4'.

    Raises:
        UsageError: there is no such kind, or that is no rank.
    """
    found: dict[str, Rank] = {}
    for item in config.ranks.replace(",", " ").split():
        kind, _, numbers = item.partition("=")
        if kind not in (*KINDS, TEXT):
            hint = instead_of(kind, (*KINDS, TEXT))
            raise UsageError(f"`ranks` names the kind of layers `{kind}`, which there is not", hint=hint, key="ranks")
        match = re.fullmatch(r"(\d+)(?:/(\d+(?:\.\d+)?))?", numbers) if numbers else None
        if numbers and (match is None or int(match[1]) < 1):
            raise UsageError(
                f"`ranks` has `{item}`, which is no rank", hint="e.g. `attention=16` or `attention=16/8`", key="ranks"
            )
        rank = int(match[1]) if match else config.rank
        own = float(match[2]) if match and match[2] else config.lora_alpha
        found[kind] = Rank(rank, own or float(rank))
    if config.text_encoder:
        found.setdefault(TEXT, Rank(config.rank, config.lora_alpha or float(config.rank)))
    if not found:
        raise UsageError("`ranks` names no layers to train", hint="e.g. `attention feedforward`", key="ranks")
    return found


def form_of(config: Config, rank: Rank) -> Form:
    """How layers of that rank are changed."""
    return Form(config.family, rank.rank, rank.lora_alpha, config.rslora, config.dora, config.dropout, config.factor)


def kind_of(component: str, name: str, ranks: Mapping[str, Rank]) -> str | None:
    """The kind of a layer among those that are trained; None if it is not."""
    if component != "unet":
        return TEXT if TEXT in ranks and TEXT_LAYERS.fullmatch(f".{name}") else None
    return next((kind for kind, pattern in KINDS.items() if kind in ranks and pattern.fullmatch(f".{name}")), None)
