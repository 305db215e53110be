"""What is known of a training method without torch: its help, what it saves, and how many numbers learn."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

from sdops.errors import UsageError
from sdops.trainers._kinds import form_of, kind_of, ranks_of
from sdops.trainers._named import words_of
from sdops.trainers._networks import networks_of
from sdops.training.config import Config

if TYPE_CHECKING:
    from sdops.training.pictures import Picture

# Component -> its tensors, as diffusers and transformers call them -> shapes.
Shapes = Mapping[str, Mapping[str, tuple[int, ...]]]

LAYERS, WORDS, PAIRS, CONCEPT = "layers", "words", "pairs", "concept"
NETWORK, TEXTS, VECTOR = "network", "texts", "vector"
_CROSS = re.compile(r".*\.attn2\.to_[kv]\.weight")
_TABLE = "token_embedding.weight"
_PLACES = 77  # of a text


def _accept(config: Config, pictures: Sequence[Picture]) -> None:
    """Any settings and pictures."""


@dataclass(frozen=True, slots=True)
class Card:
    """A method's card.

    Attributes:
        help: One line for the list of commands.
        saves: `layers` (a LoRA-like file), `words` (embeddings), `pairs` (with negatives), `concept` (custom
            diffusion), `network` (a hypernetwork), `texts` (null texts) or `vector` (a CLIP image vector).
        numbers: Settings and shapes of the model -> how many numbers learn.
        check: Refuses settings and pictures that the method cannot use.
    """

    help: str
    saves: str
    numbers: Callable[[Config, Shapes], int]
    check: Callable[[Config, Sequence[Picture]], None] = _accept


def of_words(config: Config, shapes: Shapes) -> int:
    """Vectors of new words, for every encoder."""
    return sum(words_of(config).values()) * _width(shapes)


def of_pairs(config: Config, shapes: Shapes) -> int:
    """Vectors of new words and of their negatives."""
    words = words_of(config)
    return (sum(words.values()) + config.negative_vectors * len(words)) * _width(shapes)


def of_layers(config: Config, shapes: Shapes) -> int:
    """The parts of all adapters.

    Raises:
        UsageError: there are no such layers.
    """
    ranks, total = ranks_of(config), 0
    for component, tensors in shapes.items():
        for key, shape in tensors.items():
            name, _, end = key.rpartition(".")
            kind = kind_of(component, name, ranks) if end == "weight" and len(shape) in (2, 4) else None
            if kind is not None:
                total += sum(map(prod, form_of(config, ranks[kind]).shapes(shape).values()))
    if not total:
        raise UsageError(f"the model has no layers of {', '.join(ranks)}", hint="`attention`, `feedforward` ...")
    return total


def of_layers_and_words(config: Config, shapes: Shapes) -> int:
    """Both."""
    return of_layers(config, shapes) + of_words(config, shapes)


def of_keys_and_words(config: Config, shapes: Shapes) -> int:
    """Keys and values of cross-attention, and vectors."""
    keys = sum(prod(shape) for key, shape in shapes["unet"].items() if is_of_cross(key))
    return keys + of_words(config, shapes)


def of_model(config: Config, shapes: Shapes) -> int:
    """The UNet, and the text encoders without their vocabulary."""
    tensors = (
        (name, key, shape)
        for name, found in shapes.items()
        for key, shape in found.items()
        if name == "unet" or config.text_encoder
    )
    return sum(prod(shape) for name, key, shape in tensors if name == "unet" or is_of_text(key))


def of_first_encoder(config: Config, shapes: Shapes) -> int:
    """The first text encoder without its vocabulary."""
    del config
    first = next(name for name in shapes if name != "unet")
    return sum(prod(shape) for key, shape in shapes[first].items() if is_of_text(key))


def is_of_text(key: str) -> bool:
    """Whether a tensor of a text encoder learns: the vocabulary stays, new words are `train ti`'s."""
    return "embeddings." not in key and not key.startswith("text_projection")


def is_of_cross(key: str) -> bool:
    """Whether a tensor of the UNet makes keys or values of the text."""
    return _CROSS.fullmatch(key) is not None


def of_networks(config: Config, shapes: Shapes) -> int:
    """Networks for keys and values.

    Raises:
        UsageError: the model has no contexts of that width.
    """
    widths = {shape[1] for key, shape in shapes["unet"].items() if key.endswith(".to_k.weight")}
    plan = networks_of(config, widths)
    return 2 * sum(prod(shape) for width in plan.widths for shape in plan.shapes(width).values())


def of_null_texts(config: Config, shapes: Shapes) -> int:
    """A text per DDIM step."""
    return config.steps // config.inner_steps * _PLACES * _width(shapes)


def one_picture(config: Config, pictures: Sequence[Picture]) -> None:
    """Null-text inversion: one picture, and whole steps of DDIM.

    Raises:
        UsageError: there are more, or the steps do not come out even.
    """
    if len(pictures) != 1:
        raise UsageError(
            f"null-text inversion is for one picture, `{config.images}` has {len(pictures)}",
            hint="a folder with that picture alone, its prompt as caption beside it",
            key="images",
        )
    number, rest = divmod(config.steps, config.inner_steps)
    if rest or not 1 <= number <= 1000:
        raise UsageError(
            f"{config.steps} steps are not {config.inner_steps} (`inner_steps`) for each of 1 to 1000 steps of DDIM",
            hint=f"e.g. `--steps {50 * config.inner_steps}` for 50 steps of DDIM",
            key="steps",
        )


def with_image_encoder(config: Config, pictures: Sequence[Picture]) -> None:
    """Aesthetic gradients: the CLIP that looks at the pictures.

    Raises:
        UsageError: none is named, or there is none.
    """
    del pictures
    example = "`--image-encoder FOLDER`, e.g. a copy of openai/clip-vit-large-patch14 for SD1"
    if not config.image_encoder:
        raise UsageError("the CLIP that looks at the pictures is not named", hint=example, key="image_encoder")
    if not (Path(config.image_encoder) / "config.json").is_file():
        raise UsageError(f"`{config.image_encoder}` has no `config.json`, so it is no CLIP", hint=example)


def _width(shapes: Shapes) -> int:
    """Numbers of a word over all encoders."""
    return sum(shape[1] for encoder in shapes.values() for key, shape in encoder.items() if key.endswith(_TABLE))
