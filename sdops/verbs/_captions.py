"""Captions to look at a text encoder with, from CLIP's own vocabulary: the same ones always, without a data set."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from sdops.errors import FormatError
from sdops.pipelines.clip_words import clip_words

_TEMPLATES = (
    "photo of a {}", "a photo of a {} and a {}", "a {} {}", "painting of a {} in the style of {}",
    "a {} standing next to a {}, {}", "{} {} {} {}", "close up of {} with {}, {} {}", "the {} of a {} in {}",
)  # fmt: skip


def captions(count: int, seed: int = 0) -> list[str]:
    """So many short texts of common words: whole words of the vocabulary, its first ones, which are the commonest."""
    words = clip_words()
    common = [words.shown(number) for number in range(512, 12000) if words.is_word(number)]
    chance = np.random.default_rng(seed)
    texts = []
    for number in range(count):
        template = _TEMPLATES[number % len(_TEMPLATES)]
        texts.append(template.format(*(common[int(chance.integers(len(common)))] for _ in range(template.count("{}")))))
    return texts


def read_captions(path: Path) -> list[str]:
    """One a line.

    Raises:
        FormatError: the file has none, or is no text.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError:
        lines = []
    found = [line.strip() for line in lines if line.strip()]
    if not found:
        raise FormatError(f"`{path}` has no captions", hint="a text file with a caption on every line", path=path)
    return found
