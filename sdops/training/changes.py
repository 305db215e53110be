"""Layers with an adapter on top: y = layer(x) + x delta^T, where delta is a LoRA, LoHa or LoKr, maybe with DoRA.

What a family's parts mean is the adapters shelf's business: its `delta` is differentiable. Plain LoRA takes the short
way, S = x down^T, y += scale S up^T, which never makes the matrix. The layer's own weight stays as it is and is not
merged: in half precision the sum would round the change away while it is small.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod, sqrt
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from sdops import adapters
from sdops.core.noise import Noise
from sdops.training.forms import DORA, ZERO, Form
from sdops.training.kernels import LoraLinear


@dataclass(eq=False)
class Change:
    """The adapter of one layer.

    Attributes:
        component: `unet` or an encoder.
        name: The module, as diffusers or transformers call it.
        layer: Its Linear or Conv2d; calls of it go through here once it is installed.
        form: How it is changed.
        parts: What a step computes with, set by the trainer.
        made: An input x of this step and s x down^T, where that was made for many layers at once.
    """

    component: str
    name: str
    layer: Any
    form: Form
    parts: Mapping[str, Tensor] = field(default_factory=dict)
    made: tuple[Tensor, Tensor] | None = None

    def install(self, kernel: LoraLinear | None = None) -> None:
        """Let the layer compute with its change; plain LoRAs on Linear layers by the kernel, if there is one."""
        self._plain = self.layer.forward
        self._kernel = kernel if self.is_plain and isinstance(self.layer, nn.Linear) else None
        self.layer.forward = self._forward

    @property
    def is_plain(self) -> bool:
        """Whether it is a LoRA that sees all of its input and nothing of the weight."""
        return self.form.family == "lora" and not self.form.dora and not self.form.dropout

    @property
    def key(self) -> str:
        """Names its parts in the buffer."""
        return f"{self.component}:{self.name}"

    def initial(self, seed: int) -> dict[str, Tensor]:
        """The parts at the start, float32: they change nothing."""
        shapes = self.form.shapes(tuple(self.layer.weight.shape))
        return {part: self._initial(seed, part, shape) for part, shape in shapes.items()}

    def _initial(self, seed: int, part: str, shape: tuple[int, ...]) -> Tensor:
        """LoRA's `down` and LoKr's factors uniform, as Kaiming's with a = sqrt(5), LoHa's as LyCORIS has them."""
        if part == DORA:
            weight = self.layer.weight.detach().float().cpu()
            lengths: Tensor = torch.linalg.vector_norm(weight.flatten(1), dim=1)
            return lengths.view(shape)
        if part in ZERO[self.form.family]:
            return torch.zeros(shape)
        draws = Noise(seed, f"{self.key}.{part}")
        if self.form.family == "loha":
            return draws.normal(0, torch.empty(shape)) * (0.1 if part == "w1_a" else 1.0)
        return (draws.uniform(0, torch.empty(shape)) * 2 - 1) / sqrt(prod(shape[1:]))

    def _forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        is_made = self.made is not None and self.made[0] is x
        if self._kernel is not None and not is_made:
            return self._kernel(x, self.layer, self.parts["down"], self.parts["up"], self.form.scale)
        y: Tensor = self._plain(x, *args, **kwargs)
        drops = self.form.dropout and torch.is_grad_enabled()  # not while the loss is only measured
        seen = functional.dropout(x, self.form.dropout) if drops else x
        if self.form.family == "lora" and not self.form.dora:
            return y + self._low_rank(seen)
        return y + self._through(seen, self._delta().to(x.dtype))

    def _low_rank(self, x: Tensor) -> Tensor:
        down, up = self.parts["down"], self.parts["up"]
        if isinstance(self.layer, nn.Linear):
            if self.made is not None and self.made[0] is x:
                return functional.linear(self.made[1], up)
            return functional.linear(functional.linear(x, down) * self.form.scale, up)
        return functional.conv2d(self._through(x, down) * self.form.scale, up)

    def _through(self, x: Tensor, weight: Tensor) -> Tensor:
        """As the layer, but with another weight and without its bias."""
        if isinstance(self.layer, nn.Linear):
            return functional.linear(x, weight)
        layer = self.layer
        return functional.conv2d(x, weight, None, layer.stride, layer.padding, layer.dilation, layer.groups)

    def _delta(self) -> Tensor:
        weight = self.layer.weight.detach()
        return adapters.family(self.form.family).delta(
            self.parts,
            tuple(weight.shape),
            weight if self.form.dora else None,
            lora_alpha=self.form.lora_alpha,
            use_rslora=self.form.use_rslora,
        )
