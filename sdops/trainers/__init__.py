"""SHELF: training methods. One file is one method: what learns, what the loss is, what is saved. The loop is one.

Each file offers a class `Method`, made as `Method(model, config)`, with (`training.method` has the usual ones)

    parameters() -> list[Parameter]      what learns, with learning rates; those that learn alike stand together
    use(parts)                           put this step's tensors (in its dtype, with autograd) in their places
    loss(batch) -> Tensor                the loss of each sample, [B], already weighed by the noise step
    after_step(views)                    change the float32 values in place: norms of words; then those of the moving
                                         average, if there is one
    product(values) -> Product           what is saved, of float32 values on the CPU
    rate, decay                          usual learning rate of what it is named after, usual weight decay
    encodes                              whether the text has to be encoded in every step
    trains_text                          whether weights of text encoders learn
    words                                new word -> number of vectors

    begin(beginning)                     look at what there is, before the first step
    measure(views) -> float | None       what is measured in place of the loss with fixed noise, if anything
    findings(views) -> dict              numbers about the result, for the report
    decodes                              whether it paints pictures of its own
    repeats                              whether every step does the same work, so that a GPU can record and replay it

A method's file is called as its command, `_` for `-`. METHODS has its card, so that nobody loads torch to know its
help, what it saves, how many numbers learn, and what it refuses.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from sdops.errors import UsageError
from sdops.text import instead_of
from sdops.trainers import _cards as cards
from sdops.trainers._cards import CONCEPT, LAYERS, NETWORK, PAIRS, TEXTS, VECTOR, WORDS, Card

if TYPE_CHECKING:
    from sdops.training.method import Method

METHODS = {
    "lora": Card("Train a LoRA, LoHa or LoKr, with DoRA if wanted", LAYERS, cards.of_layers),
    "ti": Card("Train new words (textual inversion)", WORDS, cards.of_words),
    "pivotal": Card(
        "Train new words, and a LoRA around them (pivotal tuning)", LAYERS, cards.of_layers_and_words
    ),
    "dreamartist": Card("Train a new word and its negative together (DreamArtist)", PAIRS, cards.of_pairs),
    "custom-diffusion": Card(
        "Train keys and values of cross-attention and a new word (custom diffusion)", CONCEPT, cards.of_keys_and_words
    ),
    "dreambooth": Card(
        "Train the whole UNet, with pictures of the class to keep it (DreamBooth)", LAYERS, cards.of_model
    ),
    "hypernetwork": Card("Train small networks before keys and values (hypernetwork)", NETWORK, cards.of_networks),
    "null-text": Card(
        "Learn texts that lead back to one picture (null-text inversion)", TEXTS, cards.of_null_texts, cards.one_picture
    ),
    "aesthetic": Card(
        "Pull the text encoder towards pictures (aesthetic gradients)", VECTOR, cards.of_first_encoder,
        cards.with_image_encoder,
    ),
}  # fmt: skip


def check_method(name: str) -> None:
    """Refuse a method that does not exist.

    Raises:
        UsageError: there is none of that name.
    """
    if name not in METHODS:
        raise UsageError(f"there is no training method `{name}`", hint=instead_of(name, METHODS))


def trainer(name: str) -> type[Method]:
    """The class of a method.

    Raises:
        UsageError: there is none of that name.
    """
    check_method(name)
    found: type[Method] = import_module(f"{__name__}.{name.replace('-', '_')}").Method
    return found
