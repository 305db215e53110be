"""CLIP's tokenizer: known numbers, and laws that hold for any text."""

from __future__ import annotations

from unicodedata import is_normalized, normalize

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from sdops.pipelines.clip_words import clip_words

# As transformers' CLIPTokenizer gives them.
KNOWN = {
    "a photo of a cat": [320, 1125, 539, 320, 2368],
    "Painting": [3086],
    "it's 1girl": [585, 568, 272, 1611],
    "*": [265],
    "": [],
}


@pytest.mark.parametrize("text", KNOWN)
def test_known_texts(text):
    assert clip_words().numbers(text) == KNOWN[text]


@example("ὐ")
@example("Éclair")
@given(st.text(max_size=40))
def test_tokens_spell_the_text(text):
    words = clip_words()
    numbers = words.numbers(text)
    assert all(0 <= number < 49408 for number in numbers)
    lower = normalize("NFC", text.upper()).lower()
    assume(is_normalized("NFC", lower))  # capital upsilon and a breathing are two letters, of small ones there is one
    assert words.numbers(lower) == words.numbers(text.upper())


@given(st.lists(st.sampled_from(["cat", "dog", "painting", "rutkowski", "don't", "42"]), max_size=6))
def test_words_stand_for_themselves(parts):
    words = clip_words()
    assert words.numbers(" ".join(parts)) == [number for part in parts for number in words.numbers(part)]


def test_every_whole_word_is_its_own_token():
    words = clip_words()
    plain = [number for number in range(0, 49408, 37) if words.is_word(number)]
    wrong = [number for number in plain if words.numbers(words.shown(number)) != [number]]
    assert len(plain) > 500
    assert wrong == []
