"""Hypernetworks (Kurumuz 2022; AUTOMATIC1111/stable-diffusion-webui): small networks before keys and values.

    k = W_k (c + g_k(c))    v = W_v (c + g_v(c))    g = linear, activation, norm, dropout, and again, last a linear

One pair (g_k, g_v) for every width of attention's context c: text for cross-attention, the picture itself for
self-attention. Everything else stays as it is, the loss is the denoising one. Saved as the web UI saves them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from math import sqrt
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from sdops.core.noise import Noise
from sdops.trainers._networks import networks_of
from sdops.training import method
from sdops.training.config import Config
from sdops.training.model import Model
from sdops.training.parameters import Parameter
from sdops.training.product import Chain, Network, Product

_DEVIATION = 0.01  # of weights that begin `Normal`, and of norms
_ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "relu": functional.relu,
    "leakyrelu": functional.leaky_relu,
    "elu": functional.elu,
    "swish": functional.hardswish,  # so it is in the web UI
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "mish": functional.mish,
    "gelu": functional.gelu,
    "silu": functional.silu,
    "softsign": functional.softsign,
}


class Method(method.Method):
    """The networks' weights and biases."""

    rate = 1e-5
    decay = 0.01

    def __init__(self, model: Model, config: Config) -> None:
        super().__init__(model, config)
        layers = [
            (layer, which)
            for name, layer in model.unet.named_modules()
            for which in "kv"
            if name.endswith(f".to_{which}")
        ]
        self._networks = networks_of(config, {layer.in_features for layer, _ in layers})
        self._parts: dict[tuple[int, str], dict[str, Tensor]] = {}
        for layer, which in layers:
            if layer.in_features in self._networks.widths:
                layer.forward = partial(self._forward, layer.forward, layer.in_features, which)
        model.cross_attention.leave()

    def parameters(self) -> list[Parameter]:
        """All chains, keys before values, narrow before wide."""
        return [
            Parameter(key := f"{width}.{which}.{name}", self._initial(key, shape), self.lr, self.weight_decay)
            for width in self._networks.widths
            for which in "kv"
            for name, shape in self._networks.shapes(width).items()
        ]

    def use(self, parts: Mapping[str, Tensor]) -> None:
        """Give every chain its tensors."""
        self._parts = _by_chain(parts)

    def product(self, values: Mapping[str, Tensor]) -> Product:
        """The networks, with what the web UI wants to know of them."""
        chains = _by_chain(values)
        pairs = {width: (chains[width, "k"], chains[width, "v"]) for width in self._networks.widths}
        networks, config = self._networks, self.config
        structure = [int(share) if share == int(share) else share for share in networks.structure]
        settings: dict[str, Any] = {
            "layer_structure": structure,
            "activation_func": config.activation,
            "is_layer_norm": networks.has_norms,
            "weight_initialization": config.weight_init,
            "activate_output": networks.activates_output,
            "use_dropout": networks.dropout > 0,
            "dropout_structure": networks.shares,
            "last_layer_dropout": networks.shares[-2] > 0,
        }
        return Product(network=Network(pairs, settings))

    def _initial(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """Biases 0, weights as `weight_init` says, norms `Normal` whatever it says."""
        zeros = torch.zeros(shape)
        if name.endswith("bias"):
            return zeros
        draws = Noise(self.config.seed, f"hypernetwork {name}")
        deviation = _deviation(self.config.weight_init, shape)
        if self.config.weight_init.endswith("Uniform") and len(shape) == 2:
            return (draws.uniform(0, zeros) * 2 - 1) * sqrt(3) * deviation
        return draws.normal(0, zeros) * deviation

    def _forward(self, plain: Callable[[Tensor], Tensor], width: int, which: str, context: Tensor) -> Tensor:
        """A layer's keys or values."""
        return plain(context + self._chain(self._parts[width, which], context))

    def _chain(self, parts: Chain, x: Tensor) -> Tensor:
        """g(x)."""
        for index, (kind, layer) in enumerate(self._networks.modules()):
            if kind == "linear":
                x = functional.linear(x, parts[f"{index}.weight"], parts[f"{index}.bias"])
            elif kind == "activation":
                x = _ACTIVATIONS[self._networks.activation](x)
            elif kind == "norm":
                weight = parts[f"{index}.weight"]
                x = functional.layer_norm(x, weight.shape, weight, parts[f"{index}.bias"])
            elif torch.is_grad_enabled():  # not while the loss is only measured
                x = functional.dropout(x, self._networks.shares[layer + 1])
        return x


def _by_chain(parts: Mapping[str, Tensor]) -> dict[tuple[int, str], dict[str, Tensor]]:
    found: dict[tuple[int, str], dict[str, Tensor]] = {}
    for name, value in parts.items():
        width, which, rest = name.split(".", 2)
        found.setdefault((int(width), which), {})[rest] = value
    return found


def _deviation(way: str, shape: tuple[int, ...]) -> float:
    """Glorot and Bengio 2010: sqrt(2 / (in + out)); He et al. 2015: sqrt(2 / in)."""
    if way == "Normal" or len(shape) == 1:
        return _DEVIATION
    return sqrt(2 / sum(shape)) if way.startswith("Xavier") else sqrt(2 / shape[1])
