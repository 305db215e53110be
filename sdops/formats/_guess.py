"""What a file really is that no format knows: broken downloads, archives, foreign model files."""

from __future__ import annotations

import os
from pathlib import Path

from sdops.errors import FormatError
from sdops.text import size

_AGAIN = "download the model again"
_UNPACK = "unpack it and give the model inside"

# First bytes -> what it is, what to do.
_MAGIC: tuple[tuple[bytes, str, str], ...] = (
    (b"PK\3\4", "a zip archive without a torch model inside", _UNPACK),
    (b"PK\5\6", "an empty zip archive", _AGAIN),
    (b"\x1f\x8b", "a gzip archive", _UNPACK),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive", _UNPACK),
    (b"Rar!\x1a\x07", "a RAR archive", _UNPACK),
    (b"\xfd7zXZ\0", "an xz archive", _UNPACK),
    (b"\x28\xb5\x2f\xfd", "a zstd archive", _UNPACK),
    (b"BZh", "a bzip2 archive", _UNPACK),
    (b"\x89PNG", "a picture", "give the model itself"),
    (b"\xff\xd8\xff", "a picture", "give the model itself"),
    (b"RIFF", "a picture or a sound", "give the model itself"),
    (b"\x93NUMPY", "a numpy array, not a model", "give a safetensors file or a torch checkpoint"),
    (b"\x89HDF", "an HDF5 file (Keras), which sdops does not read", "use the safetensors version of the model"),
    (b"\x80", "a pickle that torch.save did not write", "give a safetensors file or a torch checkpoint"),
)
# Beginnings of what servers answer in place of a file.
_ANSWERS = ("entry not found", "repository not found", "invalid username or password", "access to model", "not found")


def unknown(path: Path, head: bytes) -> FormatError:
    """The error for a file that is no model, with the best guess of what it is."""
    what, hint = _guess(path, head)
    return FormatError(f"`{path}` is {what}", hint=hint, path=path)


def is_foreign(head: bytes) -> bool:
    """Whether the first bytes are surely something else than a damaged model file."""
    return not head.strip(b"\0") or _pointer(head) is not None or _text(head) is not None or _magic(head) is not None


def _guess(path: Path, head: bytes) -> tuple[str, str]:
    if not head:
        return "empty", _AGAIN
    if not head.strip(b"\0"):
        return "nothing but zeros at its start: space was reserved for a download that never came", _AGAIN
    found = _pointer(head, path) or _text(head) or _magic(head)
    return found or ("not a model file that sdops knows", "give a safetensors file or a torch checkpoint")


def _pointer(head: bytes, path: Path = Path()) -> tuple[str, str] | None:
    if not head.startswith(b"version https://git-lfs"):
        return None
    from shlex import quote

    digits = head.partition(b"\nsize ")[2].split(b"\n")[0].decode("ascii", "replace")
    wanted = f" to a file of {size(int(digits))}" if digits.isdecimal() and len(digits) < 20 else ""
    return f"a Git LFS pointer{wanted}, not the model itself", f"`cd {quote(os.fspath(path.parent))} && git lfs pull`"


def _text(head: bytes) -> tuple[str, str] | None:
    """Web pages, JSON and short messages."""
    start = head.removeprefix(b"\xef\xbb\xbf").lstrip()[:200].lower()
    if start.startswith((b"<!doctype", b"<html", b"<head", b"<?xml")):
        return "a web page, not a model", f"{_AGAIN}; the link may need a login or lead to a page about the model"
    text = start.decode("latin-1")
    if start.startswith((b'{"', b"{\n", b"{ ", b"[")) and b"\0" not in head:
        return "a JSON text, not a model", f"{_AGAIN} if this should be one; servers send errors this way"
    if text.startswith(_ANSWERS):
        return "a server's error message, not a model", f"{_AGAIN}; the link may need a login"
    return None


def _magic(head: bytes) -> tuple[str, str] | None:
    if head[257:262] == b"ustar":
        return "a tar archive (or a checkpoint of torch older than 0.4)", "re-save it with `torch.save`, or unpack it"
    return next(((what, hint) for magic, what, hint in _MAGIC if head.startswith(magic)), None)
