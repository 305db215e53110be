"""A model in several files: `model-00001-of-00003.safetensors` ..., with an index `model.safetensors.index.json`.

    {"metadata": {...}, "weight_map": {tensor name: file name}}

The index decides which file a tensor is read from, and every tensor that it lists must be there. Given a shard, the
reader looks for its index, and without one for its siblings. The layout is that of huggingface_hub's
`split_state_dict_into_shards`; a variant stands before the number of a shard and before `.json` of the index.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from sdops.errors import FormatError
from sdops.formats import FileSource, open_file
from sdops.formats._joined import JoinedSource
from sdops.formats._json import read
from sdops.text import count, shorten

INDEX = re.compile(r".*\.(safetensors|bin)\.index(\.[\w-]+)?\.json", re.IGNORECASE)
SHARD = re.compile(r"(?P<stem>.+)-(?P<number>\d{1,5})-of-(?P<total>\d{1,5})\.(?P<ending>safetensors|bin)")
_AGAIN = "download the missing files into the same folder"


def sniff(path: Path, head: bytes) -> bool:
    """A file with the name of an index or a shard."""
    if path.is_dir():
        return False
    return (INDEX.fullmatch(path.name) is not None and head[:1] == b"{") or SHARD.fullmatch(path.name) is not None


def open(path: Path) -> JoinedSource:  # noqa: A001 -- the shelf's contract names it
    """Open an index, or all shards that belong to one.

    Raises:
        SdopsError: the file is missing.
        FormatError: a shard is missing or damaged, or does not hold what the index says.
    """
    if INDEX.fullmatch(path.name):
        return _open_index(path, path)
    index = _index_of(path)
    if index is not None:
        return _open_index(path, index)
    shards = _siblings(path)
    return _join(path, {shard.name: shard for shard in shards}, None)


def _open_index(path: Path, index: Path) -> JoinedSource:
    weight_map = _weight_map(index)
    folder = index.parent
    names = sorted(set(weight_map.values()))
    missing = [name for name in names if not (folder / name).exists()]
    if missing:
        raise _incomplete(path, missing)
    return _join(path, {name: folder / name for name in names}, weight_map)


def _weight_map(index: Path) -> dict[str, str]:
    """Tensor -> file, every file a plain name: an index must not reach out of its folder."""
    found: Any = read(index).get("weight_map")
    if type(found) is not dict or not found:
        raise FormatError(f"`{index}` has no weight_map", hint="download or copy the file again", path=index)
    for name in found.values():
        if type(name) is not str or not _is_plain(name):
            raise FormatError(
                f"`{index}` names the file {shorten(repr(name), 80)}, which is no plain file name of a model",
                hint="do not use this index: it may come from an attack",
                path=index,
            )
    return found


def _is_plain(name: str) -> bool:
    """A file name without a way out of its folder."""
    return (
        name.endswith((".safetensors", ".bin"))
        and not name.startswith(".")
        and not any(character in "/\\:" or not character.isprintable() for character in name)
    )


def _index_of(shard: Path) -> Path | None:
    """The index beside a shard, if it lists it."""
    match = SHARD.fullmatch(shard.name)
    if match is None:
        return None
    stem, _, variant = match["stem"].rpartition(".")
    names = [f"{match['stem']}.{match['ending']}.index.json", f"{stem}.{match['ending']}.index.{variant}.json"]
    for name in names:
        index = shard.parent / name
        if index.is_file() and shard.name in _weight_map(index).values():
            return index
    return None


def _siblings(shard: Path) -> list[Path]:
    """All files of the same set, told by their numbers."""
    own = SHARD.fullmatch(shard.name)
    if own is None:
        return [shard]
    found: dict[int, str] = {}
    for name in os.listdir(shard.parent):
        match = SHARD.fullmatch(name)
        if match and all(match[part] == own[part] for part in ("stem", "total", "ending")):
            found[int(match["number"])] = name
    total, width = int(own["total"]), len(own["number"])
    numbers = range(1, total + 1) if 0 not in found else range(total)
    missing = [
        f"{own['stem']}-{number:0{width}d}-of-{own['total']}.{own['ending']}"
        for number in numbers
        if number not in found
    ]
    if missing:
        raise _incomplete(shard, missing)
    return [shard.parent / found[number] for number in numbers]


def _incomplete(path: Path, missing: list[str]) -> FormatError:
    names = ", ".join(f"`{shorten(name, 80)}`" for name in missing[:3]) + (", ..." if len(missing) > 3 else "")
    return FormatError(
        f"`{path}` is one model together with {count(len(missing), 'file')} missing beside it: {names}",
        hint=_AGAIN,
        path=path,
        missing=missing,
    )


def _join(path: Path, shards: dict[str, Path], weight_map: dict[str, str] | None) -> JoinedSource:
    """Open the shards by name; without a map every tensor of every shard belongs to the model."""
    with ExitStack() as stack:
        parts: dict[str, FileSource] = {}
        for name, file in shards.items():
            parts[name] = open_file(file)
            stack.callback(parts[name].close)
        alone = (
            f"the index that goes with `{path.name}` is missing: all tensors of {count(len(parts), 'file')} are taken"
        )
        warnings = [alone] if weight_map is None else _compare(path, parts, weight_map)
        places: dict[str, tuple[FileSource, str]] = {}
        for name, part in parts.items():
            for key in part.specs:
                if weight_map is None and key in places:
                    raise FormatError(f"`{shorten(key)}` is in two of the files of `{path}`", hint=_AGAIN, path=path)
                if weight_map is None or weight_map.get(key) == name:
                    places[key] = part, key
        stack.pop_all()
    return JoinedSource(path, places, list(parts.values()), _metadata(parts.values()), warnings)


def _compare(path: Path, parts: dict[str, FileSource], weight_map: dict[str, str]) -> list[str]:
    """Every listed tensor must be where the index says; what it does not list is told."""
    for key, name in weight_map.items():
        if key not in parts[name].specs:
            raise FormatError(
                f"`{shorten(key)}` is not in `{name}`, where the index of `{path}` looks for it",
                hint="index and shards are of different models: download all of them again",
                path=path,
                key=key,
            )
    warnings = []
    unlisted = [key for part in parts.values() for key in part.specs if key not in weight_map]
    if unlisted:
        warnings.append(f"{count(len(unlisted), 'tensor')} not listed in the index of `{path.name}` left out")
    double = [key for name, part in parts.items() for key in part.specs if weight_map.get(key, name) != name]
    if double:
        warnings.append(f"{count(len(double), 'tensor')} in two files of `{path.name}`: the index decides")
    return warnings


def _metadata(parts: Iterable[FileSource]) -> dict[str, str]:
    """The metadata of all shards; of values that differ, the first."""
    joined: dict[str, str] = {}
    for part in parts:
        joined = {**part.metadata, **joined}
    return joined
