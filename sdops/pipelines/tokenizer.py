"""CLIP's tokenizer as files. The vocabulary follows from the merges, which come with this package.

`clip_merges.txt.gz`: `merges.txt` of openai/CLIP (bpe_simple_vocab_16e6), Copyright (c) 2021 OpenAI, MIT License.
"""

from __future__ import annotations

import gzip
import json
from functools import cache
from pathlib import Path
from typing import Any

_BEGIN, _END = "<|startoftext|>", "<|endoftext|>"
LENGTH = 77


def clip_files(pad: str) -> dict[str, bytes]:
    """The files of a `CLIPTokenizer` folder, by name.

    Args:
        pad: The token that fills a text up.
    """
    merges, vocab = _words()
    names = {"bos_token": _BEGIN, "eos_token": _END, "pad_token": pad, "unk_token": _END}
    settings: dict[str, Any] = {
        "add_prefix_space": False,
        "do_lower_case": True,
        "errors": "replace",
        "model_max_length": LENGTH,
        "tokenizer_class": "CLIPTokenizer",
    }
    return {
        "merges.txt": merges,
        "vocab.json": vocab,
        "special_tokens_map.json": _json(names),
        "tokenizer_config.json": _json(settings | names),
    }


@cache
def _words() -> tuple[bytes, bytes]:
    """`merges.txt` and `vocab.json`. Written out here: the json module takes three times as long for 49,408 tokens."""
    merges = gzip.decompress((Path(__file__).parent / "clip_merges.txt.gz").read_bytes())
    tokens = "\n".join(vocabulary(merges.decode()))
    escaped = tokens.replace("\\", "\\\\").replace('"', '\\"').split("\n")
    items = [f'"{token}": {number}' for number, token in enumerate(escaped)]
    return merges, f"{{{', '.join(items)}}}".encode()


def vocabulary(merges: str) -> dict[str, int]:
    """Token -> number: the 256 bytes, the same at the end of a word, what the merges make, and the two marks."""
    singles = letters().values()
    made = [line.replace(" ", "") for line in merges.splitlines()[1:] if line]
    tokens = [*singles, *(f"{letter}</w>" for letter in singles), *made, _BEGIN, _END]
    return {token: number for number, token in enumerate(tokens)}


def letters() -> dict[int, str]:
    """A visible letter for every byte: itself where it is one, else letters from 256 on; those come last."""
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in visible]
    return {byte: chr(byte) for byte in visible} | {byte: chr(256 + number) for number, byte in enumerate(others)}


def _json(value: Any) -> bytes:
    return (json.dumps(value, ensure_ascii=False, indent=2) + "\n").encode()
