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
from sdops.training.kernels import LoraLinear


@dataclass(frozen=True)
class Form:
    """How a layer is changed.

    Attributes:
        family: lora, loha or lokr.
        rank: Of it.
        lora_alpha: The change is scaled by this / rank, or / sqrt(rank).
        use_rslora: Whether the root is taken.
        dora: Whether lengths are learnt apart.
        dropout: Share of the inputs that the adapter does not see.
        factor: LoKr: largest size of the small factor.
    """

    family: str
    rank: int
    lora_alpha: float
    use_rslora: bool = False
    dora: bool = False
    dropout: float = 0.0
    factor: int = 8

    @property
    def scale(self) -> float:
        """alpha / r or alpha / sqrt(r)."""
        return self.lora_alpha / (sqrt(self.rank) if self.use_rslora else self.rank)


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

    def remove(self) -> None:
        """Give the layer back as it was."""
        self.layer.forward = self._plain

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
        shape = tuple(self.layer.weight.shape)
        drawn = _Draws(seed, self.key)
        made = {"lora": _lora, "loha": _loha, "lokr": _lokr}[self.form.family](shape, self.form, drawn)
        if self.form.dora:
            weight = self.layer.weight.detach().float().cpu()
            norms = torch.linalg.vector_norm(weight.flatten(1), dim=1)
            made["dora_scale"] = norms.view(-1, *[1] * (len(shape) - 1))
        return made

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


class _Draws:
    """Random numbers that depend on the seed, the layer and the part, and on nothing else."""

    def __init__(self, seed: int, key: str) -> None:
        self._seed, self._key = seed, key

    def uniform(self, part: str, *shape: int) -> Tensor:
        """Between -1 / sqrt(inputs) and 1 / sqrt(inputs): Kaiming's with a = sqrt(5), as LoRA's `down` begins."""
        values = Noise(self._seed, f"{self._key}.{part}").uniform(0, torch.empty(shape))
        return (values * 2 - 1) / sqrt(prod(shape[1:]))

    def normal(self, part: str, deviation: float, *shape: int) -> Tensor:
        """Normal numbers."""
        return Noise(self._seed, f"{self._key}.{part}").normal(0, torch.empty(shape)) * deviation


def _lora(shape: tuple[int, ...], form: Form, draws: _Draws) -> dict[str, Tensor]:
    ones = [1] * (len(shape) - 2)
    return {
        "up": torch.zeros(shape[0], form.rank, *ones),
        "down": draws.uniform("down", form.rank, *shape[1:]),
    }


def _loha(shape: tuple[int, ...], form: Form, draws: _Draws) -> dict[str, Tensor]:
    """As LyCORIS begins: one of the four is zero."""
    columns = prod(shape[1:])
    return {
        "w1_a": draws.normal("w1_a", 0.1, shape[0], form.rank),
        "w1_b": draws.normal("w1_b", 1.0, form.rank, columns),
        "w2_a": torch.zeros(shape[0], form.rank),
        "w2_b": draws.normal("w2_b", 1.0, form.rank, columns),
    }


def _lokr(shape: tuple[int, ...], form: Form, draws: _Draws) -> dict[str, Tensor]:
    """w1 [a, c], w2 [b, d k] in two factors, whole where the rank would not save anything."""
    rows, columns = _divisor(shape[0], form.factor), _divisor(shape[1], form.factor)
    tall, wide = shape[0] // rows, prod(shape[1:]) // columns
    first = {"w1": draws.uniform("w1", rows, columns)}
    if form.rank >= max(tall, shape[1] // columns) / 2:
        return first | {"w2": torch.zeros(tall, wide)}
    return first | {"w2_a": torch.zeros(tall, form.rank), "w2_b": draws.uniform("w2_b", form.rank, wide)}


def _divisor(size: int, most: int) -> int:
    """The largest divisor up to `most`."""
    return next(number for number in range(min(most, size), 0, -1) if size % number == 0)
