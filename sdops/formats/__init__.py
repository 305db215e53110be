"""SHELF: containers of tensors. One file is one container.

Each module offers
    sniff(path: Path, head: bytes) -> bool      is this file (first 4 KiB given) or folder mine?
    open(path: Path) -> Source                  headers only; refuses damaged and hostile files
and executes nothing that a file contains.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

from sdops.core.source import Source
from sdops.core.spec import Spec
from sdops.formats._file import read_head, unreadable
from sdops.formats._guess import unknown
from sdops.hub import located

# Asked in this order, because a shard is a safetensors file as well.
_FILES = ("safetensors", "torch_zip", "gguf", "torch_legacy")
ORDER = ("sharded", *_FILES, "diffusers")


class FileSource(Source, Protocol):
    """A Source that lies on the disk.

    Attributes:
        path: As the user gave it.
        files: Every file that holds tensors.
        warnings: What the user should know, one sentence each, without a full stop.
    """

    path: Path
    files: list[Path]
    warnings: list[str]

    def check_unchanged(self) -> None:
        """Raises ChangedError if a file was written to, replaced or removed since it was opened."""


def open_source(path: str | os.PathLike[str]) -> FileSource:
    """Open a model file or folder of any format, told by its content; also one on the Hub, by its reference.

    Raises:
        SdopsError: there is nothing of that name; a similar name is suggested.
        FormatError: it is no model, or damaged; the message says what it looks like.
    """
    path = located(path)
    try:
        head = b"" if path.is_dir() else read_head(path)
        return _first_match(path, head, ORDER)
    except OSError as error:  # e.g. a folder that may not be listed
        raise unreadable(path, error) from None


def open_file(path: Path) -> FileSource:
    """Open a model that is one file, whatever its name says about others.

    Raises:
        SdopsError: as `open_source`.
    """
    return _first_match(path, read_head(path), _FILES)


def load_object(path: str | os.PathLike[str]) -> Any:
    """What a torch file holds besides named tensors: lists, dicts with numbers for names, a bare tensor.

    The values are plain Python ones, `_torch.Tensor` for tensors and `_pickle.Opaque` for what is not rebuilt.

    Raises:
        SdopsError: as `open_source`.
    """
    path = located(path)
    head = read_head(path)
    for name in ("torch_zip", "torch_legacy"):
        module = import_module(f"{__name__}.{name}")
        if module.sniff(path, head):
            return module.load(path)
    raise unknown(path, head)


def open_tree(path: str | os.PathLike[str]) -> tuple[Any, FileSource] | None:
    """The object in a torch file as a tree of plain values and Leafs, with the tensors that the Leafs name.

    Returns None if it is no torch file.

    Raises:
        SdopsError: as `open_source`; FormatError also if there is no tensor.
    """
    from sdops.formats._tree import Trees

    path = located(path)
    head = b"" if path.is_dir() else read_head(path)
    for name in ("torch_zip", "torch_legacy"):
        module = import_module(f"{__name__}.{name}")
        if module.sniff(path, head):
            trees = Trees()
            source: FileSource = module.open_named(path, trees.take)
            return trees.root, source
    return None


def read_json(path: Path) -> dict[str, Any]:
    """The object in a small JSON file beside a model.

    Raises:
        FormatError: it is no JSON object.
    """
    from sdops.formats._json import read

    return read(path)


def open_list(path: str | os.PathLike[str], names: Callable[[list[Spec]], list[str]]) -> FileSource | None:
    """A torch file that holds nothing but a list of tensors, under the names that `names` gives to their specs.

    Returns None if it holds something else, or is no torch file.

    Raises:
        SdopsError: as `open_source`.
    """
    from sdops.formats import safetensors

    path = located(path)
    head = b"" if path.is_dir() else read_head(path)
    if safetensors.sniff(path, head):  # as most are; what reads torch files need not be imported
        return None
    from sdops.formats._torch import Tensor

    for name in ("torch_zip", "torch_legacy"):
        module = import_module(f"{__name__}.{name}")
        if not module.sniff(path, head):
            continue
        tensors = module.load(path)
        if type(tensors) is not list or not tensors or not all(type(item) is Tensor for item in tensors):
            return None
        given = names([item.spec for item in tensors])
        return _open_named(module, path, given)
    return None


def _open_named(module: Any, path: Path, names: list[str]) -> FileSource:
    source: FileSource = module.open_named(path, lambda root: dict(zip(names, root, strict=True)))
    return source


def _first_match(path: Path, head: bytes, names: tuple[str, ...]) -> FileSource:
    for name in names:
        module = import_module(f"{__name__}.{name}")
        if module.sniff(path, head):
            source: FileSource = module.open(path)
            return source
    if path.is_dir():
        from sdops.formats.diffusers import no_model

        raise no_model(path)
    if path.suffix.lower() == ".safetensors":
        from sdops.formats.safetensors import open as open_safetensors

        return open_safetensors(path)  # says what is wrong with it
    raise unknown(path, head)
