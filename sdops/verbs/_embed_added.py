"""What words are called whose own file does not say it: the tokenizer beside a model, a file beside the vectors."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from sdops.embeddings._types import Embedding
from sdops.embeddings.checkpoint import VOCABULARY
from sdops.errors import SdopsError
from sdops.formats import read_json

_FOLDERS = ("tokenizer", "tokenizer_2")
_LONGEST = 1000  # bytes of a word


def added_names(path: Path) -> dict[int, str]:
    """Number behind the vocabulary's -> word, from the tokenizer in or beside a model; empty if there is none."""
    names: dict[int, str] = {}
    for folder in (path, *list(path.parents)[:2]):
        for tokenizer in _FOLDERS:
            for number, word in _tokens(folder / tokenizer):
                names.setdefault(number, word)
        if names:
            break
    return {number: word for number, word in names.items() if number >= VOCABULARY}


def _tokens(folder: Path) -> Iterator[tuple[int, str]]:
    """All that the files of transformers say: {word: number}, or lists and dicts of numbers."""
    words = _read(folder / "added_tokens.json")
    yield from ((number, word) for word, number in words.items() if type(number) is int)
    listed = _read(folder / "tokenizer.json").get("added_tokens")
    for entry in listed if type(listed) is list else ():
        if type(entry) is dict and type(entry.get("id")) is int:
            yield entry["id"], str(entry.get("content", ""))
    decoder = _read(folder / "tokenizer_config.json").get("added_tokens_decoder")
    for number, entry in decoder.items() if type(decoder) is dict else ():
        if number.isdecimal() and type(entry) is dict:
            yield int(number), str(entry.get("content", ""))


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        return read_json(path)
    except SdopsError:
        return {}


def named(embeddings: list[Embedding], path: Path) -> list[Embedding]:
    """Words of a checkpoint, called as its tokenizer calls them where it is there."""
    names = added_names(path)
    return [
        replace(one, name=names[VOCABULARY + number], placeholder=names[VOCABULARY + number])
        if VOCABULARY + number in names
        else one
        for number, one in enumerate(embeddings)
    ]


def token_beside(path: Path) -> str | None:
    """The word for a file of vectors, where cog-sdxl's or the concept library's small file says it."""
    params = _read(path.with_name("special_params.json"))  # {"TOK": "<s0><s1>"}
    if len(params) == 1:
        return str(next(iter(params)))
    identifier = path.with_name("token_identifier.txt")
    if not identifier.is_file() or identifier.stat().st_size > _LONGEST:
        return None
    return identifier.read_text("utf-8", "replace").strip() or None
