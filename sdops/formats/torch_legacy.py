"""torch.save before version 1.6: five pickles in a row, then the storages.

    magic number | protocol 1001 | system | object | list of storage keys | per key: u64 number of elements, bytes

Read without torch and without executing anything (see `_pickle`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NoReturn

from sdops.errors import FormatError
from sdops.formats._file import InputFile
from sdops.formats._pickle import PickleError, refuse
from sdops.formats._torch import Storage, load_object, load_plain
from sdops.formats._torch_file import Naming, Stream, TorchFile

MAGIC = 0x1950A86A20F9469CFC6C
PROTOCOL = 1001


def sniff(path: Path, head: bytes) -> bool:
    """A pickle that begins with the magic number."""
    del path
    return head[:1] == b"\x80" and MAGIC.to_bytes(10, "little") in head[:32]


def open(path: Path) -> TorchFile:  # noqa: A001 -- the shelf's contract names it
    """Open a checkpoint by reading its pickles.

    Raises:
        SdopsError: the file is missing.
        FormatError: it is damaged, hostile, or holds no named tensors.
    """
    return open_named(path, lambda root: root)


def open_named(path: Path, named: Naming) -> TorchFile:
    """As `open`; `named` makes a dict of tensors of the object in the file.

    Raises:
        SdopsError: the file is missing.
        FormatError: it is damaged, hostile, or holds no named tensors.
    """
    file = InputFile(path)
    try:
        return TorchFile(file, named(_read_object(file)))
    except BaseException:
        file.close()
        raise


def load(path: Path) -> Any:
    """The object in the file as plain values, Tensors and Opaques.

    Raises:
        FormatError: as `open`.
    """
    file = InputFile(path)
    try:
        return _read_object(file)
    finally:
        file.close()


def _read_object(file: InputFile) -> Any:
    stream = Stream(file)
    storages: dict[str, Storage] = {}

    def find(key: str, dtype: str, nbytes: int) -> Storage:
        storage = storages.setdefault(key, Storage(dtype, nbytes))
        if storage.nbytes != nbytes:
            refuse("it is damaged: one storage has two sizes")
        return storage

    try:
        if load_plain(stream) != MAGIC or load_plain(stream) != PROTOCOL:
            refuse("it is damaged")
        load_plain(stream)  # byte order and word sizes of the machine; the storages are little-endian on every one
        root = load_object(stream, find)
        keys = load_plain(stream)
    except PickleError as error:
        raise FormatError(f"the pickle of `{file.path}` cannot be read: {error}", hint=_HINT, path=file.path) from None
    _place(file, storages, keys, stream.tell())
    return root


_HINT = "get the model from where you trust it, as safetensors if possible"


def _place(file: InputFile, storages: dict[str, Storage], keys: Any, position: int) -> None:
    """Find out where each storage lies."""
    if type(keys) is not list or not all(type(key) is str for key in keys) or sorted(keys) != sorted(storages):
        _damaged(file, "its list of storages does not fit its tensors")
    for key in keys:
        storage = storages[key]
        if position + 8 + storage.nbytes > file.size:
            _damaged(file, f"it is cut short: at least {position + 8 + storage.nbytes - file.size:,} bytes are missing")
        numel = int.from_bytes(file.read(position, 8), "little")
        if numel * storage.item_bytes != storage.nbytes:
            _damaged(file, "a storage has another size than its tensors say")
        storage.position = position + 8
        position = storage.position + storage.nbytes
    if position != file.size:
        _damaged(file, f"{file.size - position:,} bytes follow the last storage")


def _damaged(file: InputFile, what: str) -> NoReturn:
    raise FormatError(f"`{file.path}` is damaged: {what}", hint="download or copy the file again", path=file.path)
