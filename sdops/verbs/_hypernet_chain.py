"""What the chains of hypernetworks compute: forward, as one affine map where they are linear, as the nearest one else.

    f(c) = c + m g(c)        g(c) = A c + b for a linear chain, A = W_n ... W_1

Several hypernetworks act one behind the other, f2(f1(c)), as the web UI applies them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import TYPE_CHECKING

import numpy as np

from sdops.errors import FormatError
from sdops.hypernetworks._types import Network
from sdops.text import suggest
from sdops.verbs._hypernet_open import Doubles, HypernetFile, Linear, misnumbered

if TYPE_CHECKING:
    from torch import Tensor

# The web UI's names that are not those of torch's classes in lower case, and all that act on each number alone.
_OTHER_NAMES = {"swish": "Hardswish"}
ELEMENTWISE = (
    "CELU", "ELU", "GELU", "Hardshrink", "Hardsigmoid", "Hardswish", "Hardtanh", "LeakyReLU", "LogSigmoid", "Mish",
    "ReLU", "ReLU6", "SELU", "SiLU", "Sigmoid", "Softplus", "Softshrink", "Softsign", "Tanh", "Tanhshrink",
)  # fmt: skip
_RIDGE = 1e-6  # of the mean variance: keeps the fit defined where samples leave directions out


@dataclass(frozen=True, slots=True)
class Affine:
    """x -> A x + b, what is added to a context.

    Attributes:
        matrix: A [d, d].
        offset: b [d].
        explained: R^2 on samples that were not used for the fit; 1 where it is exact.
    """

    matrix: Doubles
    offset: Doubles
    explained: float = 1.0


def check_evaluable(file: HypernetFile) -> None:
    """Refuse networks whose meaning is not known.

    Raises:
        FormatError: they are built in another way, or the activation is not known.
    """
    network = file.network
    if network.foreign:
        raise FormatError(
            f"`{file.path}` was made with {', '.join(f'`{name}`' for name in network.foreign)}: what it computes is "
            "not known here",
            hint="`sdops hypernet convert` still converts it",
        )
    if problem := misnumbered(network):
        raise FormatError(f"`{file.path}`: {problem}", hint="the settings of the file do not fit its layers")
    activation(network)


def activation(network: Network) -> str:
    """Name of torch's class for a network's activation; empty for none.

    Raises:
        FormatError: it is unknown.
    """
    if network.activation is None:
        return ""
    names = {name.lower(): name for name in ELEMENTWISE} | _OTHER_NAMES
    if network.activation not in names:
        close = suggest(network.activation, names)
        raise FormatError(
            f"the hypernetwork's activation `{network.activation}` is not known",
            hint=f"did its author mean `{close}`?" if close else f"known are {', '.join(sorted(names))}",
        )
    return names[network.activation]


def affine_of(chain: Sequence[Linear]) -> Affine:
    """A chain without activations and norms as one map."""
    matrix = reduce(lambda product, layer: layer.weight @ product, chain[1:], chain[0].weight)
    offset = reduce(lambda bias, layer: layer.weight @ bias + layer.bias, chain[1:], chain[0].bias)
    return Affine(matrix, offset)


def composed(maps: Sequence[tuple[Affine, float]]) -> Affine:
    """What several maps with their strengths add to a context together: f_n(... f_1(c)) - c."""
    matrix, offset = np.zeros_like(maps[0][0].matrix), np.zeros_like(maps[0][0].offset)
    for each, strength in maps:
        matrix = matrix + strength * (each.matrix + each.matrix @ matrix)
        offset = offset + strength * (each.matrix @ offset + each.offset)
    return Affine(matrix, offset)


def forward(network: Network, chain: Sequence[Linear]) -> Callable[[Tensor], Tensor]:
    """The chain as a function of contexts [n, d], float32."""
    import torch

    name = activation(network)
    act = getattr(torch.nn, name)() if name else None
    layers = [
        (torch.from_numpy(layer.weight).float(), torch.from_numpy(layer.bias).float(), layer.norm) for layer in chain
    ]

    def run(x: Tensor) -> Tensor:
        for index, (weight, bias, norm) in enumerate(layers):
            x = torch.nn.functional.linear(x, weight, bias)
            if act is not None and (index < len(layers) - 1 or network.activates_output):
                x = act(x)
            if norm is not None:
                scale, shift = (torch.from_numpy(part).float() for part in norm)
                x = torch.nn.functional.layer_norm(x, x.shape[-1:], scale, shift)
        return x

    return run


def fitted(networks: Sequence[tuple[HypernetFile, float]], width: int, which: str, contexts: Doubles) -> Affine:
    """The affine map nearest to what networks add to contexts [n, d], by least squares.

    A = Cov(g, c) Cov(c, c)^-1, b = E g - A E c, over four fifths of the contexts; R^2 over the last fifth.
    """
    import torch

    with torch.no_grad():
        x = torch.from_numpy(contexts).float()
        y = x
        for file, strength in networks:
            y = y + strength * forward(file.network, file.values(width, which))(y)
        x, y = x.double(), (y - x).double()
        split = len(x) * 4 // 5
        seen, target = x[:split], y[:split]
        mean, offset = seen.mean(dim=0), target.mean(dim=0)
        centred = seen - mean
        covariance = centred.T @ centred
        covariance.diagonal().add_(_RIDGE * float(covariance.diagonal().mean()))
        matrix = torch.linalg.solve(covariance, centred.T @ (target - offset)).T  # [d, d]
        bias = offset - matrix @ mean
        rest = y[split:] - (x[split:] @ matrix.T + bias)
        spread = y[split:] - y[split:].mean(dim=0)
        left = float(rest.square().sum() / spread.square().sum().clamp(min=1e-300))
    return Affine(matrix.numpy(), bias.numpy(), 1 - left)
