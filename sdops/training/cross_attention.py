"""Keys and values of all cross-attentions at once, for all of them read the same text c [B, tokens, width].

    [K_1 V_1 K_2 V_2 ...] = c [W_1; W_2; ...]^T            one product instead of 32 (SD1) or 140 (SDXL)
    [S_1 S_2 ...] = c [s_1 A_1; s_2 A_2; ...]^T            and one for the first halves of plain LoRAs on them

Autograd does the same backward: one product for the gradient of the text, one for those of all A.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from sdops.training.changes import Change

_WANTED = re.compile(r".*\.attn2\.to_[kv]")


class CrossAttention:
    """The layers of a UNet that make keys and values of the text.

    Args:
        unet: Its layers answer from what `begin` made if they are asked for the same text, else on their own.
    """

    def __init__(self, unet: Any) -> None:
        named = [layer for name, layer in unet.named_modules() if _WANTED.fullmatch(name)]
        plain = [layer for layer in named if isinstance(layer, nn.Linear) and layer.bias is None]
        self._layers = [layer for layer in plain if layer.in_features == plain[0].in_features]
        self._weights = [layer.weight for layer in self._layers]
        self._sizes = [len(weight) for weight in self._weights]
        self._changes: list[Change] = []
        self._ranks: list[int] = []
        self._scales = torch.empty(0)
        self._text: Tensor | None = None
        self._made: tuple[Tensor, ...] = ()
        self._joined = torch.empty(0)
        if self._layers:
            self._joined = torch.cat([weight.detach() for weight in self._weights])
            for weight, piece in zip(self._weights, torch.split(self._joined, self._sizes), strict=True):
                weight.data = piece  # the same memory: nothing is kept twice
        for index, layer in enumerate(self._layers):
            layer.forward = partial(self._forward, index, layer.forward)

    def learn(self, changes: Iterable[Change]) -> None:
        """Also make the first halves of these LoRAs at once, as far as they are plain ones on these layers."""
        self._changes = [change for change in changes if change.is_plain and change.layer in self._layers]
        self._ranks = [change.form.rank for change in self._changes]
        scales = [change.form.scale for change in self._changes for _ in range(change.form.rank)]
        self._scales = torch.tensor(scales).to(self._joined)

    def leave(self) -> None:
        """Make nothing any more: the layers read another text than the model's."""
        self._layers = []

    def begin(self, text: Tensor) -> None:
        """Make everything for a text; nothing where a layer computes with another weight, because it learns."""
        self._text = None
        if not self._layers or any(
            layer.weight is not weight for layer, weight in zip(self._layers, self._weights, strict=True)
        ):
            return
        self._text, self._made = text, torch.split(functional.linear(text, self._joined), self._sizes, dim=-1)
        if self._changes:
            downs = torch.cat([change.parts["down"] for change in self._changes])
            inner = functional.linear(text, downs) * self._scales
            for change, piece in zip(self._changes, torch.split(inner, self._ranks, dim=-1), strict=True):
                change.made = text, piece

    def _forward(self, index: int, plain: Any, x: Tensor) -> Tensor:
        found: Tensor = self._made[index] if x is self._text else plain(x)
        return found
