"""Texts to tokens, with new words in them. No torch."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from sdops.pipelines.clip_words import clip_words

START, END = 49406, 49407
LENGTH = 77  # tokens that CLIP reads
CHUNK = LENGTH - 2  # of them a text's own; begin and end are the others
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
        return [number for unit in self._units(text) for number in unit]

    def rows(self, texts: Sequence[str], pad: int, chunks: int = 1, least: int = 1) -> list[list[int]]:
        """What an encoder reads of texts: begin, 75 tokens, end, again and again; all rows are as long as the longest.

        Longer texts are read in chunks of 75 tokens, as the web UIs do it; the vectors of a new word stay in one.

        Args:
            texts: Which.
            pad: Token that fills up a chunk.
            chunks: At most so many; the rest of a text is cut off.
            least: At least so many; those that a text does not need are empty.
        """
        cut = [self._chunks(text)[:chunks] for text in texts]
        number = max(least, *(len(each) for each in cut))
        return [[token for chunk in self._filled(each, number, pad) for token in chunk] for each in cut]

    def _filled(self, chunks: list[list[int]], number: int, pad: int) -> list[list[int]]:
        whole = chunks + [[]] * (number - len(chunks))
        return [[START, *chunk, END, *[pad] * (CHUNK - len(chunk))] for chunk in whole]

    def _chunks(self, text: str) -> list[list[int]]:
        """The tokens of a text, at most 75 together; one chunk even if there are none."""
        found: list[list[int]] = [[]]
        for unit in self._units(text):
            if len(found[-1]) + len(unit) > CHUNK:
                found.append([])
            found[-1] += unit
        return found

    def _units(self, text: str) -> list[list[int]]:
        """Tokens that are not torn apart: those of a new word together, others alone."""
        parts = self._pattern.split(text) if self._pattern else [text]
        found: list[list[int]] = []
        for part in parts:
            found += [self._ids[part]] if part in self._ids else [[number] for number in clip_words().numbers(part)]
        return found

    def names(self, text: str) -> list[str]:
        """New words that a text has."""
        return self._pattern.findall(text) if self._pattern else []
