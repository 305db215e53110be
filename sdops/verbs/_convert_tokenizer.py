"""T5's tokenizer from a file or folder of the user's: its vocabulary does not come with sdops."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sdops import standin
from sdops.errors import UsageError

_VOCABULARIES = ("tokenizer.json", "spiece.model")
_BESIDE = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
_FOLDERS = ("", "tokenizer_3", "tokenizer_2", "tokenizer")  # in a folder of diffusers T5 comes last
_MARKS = {"eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
_CONFIG: dict[str, Any] = {"tokenizer_class": "T5Tokenizer", "model_max_length": 512, "extra_ids": 100, **_MARKS}
_HINT = "`--tokenizer` takes the `tokenizer.json` or `spiece.model` of a T5, or a folder that has one"


def t5_files(path: Path) -> dict[str, bytes]:
    """The files of a `T5Tokenizer` folder, by name.

    Args:
        path: A `tokenizer.json` or a SentencePiece model, whatever they are called; or a folder with one of them, or
            with a folder `tokenizer`, `tokenizer_2` or `tokenizer_3` that has one.

    Raises:
        UsageError: there is none, or it is not a T5's.
    """
    found = _of_folder(path) if path.is_dir() else _of_file(path)
    if not found:
        raise UsageError(f"`{path}` has no tokenizer of T5", hint=_HINT)
    config = (json.dumps(_CONFIG, indent=2) + "\n").encode()
    return {"tokenizer_config.json": config, **found}


def _of_folder(path: Path) -> dict[str, bytes]:
    for name in _FOLDERS:
        folder = path / name
        there = [file for file in _VOCABULARIES if (folder / file).is_file()]
        vocabularies = {file: data for file in there if _kind(data := _read(folder / file)) == file}
        if vocabularies:
            beside = [file for file in _BESIDE if (folder / file).is_file()]
            return vocabularies | {file: _read(folder / file) for file in beside}
    return {}


def _of_file(path: Path) -> dict[str, bytes]:
    if not path.is_file():
        raise UsageError(f"there is no `{path}`", hint=_HINT)
    data = _read(path)
    kind = _kind(data)
    return {kind: data} if kind else {}


def _kind(data: bytes) -> str:
    """Which of the two a file is, told by its content: pieces with scores, T5's own marks among them; "" for others."""
    if data[:1] == b"{":
        try:
            model = json.loads(data).get("model") or {}
        except ValueError:
            return ""
        pieces = {entry[0] for entry in model.get("vocab") or () if isinstance(entry, list) and entry}
        return "tokenizer.json" if {"</s>", "<unk>"} <= pieces else ""
    # a protobuf message whose first field is a piece
    return "spiece.model" if data[:1] == b"\n" and b"</s>" in data[:200] else ""


def _read(path: Path) -> bytes:
    return standin.content(path)
