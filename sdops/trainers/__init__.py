"""SHELF: training methods. One file is one method: what learns, what the loss is, what is saved. The loop is one.

Each file offers a class `Method`, made as `Method(model, config)`, with (`training.method` has the usual ones)

    parameters() -> list[Parameter]      what learns, with learning rates; those that learn alike stand together
    use(parts)                           put this step's tensors (in its dtype, with autograd) in their places
    loss(batch) -> Tensor                the loss of each sample, [B], already weighed by the noise step
    after_step(views)                    change the float32 values in place: norms of words
    product(values) -> Product           what is saved, of float32 values on the CPU
    encodes                              whether the text has to be encoded in every step
    trains_text                          whether weights of text encoders learn
    words                                new word -> number of vectors

A method's file is called as its command, `_` for `-`; METHODS has its line for the help, so that no torch is loaded.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from sdops.errors import UsageError
from sdops.text import suggest

if TYPE_CHECKING:
    from sdops.training.method import Method

METHODS = {
    "lora": "Train a LoRA, LoHa or LoKr, with DoRA if wanted",
    "ti": "Train new words (textual inversion)",
    "pivotal": "Train new words, and a LoRA around them (pivotal tuning)",
    "dreamartist": "Train a new word and its negative together (DreamArtist)",
    "custom-diffusion": "Train keys and values of cross-attention and a new word (custom diffusion)",
    "dreambooth": "Train the whole UNet, with pictures of the class to keep it (DreamBooth)",
}


def check_method(name: str) -> None:
    """Refuse a method that does not exist.

    Raises:
        UsageError: there is none of that name.
    """
    if name not in METHODS:
        close = suggest(name, METHODS)
        hint = f"did you mean `{close}`?" if close else f"there are {', '.join(METHODS)}"
        raise UsageError(f"there is no training method `{name}`", hint=hint)


def trainer(name: str) -> type[Method]:
    """The class of a method.

    Raises:
        UsageError: there is none of that name.
    """
    check_method(name)
    found: type[Method] = import_module(f"{__name__}.{name.replace('-', '_')}").Method
    return found
