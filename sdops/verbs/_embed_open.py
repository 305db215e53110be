"""Opens files of embeddings, whatever their container and layout, and finds the second file of a pair."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np

from sdops.core.casting import READABLE, cast, raw_dtype
from sdops.core.source import Source, read
from sdops.core.tree import Leaf
from sdops.embeddings import diffusers_sdxl, find, layout
from sdops.embeddings._types import AMBIGUOUS, CLIP_IMAGE, KINDS, Contents, Embedding, Vectors
from sdops.errors import FormatError, MismatchError, UsageError
from sdops.formats._file import InputFile
from sdops.hub import located
from sdops.text import suggest
from sdops.verbs._embed_added import named, token_beside
from sdops.verbs._personal_files import is_picture, open_saved

FilePath = str | PathLike[str]

_PICTURE_LIMIT = 256 << 20
_ENDINGS = (".safetensors", ".bin", ".pt")


@dataclass(slots=True)
class EmbeddingFile:
    """An opened file.

    Attributes:
        path: As it was given.
        layout: Name of a file on the shelf.
        embeddings: What it holds.
        container: `torch`, `safetensors` or `picture`.
        paths: Every file that was read.
        notes: What the user should know, one sentence each, without a full stop.
    """

    path: Path
    layout: str
    embeddings: list[Embedding]
    container: str
    paths: list[Path]
    notes: list[str] = field(default_factory=list)


def open_embeddings(path: FilePath, kind: str | None = None) -> EmbeddingFile:
    """The embeddings in a file, or in a folder that holds one as diffusers saves it.

    Args:
        path: Any container and layout.
        kind: Settles what one row of 768 is: `tokens` or `clip-image`.

    Raises:
        SdopsError: the file is missing or no model.
        FormatError: it holds no embedding.
        UsageError: there is no such kind.
    """
    if kind is not None and kind not in KINDS:
        close = suggest(kind, KINDS)
        hint = f"did you mean `{close}`?" if close else f"one of {', '.join(KINDS)}"
        raise UsageError(f"there is no kind `{kind}`", hint=hint)
    path = located(path)
    if path.is_dir():
        path = _in_folder(path)
    found = _open(path)
    _join_pair(found)
    found.embeddings = [_settled(one, kind) for one in found.embeddings]
    if found.layout == "checkpoint":
        found.embeddings = named(found.embeddings, path)
    elif len(found.embeddings) == 1 and found.embeddings[0].placeholder == "*" and (token := token_beside(path)):
        found.embeddings = [replace(found.embeddings[0], placeholder=token)]
    _note_pair(found)
    return found


def choose(file: EmbeddingFile, only: str | None) -> list[Embedding]:
    """All embeddings of a file, or the one of that name or placeholder.

    Raises:
        UsageError: there is none.
    """
    if only is None:
        return file.embeddings
    chosen = [one for one in file.embeddings if only in (one.name, one.placeholder)]
    if not chosen:
        names = [one.name for one in file.embeddings]
        close = suggest(only, names)
        hint = f"did you mean `{close}`?" if close else f"it holds {', '.join(f'`{name}`' for name in names[:8])}"
        raise UsageError(f"`{file.path}` holds no embedding `{only}`", hint=hint)
    return chosen


def _open(path: Path) -> EmbeddingFile:
    contents, container, close = _contents(path)
    try:
        name = find(contents)
        if name is None:
            raise FormatError(
                f"`{path}` holds no embedding of any known layout",
                hint=f"`sdops inspect {path}` shows what it is",
                path=path,
            )
        return EmbeddingFile(path, name, layout(name).read(contents), container, [path])
    except FormatError as error:
        if str(path) in error.message:
            raise
        raise FormatError(f"`{path}`: {error.message}", hint=error.hint, path=path) from None
    finally:
        close()


def _contents(path: Path) -> tuple[Contents, str, Callable[[], None]]:
    """What a file holds, its container, and what closes it."""
    if is_picture(path):
        return Contents(_picture(path), {}, path.stem, _no_tensor), "picture", lambda: None
    saved, source, container = open_saved(path)
    return Contents(saved.tree, saved.metadata, saved.stem, Loader(source)), container, source.close


class Loader:
    """Reads the values of Leafs: float32, or float64 where the file has that."""

    def __init__(self, source: Source) -> None:
        self._source = source

    def __call__(self, leaf: Leaf) -> Vectors:
        dtype = leaf.spec.dtype
        if dtype not in READABLE:
            raise FormatError(
                f"`{leaf.key}` of dtype {dtype} holds no plain numbers", hint="give a file of fp32 or fp16"
            )
        raw = np.frombuffer(read(self._source, leaf.key), raw_dtype(dtype))
        wide = "F64" if dtype == "F64" else "F32"
        values: Any = raw
        if dtype != wide:
            values = np.empty(raw.shape, raw_dtype(wide))
            cast(raw, dtype, values, wide)
        return Vectors(values.view(np.float64 if wide == "F64" else np.float32).reshape(leaf.spec.shape), dtype)


def _no_tensor(leaf: Leaf) -> Vectors:
    raise FormatError(f"`{leaf.key}` is not there")


def _picture(path: Path) -> bytes:
    file = InputFile(path)
    try:
        if file.size > _PICTURE_LIMIT:
            raise FormatError(f"the picture `{path}` is too large to hold an embedding", path=path)
        return bytes(file.read(0, file.size))
    finally:
        file.close()


def _in_folder(folder: Path) -> Path:
    """The file in a folder that `save_pretrained` and the concepts library make."""
    for ending in _ENDINGS:
        path = folder / f"learned_embeds{ending}"
        if path.is_file():
            return path
    return folder


def _join_pair(found: EmbeddingFile) -> None:
    """Add the vectors of the other file if this is one of the two that diffusers saves for SDXL."""
    widths = {tuple(one.vectors) for one in found.embeddings}
    if found.layout != "diffusers" or len(widths) != 1 or not widths <= {("clip_l",), ("clip_g",)}:
        return
    other = found.path.with_name(diffusers_sdxl.partner(found.path.stem) + found.path.suffix)
    if not other.is_file():
        return
    try:
        both = diffusers_sdxl.joined(found.embeddings, _open(other).embeddings)
    except FormatError:  # something else of that name
        return
    if both:
        found.embeddings, found.layout = both, "diffusers_sdxl"
        found.paths.append(other)
        found.notes.append(f"`{other.name}` holds the vectors of the other encoder and was read with it")


def _settled(one: Embedding, kind: str | None) -> Embedding:
    """An embedding whose kind the user tells."""
    if kind is None or one.kind == kind:
        return one
    if kind == CLIP_IMAGE:
        rows = [part for name, part in one.vectors.items() if name == "clip_l"]
        if len(one.vectors) != 1 or not rows or one.kind != AMBIGUOUS:
            raise MismatchError(
                f"`{one.name}` can be no CLIP image vector",
                hint="those are bare tensors of one row of 768",
                kind=one.kind,
            )
        return replace(one, kind=kind, vectors={"clip_image": rows[0]})
    if one.kind != AMBIGUOUS:
        raise MismatchError(f"`{one.name}` is {one.kind}, not {kind}", hint="leave `--kind` out", kind=one.kind)
    return replace(one, kind=kind)


def partner(path: Path) -> Path:
    """Where the other half of a pair would be: `X.pt` and `X-neg.pt`."""
    stem = path.stem
    return path.with_name((stem.removesuffix("-neg") if stem.endswith("-neg") else f"{stem}-neg") + path.suffix)


def _note_pair(found: EmbeddingFile) -> None:
    """DreamArtist trains `X` and `X-neg` together."""
    stem = found.path.stem
    other = partner(found.path)
    if other.is_file():
        role = "negative" if stem.endswith("-neg") else "positive"
        found.notes.append(f"the {role} half of a pair with `{other.name}`: use both, one in each prompt")
