"""Texts to tokens, with new words in them. No torch."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from sdops.pipelines.clip_words import clip_words

START, END = 49406, 49407
LENGTH = 77  # tokens that CLIP reads
VOCABULARY = 49408


class Tokens:
    """Texts to tokens, with new words in them.

    Args:
        words: New word -> how many vectors it has.
        size: V, of the vocabulary.
    """

    def __init__(self, words: Mapping[str, int], size: int) -> None:
        self._ids: dict[str, list[int]] = {}
        for word, count in words.items():
            first = size + sum(len(ids) for ids in self._ids.values())
            self._ids[word] = list(range(first, first + count))
        longest_first = sorted(self._ids, key=len, reverse=True)
        joined = "|".join(re.escape(word) for word in longest_first)
        self._pattern = re.compile(rf"(?<!\w)({joined})(?!\w)") if joined else None

    def of(self, text: str) -> list[int]:
        """The tokens of a text, without the marks of begin and end."""
        parts = self._pattern.split(text) if self._pattern else [text]
        found: list[int] = []
        for part in parts:
            found += self._ids[part] if part in self._ids else clip_words().numbers(part)
        return found

    def row(self, text: str, pad: int, length: int = LENGTH) -> list[int]:
        """What an encoder reads: begin, the text as far as it fits, end, padding."""
        ids = [START, *self.of(text)[: length - 2], END]
        return ids + [pad] * (length - len(ids))

    def rows(self, texts: Sequence[str], pad: int, length: int = LENGTH) -> list[list[int]]:
        """Several texts."""
        return [self.row(text, pad, length) for text in texts]

    def names(self, text: str) -> list[str]:
        """New words that a text has."""
        return self._pattern.findall(text) if self._pattern else []
