"""What hypernetworks do to the layers of a U-Net: changes of keys, values and the bias behind attention.

For the map c -> c + A c + b in front of keys and values, exactly:

    W_k' = W_k + W_k A_k          the offset W_k b_k adds one number per query to all logits of a row, and softmax
                                  does not see it
    W_v' = W_v + W_v A_v          attention's weights add up to 1, so the offset passes through as W_v b_v, and
    b_out' = b_out + W_out W_v b_v     the layer behind, which has a bias, takes it up

Layers are told by their names, which LDM, SGM and diffusers spell alike behind the block.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from sdops.core.source import Source
from sdops.errors import MismatchError
from sdops.verbs._adapter_source import values_of
from sdops.verbs._hypernet_chain import Affine, affine_of, check_evaluable, composed, fitted
from sdops.verbs._hypernet_open import Doubles, HypernetFile
from sdops.verbs._inputs import Opened

if TYPE_CHECKING:
    from sdops.core.applied import Weights

_KEYS = re.compile(r"(?P<block>(?P<outer>.*\.)attn(?P<number>[12]))\.to_k\.weight")
_SAMPLES = 4  # contexts per number of a context's width, for fits

Networks = Sequence[tuple[HypernetFile, float]]  # with their strengths, in the order in which they act
Read = Callable[[str], Doubles]  # tensor -> its values


@dataclass(frozen=True, slots=True)
class Attention:
    """One attention of a U-Net.

    Attributes:
        block: Its name, e.g. `...transformer_blocks.0.attn2`.
        outer: The same without `attn2`, where its norms are.
        is_cross: Whether its context is text.
        width: Of its context.
        has_bias: Whether the layer behind it has a bias.
    """

    block: str
    outer: str
    is_cross: bool
    width: int
    has_bias: bool

    @property
    def keys(self) -> str:
        """The weight of the keys."""
        return f"{self.block}.to_k.weight"

    @property
    def values(self) -> str:
        """The weight of the values."""
        return f"{self.block}.to_v.weight"

    @property
    def out(self) -> str:
        """The layer behind, without `.weight` or `.bias`."""
        return f"{self.block}.to_out.0"


@dataclass(frozen=True, slots=True)
class Maps:
    """What networks do at one width: to the contexts of keys and of values."""

    k: Affine
    v: Affine


def attentions(model: Opened) -> list[Attention]:
    """All attentions of a U-Net.

    Raises:
        MismatchError: it has none that hypernetworks act on.
    """
    specs = model.source.specs
    found = [
        Attention(
            match["block"], match["outer"], match["number"] == "2", specs[key].shape[1],
            f"{match['block']}.to_out.0.bias" in specs,
        )
        for key in specs
        if (match := _KEYS.fullmatch(key)) and len(specs[key].shape) == 2 and f"{match['block']}.to_v.weight" in specs
    ]  # fmt: skip
    if not found:
        raise MismatchError(
            f"`{model.name}` ({model.detection.title}) has no attention that hypernetworks act on",
            hint="they are for the U-Nets of SD1, SD2 and SDXL",
        )
    return found


def reached(found: Sequence[Attention], networks: Networks, model: Opened) -> list[Attention]:
    """Those whose contexts have a width that a network is for.

    Raises:
        MismatchError: there is none, or one whose layers do not fit each other.
    """
    widths = {width for file, _ in networks for width in file.network.pairs}
    hit = [each for each in found if each.width in widths]
    if not hit:
        own = ", ".join(map(str, sorted({each.width for each in found})))
        raise MismatchError(
            f"the hypernetwork is for contexts of {', '.join(map(str, sorted(widths)))}, those of `{model.name}` "
            f"({model.detection.title}) are {own} wide",
            hint="give a model of the family that it was trained on",
        )
    for each in hit:
        _check_shapes(each, model)
    return hit


def _check_shapes(each: Attention, model: Opened) -> None:
    """Refuse values with another context than the keys', and a layer behind them that does not take them.

    Raises:
        MismatchError: names the layers and their shapes.
    """
    names = [each.keys, each.values, *([f"{each.out}.weight"] if each.has_bias else [])]
    shapes = [model.source.specs[name].shape if name in model.source.specs else () for name in names]
    fits = len(shapes[1]) == 2 and shapes[1][1] == each.width
    if not fits or (each.has_bias and shapes[2][1:2] != shapes[1][:1]):
        told = ", ".join(f"`{name}` {list(shape)}" for name, shape in zip(names, shapes, strict=True))
        raise MismatchError(
            f"layers of `{model.name}` do not fit each other: {told}",
            hint="it is damaged, or put together of two models; use a whole one",
        )


def maps_of(
    networks: Networks, found: Sequence[Attention], contexts: Callable[[int], Doubles] | None
) -> dict[int, Maps]:
    """Width -> what the networks do there: exact where all are linear, else fitted.

    Args:
        networks: In order.
        found: The attentions that they reach.
        contexts: Gives samples [n, width] for fits; None refuses them.

    Raises:
        MismatchError: a network is not linear, and fits are not wanted.
        FormatError: a network's meaning is not known, or it holds NaN.
    """
    for file, _ in networks:
        check_evaluable(file)
    maps = {}
    for width in sorted({each.width for each in found}):
        here = [(file, strength) for file, strength in networks if width in file.network.pairs]
        if all(file.network.is_linear for file, _ in here):
            k, v = (composed([(affine_of(f.values(width, which)), s) for f, s in here]) for which in "kv")
        elif contexts is None:
            raise _not_linear(next(file for file, _ in here if not file.network.is_linear))
        else:
            samples = contexts(width)
            k, v = (fitted(here, width, which, samples) for which in "kv")
        maps[width] = Maps(k, v)
    return maps


def _not_linear(file: HypernetFile) -> MismatchError:
    network = file.network
    why = f"the activation `{network.activation}`" if network.activation else "layer norms"
    return MismatchError(
        f"`{file.path}` is not linear: it has {why}, so no weights do what it does",
        hint="`--fit` takes the nearest linear map on the model's own contexts and says how near it is",
    )


def key_change(each: Attention, maps: Mapping[int, Maps], read: Read) -> Doubles:
    """W_k A_k."""
    return read(each.keys) @ maps[each.width].k.matrix


def value_change(each: Attention, maps: Mapping[int, Maps], read: Read) -> Doubles:
    """W_v A_v."""
    return read(each.values) @ maps[each.width].v.matrix


def bias_change(each: Attention, maps: Mapping[int, Maps], read: Read) -> Doubles:
    """W_out W_v b_v."""
    weight = read(f"{each.out}.weight")
    return weight.reshape(len(weight), -1) @ (read(each.values) @ maps[each.width].v.offset)


def check_biases(found: Sequence[Attention], maps: Mapping[int, Maps], model: Opened) -> None:
    """Refuse offsets that no tensor can take up.

    Raises:
        MismatchError: an attention has no bias behind it.
    """
    bare = [each for each in found if not each.has_bias and maps[each.width].v.offset.any()]
    if bare:
        raise MismatchError(
            f"the hypernetwork adds a constant to the values, and `{bare[0].out}` of `{model.name}` has no bias for it",
            hint="the U-Nets of SD1, SD2 and SDXL have one; `sdops inspect` shows what the model is",
        )


def reader(source: Source) -> Read:
    """The values of a Source's tensors, float64, in their shapes."""
    return lambda key: values_of(source, key).reshape(source.specs[key].shape)


def of_weights(weights: Weights) -> Read:
    """The same of the weights that core.applied hands out."""
    return lambda key: weights(key).astype(np.float64)


def contexts_of(model: Opened, found: Sequence[Attention]) -> Callable[[int], Doubles]:
    """Samples of what the attentions of a width see, from the model itself.

    Text: what its text encoders make of captions. Pictures: the norm in front of attention gives every number its own
    mean and spread, so Gaussian numbers with these.

    Raises:
        MismatchError: when called for text, and the model has no text encoder.
    """

    def samples(width: int) -> Doubles:
        random = np.random.default_rng(width)
        here = [each for each in found if each.width == width]
        pictures = [each for each in here if not each.is_cross]
        count = max(_SAMPLES * width, 4096)
        parts = []
        if len(pictures) < len(here):
            from sdops.verbs._clip_text import sampled_contexts  # torch

            parts.append(sampled_contexts(model, width, count))
        read = reader(model.source)
        for each in pictures:
            scale, shift = read(f"{each.outer}norm1.weight"), read(f"{each.outer}norm1.bias")
            parts.append(random.standard_normal((-(-count // len(pictures)), width)) * scale + shift)
        together = np.concatenate(parts)
        return together[random.permutation(len(together))]

    return samples
