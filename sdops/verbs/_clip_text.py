"""CLIP's text encoder, run from a checkpoint's tensors: what a U-Net gets to see of a text. torch.

    x = token + position;   x += W_o attention(norm1 x);   x += fc2 act(fc1 norm2 x)   per layer, causal;   final norm

SD1 uses the last layer of CLIP-L behind the final norm, SD2 the last but one of OpenCLIP-H behind it, SDXL the last
but one of CLIP-L and bigG, without the norm, side by side. Agrees with transformers' CLIPTextModel.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import gelu, layer_norm, linear, scaled_dot_product_attention

from sdops.core.assembled import Assembled, joined, rows
from sdops.core.casting import raw_dtype
from sdops.core.precision import decode
from sdops.core.source import Source
from sdops.errors import MismatchError
from sdops.pipelines.clip_words import clip_words
from sdops.verbs._adapter_source import values_of
from sdops.verbs._captions import captions
from sdops.verbs._extract_pairs import canonical
from sdops.verbs._hypernet_open import Doubles
from sdops.verbs._inputs import Opened

BEGIN, END, PLACES = 49406, 49407, 77
_HEAD = 64  # numbers of an attention head in all of CLIP's encoders
_BATCH = 16
_PADDING = {"clip_h": 0, "clip_g": 0}  # behind the end of a text; CLIP-L repeats the mark of the end
_LAYERS = "text_model.encoder.layers."
# Family -> encoders, whether the last layer is left out, whether the final norm follows.
_USES = {
    "sd1": (("clip_l",), False, True),
    "sd2": (("clip_h",), True, True),
    "sdxl": (("clip_l", "clip_g"), True, False),
    "sdxl_refiner": (("clip_g",), True, False),
}

Function = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class TextEncoder:
    """One encoder.

    Attributes:
        source: Its tensors under Hugging Face's names.
        is_quick: Whether it has CLIP-L's approximation of gelu.
        depth: Layers that are run.
        is_normed: Whether the final norm follows.
    """

    source: Source
    is_quick: bool
    depth: int
    is_normed: bool

    @property
    def width(self) -> int:
        """Numbers of a token."""
        return self.source.specs["text_model.embeddings.token_embedding.weight"].shape[1]

    def __call__(self, batches: Sequence[Tensor]) -> list[Tensor]:
        """Token vectors, each [n, places, width] -> features of the same shapes, float32; every layer is read once."""
        positions = self._tensor("text_model.embeddings.position_embedding.weight")
        found = [batch + positions[: batch.shape[1]] for batch in batches]
        for number in range(self.depth):
            layer = self._layer(f"{_LAYERS}{number}.")
            found = [layer(x) for x in found]
        if self.is_normed:
            final = self._norm("text_model.final_layer_norm")
            found = [final(x) for x in found]
        return found

    def vectors(self, numbers: Iterable[int]) -> dict[int, Tensor]:
        """Those of some words [width] by number."""
        key = "text_model.embeddings.token_embedding.weight"
        spec = self.source.specs[key]
        size = spec.nbytes // spec.shape[0]
        found = {}
        for number in set(numbers):
            row = bytearray(size)
            self.source.read_into(key, number * size, memoryview(row))
            values = decode(np.frombuffer(row, raw_dtype(spec.dtype)), spec.dtype)
            found[number] = torch.from_numpy(values.astype(np.float32))
        return found

    def _layer(self, name: str) -> Function:
        """One transformer layer."""
        norms = [self._norm(f"{name}layer_norm{number}") for number in (1, 2)]
        q, k, v, out = (self._linear(f"{name}self_attn.{part}_proj") for part in ("q", "k", "v", "out"))
        fc1, fc2 = self._linear(name + "mlp.fc1"), self._linear(name + "mlp.fc2")
        head = min(_HEAD, self.width)

        def run(x: Tensor) -> Tensor:
            normed = norms[0](x)
            heads = [part(normed).reshape(*x.shape[:2], -1, head).transpose(1, 2) for part in (q, k, v)]
            mixed = scaled_dot_product_attention(
                heads[0], heads[1], heads[2], is_causal=True
            )  # [n, heads, places, head]
            x = x + out(mixed.transpose(1, 2).flatten(2))
            inner = fc1(norms[1](x))
            return x + fc2(inner * torch.sigmoid(1.702 * inner) if self.is_quick else gelu(inner))

        return run

    def _norm(self, name: str) -> Function:
        weight, bias = self._tensor(f"{name}.weight"), self._tensor(f"{name}.bias")
        return lambda x: layer_norm(x, x.shape[-1:], weight, bias)

    def _linear(self, name: str) -> Function:
        weight, bias = self._tensor(f"{name}.weight"), self._tensor(f"{name}.bias")
        return lambda x: linear(x, weight, bias)

    def _tensor(self, key: str) -> Tensor:
        return torch.from_numpy(values_of(self.source, key)).float().reshape(self.source.specs[key].shape)


def encoders(model: Opened) -> dict[str, TextEncoder]:
    """The text encoders of a model as its U-Net uses them, in the order of its contexts.

    Raises:
        MismatchError: the model is none that is known, or lacks one.
    """
    family = model.detection.family
    if family not in _USES:
        raise MismatchError(
            f"how `{model.name}` ({model.detection.title}) reads texts is not known here",
            hint="give a whole checkpoint of SD1, SD2 or SDXL",
        )
    names, skips_last, is_normed = _USES[family]
    found = {}
    for name in names:
        source = _source(model, name)
        numbers = [int(key.removeprefix(_LAYERS).split(".")[0]) for key in source.specs if key.startswith(_LAYERS)]
        # OpenCLIP-H in diffusers' form lacks the layer that is not used.
        is_short = name == "clip_h" and max(numbers) == 22
        depth = max(numbers) + 1 - (skips_last and not is_short)
        found[name] = TextEncoder(source, name == "clip_l", depth, is_normed)
    return found


def encoders_of(model: Opened, width: int) -> dict[str, TextEncoder]:
    """The same, of a model whose texts have a width.

    Raises:
        MismatchError: they have another one, or as of `encoders`.
    """
    found = encoders(model)
    own = sum(encoder.width for encoder in found.values())
    if own != width:
        raise MismatchError(
            f"texts of `{model.name}` are {own} numbers wide, not {width}", hint="`sdops inspect` shows what it is"
        )
    return found


def _source(model: Opened, name: str) -> Assembled:
    component = model.detection.component(name)
    if component is None:
        raise MismatchError(
            f"`{model.name}` has no text encoder ({name}), and what it makes of texts is needed",
            hint="give a whole checkpoint, not the U-Net alone",
        )
    made = {}
    for key, parts in canonical(model, component).items():
        tensors = [rows(model.source, part.key, part.share, part.operation) for part in parts]
        made[key] = joined(tensors) if len(tensors) > 1 else tensors[0]
    return Assembled(model.name, made, {})


@dataclass(frozen=True, slots=True)
class Text:
    """A text as tokens.

    Attributes:
        numbers: With the marks of begin and end; new words have numbers behind the vocabulary's.
        new: Numbers of new words -> for each encoder their vector.
    """

    numbers: list[int]
    new: Mapping[int, Mapping[str, Tensor]]


def text_of(caption: str, words: Mapping[str, Sequence[Mapping[str, Tensor]]]) -> Text:
    """Tokens of a caption in which some words are new.

    Args:
        caption: The text.
        words: New word -> for each of its vectors, encoder -> vector [width].
    """
    numbers, new = [BEGIN], dict[int, Mapping[str, Tensor]]()
    rest = caption
    while rest:
        places = {word: rest.find(word) for word in words if word in rest}
        word = min(places, key=lambda name: (places[name], -len(name))) if places else ""
        before, rest = (rest[: places[word]], rest[places[word] + len(word) :]) if word else (rest, "")
        numbers += clip_words().numbers(before)
        for vector in words[word] if word else ():
            number = END + 1 + len(new)
            new[number] = vector
            numbers.append(number)
    return Text([*numbers[: PLACES - 1], END], new)


def features(encoders: Mapping[str, TextEncoder], texts: Sequence[Text], places: int | None = None) -> list[Tensor]:
    """What the encoders make of texts: for each [its tokens or `places`, width of all encoders together], float32.

    Attention is causal, so what follows a place does not change it and is left out.

    Args:
        encoders: Of a model.
        texts: Their tokens.
        places: Fill every text up to so many tokens with the mark of the end.
    """
    found: list[list[Tensor]] = [[] for _ in texts]
    with torch.no_grad():
        for name, encoder in encoders.items():
            words = encoder.vectors({n for text in texts for n in (*text.numbers, END, 0) if n <= END})
            batches = []
            for begin in range(0, len(texts), _BATCH):
                batch = texts[begin : begin + _BATCH]
                length = places or max(len(text.numbers) for text in batch)
                batches.append(torch.stack([_vectors(name, text, words, length) for text in batch]))
            rows = [row for out in encoder(batches) for row in out]
            for each, row, text in zip(found, rows, texts, strict=True):
                each.append(row[: places or len(text.numbers)])
    return [torch.cat(parts, dim=-1) for parts in found]


def _vectors(name: str, text: Text, words: Mapping[int, Tensor], length: int) -> Tensor:
    """Token vectors of one text [length, width]."""
    filled = text.numbers + [_PADDING.get(name, END)] * (length - len(text.numbers))
    return torch.stack([text.new[number][name] if number > END else words[number] for number in filled])


def sampled_contexts(model: Opened, width: int, count: int) -> Doubles:
    """At least `count` contexts [n, width] that a U-Net gets from captions.

    Raises:
        MismatchError: the model's texts have another width, or it has no text encoder.
    """
    found = encoders_of(model, width)
    texts = [text_of(caption, {}) for caption in captions(-(-count // PLACES))]
    contexts: Doubles = torch.cat(features(found, texts, PLACES)).double().numpy()
    return contexts
