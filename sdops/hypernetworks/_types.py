"""What a hypernetwork is: for some widths of attention's context c, a network for the keys and one for the values.

    k = W_k f_k(c)    v = W_v f_v(c)    f(c) = c + m g(c)    g = a chain of layers: linear, activation, norm, dropout

m is the strength. A width (320, 640, 768 ...) means every attention of the U-Net whose context is that wide: text for
`attn2`, the picture itself for `attn1`. Queries are left alone. Source: AUTOMATIC1111/stable-diffusion-webui.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sdops.core.tree import Leaf
from sdops.errors import FormatError

LINEAR = (None, "linear", "identity")  # activations that are none
STRUCTURE = (1, 2, 1)  # where a file does not say
# Settings of an extension (aria1th/Hypernetwork-MonkeyPatch-Extension) whose networks are built in another way.
FOREIGN = ("skip_connection", "upsample_linear")


@dataclass(frozen=True, slots=True)
class Layer:
    """A linear layer y = W x + b, or the weights of a layer norm.

    Attributes:
        index: Its place in the chain, which counts activations and dropout, too.
        weight: [out, in]; of a norm [width].
        bias: [out] or [width]; None if it has none.
    """

    index: int
    weight: Leaf
    bias: Leaf | None

    @property
    def is_norm(self) -> bool:
        """Whether it is a layer norm."""
        return len(self.weight.spec.shape) == 1


Chain = tuple[Layer, ...]


@dataclass(frozen=True)
class Network:
    """A hypernetwork.

    Attributes:
        name: Its own, else that of the file.
        layout: That it was read in; a safetensors file remembers its origin's.
        pairs: Width of the context -> the chains for keys and for values.
        settings: Everything else that the file says, in its order.
        lost: Entries of the file that are neither plain values nor layers.
    """

    name: str
    layout: str
    pairs: Mapping[int, tuple[Chain, Chain]]
    settings: Mapping[str, Any] = field(default_factory=dict)
    lost: Sequence[str] = ()

    @property
    def structure(self) -> tuple[float, ...]:
        """Widths of the layers as multiples of the context's."""
        found = self.settings.get("layer_structure")
        return tuple(found) if type(found) is list and found else STRUCTURE

    @property
    def activation(self) -> str | None:
        """What stands between linear layers; None for nothing."""
        found = self.settings.get("activation_func")
        name = found.lower() if type(found) is str else None
        return None if name in LINEAR else name

    @property
    def activates_output(self) -> bool:
        """Whether the activation also stands behind the last linear layer: so it does where a file does not say."""
        return self.activation is not None and bool(self.settings.get("activate_output", True))

    @property
    def has_norms(self) -> bool:
        """Whether there are layer norms."""
        return any(layer.is_norm for pair in self.pairs.values() for chain in pair for layer in chain)

    @property
    def is_linear(self) -> bool:
        """Whether every chain is x -> A x + b."""
        return self.activation is None and not self.has_norms

    @property
    def foreign(self) -> list[str]:
        """Settings that are on and make it another kind of network."""
        return [name for name in FOREIGN if self.settings.get(name)]


@dataclass(frozen=True)
class Written:
    """A file to be.

    Attributes:
        tree: Plain values with Leafs; for safetensors names -> Leafs.
        metadata: For safetensors.
    """

    tree: Any
    metadata: Mapping[str, str] = field(default_factory=dict)


def chain(layers: Mapping[int, Mapping[str, Leaf]], where: str) -> Chain:
    """Layers in order, checked against each other.

    Args:
        layers: Place -> `weight` and maybe `bias`.
        where: For messages, e.g. `768 k`.

    Raises:
        FormatError: a layer lacks its weight, or two neighbours do not fit.
    """
    found: list[Layer] = []
    for index in sorted(layers):
        parts = layers[index]
        if "weight" not in parts:
            raise _broken(where, f"layer {index} has no weight")
        found.append(Layer(index, parts["weight"], parts.get("bias")))
    width = int(where.split()[0])
    for layer in found:
        shape = layer.weight.spec.shape
        bias = layer.bias.spec.shape if layer.bias is not None else shape[:1]
        if len(shape) not in (1, 2) or shape[-1] != width or bias != shape[:1] or not layer.weight.spec.is_float:
            raise _broken(where, f"layer {layer.index} is {list(shape)}, where {width} numbers come in")
        width = shape[0]
    if not found or found[0].is_norm or width != int(where.split()[0]):
        raise _broken(where, f"{width} numbers come out")
    return tuple(found)


def _broken(where: str, what: str) -> FormatError:
    return FormatError(
        f"the hypernetwork's chain `{where}` does not fit together: {what}",
        hint="the file is damaged; get it again from its author",
    )
