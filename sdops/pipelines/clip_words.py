"""CLIP's byte-pair encoding: texts to numbers of tokens, and numbers to what people can read. No dependency.

The merges come with this package (see `tokenizer`). SD1, SD2, SDXL, SD3 and Flux all use this one vocabulary.

    NFC and lower case; cut into 's 't 're 've 'm 'll 'd, runs of letters, single digits, runs of other signs; every
    piece's UTF-8 bytes become letters, the last one marked `</w>`; then the pair that is merged first is merged, again
    and again.

Source: openai/CLIP, simple_tokenizer.py; agrees with transformers' CLIPTokenizer.
"""

from __future__ import annotations

import gzip
import unicodedata
from collections.abc import Iterator
from functools import cache
from itertools import pairwise
from pathlib import Path

from sdops.pipelines.tokenizer import letters, vocabulary

END_OF_WORD = "</w>"
_ENDINGS = ("'s", "'t", "'re", "'ve", "'m", "'ll", "'d")
_MARKS = ("<|startoftext|>", "<|endoftext|>")


class ClipWords:
    """The vocabulary and its tokenizer.

    Attributes:
        tokens: All 49,408 as the vocabulary spells them, `</w>` at the end of words.
    """

    def __init__(self) -> None:
        merges = gzip.decompress((Path(__file__).parent / "clip_merges.txt.gz").read_bytes()).decode()
        self._numbers = vocabulary(merges)
        self.tokens = list(self._numbers)
        pairs = (tuple(line.split(" ", 1)) for line in merges.splitlines()[1:] if line)
        self._ranks = {pair: rank for rank, pair in enumerate(pairs)}
        self._letter_of = letters()
        self._byte_of = {letter: byte for byte, letter in self._letter_of.items()}
        self._known: dict[str, list[int]] = {}

    def numbers(self, text: str) -> list[int]:
        """The tokens of a text, without the marks of begin and end."""
        return [number for piece in _pieces(text) for number in self._piece(piece)]

    def number(self, token: str) -> int | None:
        """The token of that very spelling, e.g. `cat</w>`."""
        return self._numbers.get(token)

    def shown(self, number: int) -> str:
        """A token for people: `cat` for a word, `cat-` for a part that more must follow; bytes as escapes."""
        if not 0 <= number < len(self.tokens):
            return f"#{number}"
        token = self.tokens[number]
        if token in _MARKS:
            return token
        text = token.removesuffix(END_OF_WORD)
        plain = bytes(self._byte_of[letter] for letter in text).decode(errors="backslashreplace")
        return plain if token.endswith(END_OF_WORD) else f"{plain}-"

    def is_word(self, number: int) -> bool:
        """Whether it is a whole word of at least three plain letters."""
        if not 0 <= number < len(self.tokens) or not self.tokens[number].endswith(END_OF_WORD):
            return False
        text = self.tokens[number].removesuffix(END_OF_WORD)
        return len(text) >= 3 and text.isascii() and text.isalpha()

    def _piece(self, piece: str) -> list[int]:
        if piece not in self._known:
            if piece in _MARKS:
                self._known[piece] = [self._numbers[piece]]
            else:
                self._known[piece] = [self._numbers[token] for token in self._merged(piece)]
        return self._known[piece]

    def _merged(self, piece: str) -> list[str]:
        """The tokens of one piece."""
        parts = [self._letter_of[byte] for byte in piece.encode("utf-8", "replace")]
        parts[-1] += END_OF_WORD
        while len(parts) > 1:
            ranks = [self._ranks.get(pair, len(self._ranks)) for pair in pairwise(parts)]
            best = min(ranks)
            if best == len(self._ranks):
                break
            parts = _joined(parts, ranks, best)
        return parts


def _joined(parts: list[str], ranks: list[int], best: int) -> list[str]:
    """Every pair of that rank as one, from left to right."""
    made, index = [], 0
    while index < len(parts):
        is_pair = index < len(ranks) and ranks[index] == best
        made.append(parts[index] + parts[index + 1] if is_pair else parts[index])
        index += 2 if is_pair else 1
    return made


def _pieces(text: str) -> Iterator[str]:
    """The text cut up, blanks left out."""
    text = unicodedata.normalize("NFC", text).lower()
    start = 0
    while start < len(text):
        end = _end(text, start)
        if not text[start].isspace():
            yield text[start:end]
        start = end


def _end(text: str, start: int) -> int:
    """Where the piece that begins at `start` ends."""
    for ending in (*_MARKS, *_ENDINGS):
        if text.startswith(ending, start):
            return start + len(ending)
    kind = _kind(text[start])
    end = start + 1
    if kind == "number":
        return end
    while end < len(text) and _kind(text[end]) == kind:
        end += 1
    return end


def _kind(letter: str) -> str:
    if letter.isspace():
        return "space"
    category = unicodedata.category(letter)[0]
    return {"L": "letter", "N": "number"}.get(category, "other")


@cache
def clip_words() -> ClipWords:
    """The vocabulary, made once."""
    return ClipWords()
