"""Hidden units of Stable Diffusion models that may be renumbered without changing what the model computes.

A renumbering is free where an inner dimension begins in one layer and ends in another, and nothing else sees it:

    feed-forward of a UNet transformer   rows of net.0.proj (both halves of GEGLU: value and gate) and columns of net.2
    feed-forward of a text encoder       rows of fc1 and columns of fc2
    attention                            within a head the dimensions of q and k together, and those of v and the output
                                         together; and whole heads
    residual block of a UNet             rows of in_layers.2 and emb_layers.1, the scale and shift of out_layers.0,
                                         columns of out_layers.3. out_layers.0 normalises 32 groups of neighbouring
                                         channels, so channels move within a group, or a group as a whole

Not covered: the VAE, and attention whose q, k and v lie in one tensor (OpenCLIP). The residual stream, which all layers
add to, is not renumbered: skip connections tie it together across the model. So these groups of units do not share a
dimension, and each can be matched on its own, exactly, in one step.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

NORM_GROUPS = 32
HEAD_SIZE = 64  # SD2, SDXL, CLIP
SD1_HEADS = 8
SD1_CONTEXT = 768


@dataclass(frozen=True)
class Axis:
    """Where units lie in a tensor: along `dim`, `copies` times one after the other."""

    key: str
    dim: int = 0
    copies: int = 1


@dataclass(frozen=True)
class Units:
    """Units that are renumbered together.

    Attributes:
        parts: Dimensions with renumberings of their own, each a tuple of the places where it occurs.
        blocks: Units stay within their block; the blocks of all parts together may be exchanged.
    """

    parts: tuple[tuple[Axis, ...], ...]
    blocks: int = 1


def find_units(keys: Sequence[str], shape: Callable[[str], Sequence[int]]) -> Iterator[Units]:
    """The groups of units whose tensors are all among the keys.

    Args:
        keys: Tensor names in the original (LDM) layout, text encoders in that of transformers.
        shape: The shape of a tensor.
    """
    known = frozenset(keys)
    for key in keys:
        for suffix, make in _KINDS.items():
            if key.endswith(suffix):
                units = make(key.removesuffix(suffix), known, shape)
                if units is not None and all(axis.key in known for part in units.parts for axis in part):
                    yield units


Maker = Callable[[str, frozenset[str], Callable[[str], Sequence[int]]], Units | None]


def _feed_forward(stem: str, known: frozenset[str], shape: Callable[[str], Sequence[int]]) -> Units | None:
    proj, last = f"{stem}.net.0.proj", f"{stem}.net.2.weight"
    if last not in known:
        return None
    copies = shape(f"{proj}.weight")[0] // shape(last)[1]  # GEGLU 2, GELU 1
    return Units(((Axis(f"{proj}.weight", copies=copies), Axis(f"{proj}.bias", copies=copies), Axis(last, 1)),))


def _mlp(stem: str, _known: frozenset[str], _shape: Callable[[str], Sequence[int]]) -> Units:
    return Units(((Axis(f"{stem}.mlp.fc1.weight"), Axis(f"{stem}.mlp.fc1.bias"), Axis(f"{stem}.mlp.fc2.weight", 1)),))


def _openclip_mlp(stem: str, _known: frozenset[str], _shape: Callable[[str], Sequence[int]]) -> Units:
    return Units(
        ((Axis(f"{stem}.mlp.c_fc.weight"), Axis(f"{stem}.mlp.c_fc.bias"), Axis(f"{stem}.mlp.c_proj.weight", 1)),)
    )


def _unet_attention(stem: str, known: frozenset[str], shape: Callable[[str], Sequence[int]]) -> Units | None:
    context = re.sub(r"\.attn1$", ".attn2", stem) + ".to_k.weight"
    others = {f"{stem}.to_q.bias", f"{stem}.norm_q.weight"}  # of transformers that treat q and k otherwise
    if not stem.endswith((".attn1", ".attn2")) or context not in known or others & known:
        return None
    width = shape(f"{stem}.to_q.weight")[0]
    heads = SD1_HEADS if shape(context)[1] == SD1_CONTEXT else width // HEAD_SIZE
    if not heads or width % heads:
        return None
    q, k, v = (Axis(f"{stem}.to_{name}.weight") for name in "qkv")
    return Units(((q, k), (v, Axis(f"{stem}.to_out.0.weight", 1))), heads)


def _clip_attention(stem: str, _known: frozenset[str], shape: Callable[[str], Sequence[int]]) -> Units | None:
    width = shape(f"{stem}.q_proj.weight")[0]
    if "text_model.encoder.layers." not in stem or width % HEAD_SIZE:
        return None
    q, k, v = ((Axis(f"{stem}.{name}_proj.weight"), Axis(f"{stem}.{name}_proj.bias")) for name in "qkv")
    return Units(((*q, *k), (*v, Axis(f"{stem}.out_proj.weight", 1))), width // HEAD_SIZE)


def _residual_block(stem: str, known: frozenset[str], shape: Callable[[str], Sequence[int]]) -> Units | None:
    channels, embedding = shape(f"{stem}.out_layers.3.weight")[1], f"{stem}.emb_layers.1.weight"
    if channels % NORM_GROUPS or embedding not in known or shape(embedding)[0] != channels:
        return None
    rows = ("in_layers.2", "emb_layers.1", "out_layers.0")
    axes = tuple(Axis(f"{stem}.{layer}.{part}") for layer in rows for part in ("weight", "bias"))
    return Units(((*axes, Axis(f"{stem}.out_layers.3.weight", 1)),), NORM_GROUPS)


_KINDS: dict[str, Maker] = {
    ".net.0.proj.weight": _feed_forward,
    ".mlp.fc1.weight": _mlp,
    ".mlp.c_fc.weight": _openclip_mlp,
    ".to_q.weight": _unet_attention,
    ".self_attn.q_proj.weight": lambda stem, known, shape: _clip_attention(f"{stem}.self_attn", known, shape),
    ".out_layers.3.weight": _residual_block,
}
