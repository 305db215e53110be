"""Bring a file of the Hub into huggingface_hub's cache: resumed where it broke off, also by a later run, and checked.

The cache is that of every program that uses huggingface_hub: `blobs/` holds contents by hash, `snapshots/COMMIT/` links
to them by name, `refs/` says which commit a branch was. Where the Hub offers Xet, huggingface_hub's own download
transfers the content; elsewhere we do, because its plain HTTP download drops a partial file when a connection is reset.
Neither compares hashes: we do, and a content that is wrong never gets a name.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any, BinaryIO, Self

from sdops import hub
from sdops.core.files import sync_folder
from sdops.errors import HubError, OutputError
from sdops.hub.listing import Entry, Listing, cache_folder, cached
from sdops.hub.reference import MAIN
from sdops.hub.session import is_local, is_offline, library, patiently, utilities
from sdops.text import size

_CHUNK = 1 << 20
_OTHER_CACHE = "HF_HOME names another place for it; `--stream` reads without keeping the file"

Advance = Callable[[int], None]


def download(found: Listing, path: str, holder: Path | None = None) -> Path:
    """The file in the cache, brought there if need be.

    Args:
        found: The repository.
        path: Of the file in it.
        holder: A folder to bring it to instead, under the name of its content.

    Raises:
        HubError: the Hub does not give it, or twice gives something else than it announces.
        OutputError: there is no space for it.
    """
    if here := cached(found, path):
        return here
    if holder is None:
        cache = library().constants.HF_HUB_CACHE
        with _Room(f"the cache `{cache}`", _OTHER_CACHE) as room:
            return _in_cache(found, path, room)
    held = holder / found.files[path].blob
    if not held.exists():
        with _Room(f"the folder `{holder.parent}`", "`-o` names another place") as room:
            room.check(holder, path, found.files[path].size)
            _by_http(found, path, found.files[path], held)
    return held


def _in_cache(found: Listing, path: str, room: _Room) -> Path:
    """The file in the shared cache, brought there."""
    entry = found.files[path]
    blob = cache_folder(found.repo) / "blobs" / entry.blob
    if not blob.exists() and not is_offline():
        blob.parent.mkdir(parents=True, exist_ok=True)
        room.check(blob.parent, path, entry.size)
        if not _by_xet(found, path, entry):
            _by_http(found, path, entry, blob)
    linked = patiently(
        found.pinned(path),
        lambda: library().hf_hub_download(found.repo, path, revision=found.commit, library_name="sdops"),
    )
    remember_revision(found)
    return Path(str(linked))


class _Room:
    """Where a file is brought to: whatever this disk refuses is told by that name, with what helps.

    Raises:
        OutputError: there is no space, or it may not be written.
    """

    def __init__(self, named: str, hint: str) -> None:
        self._named, self._hint = named, hint

    def __enter__(self) -> Self:
        return self

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        if error is not None and is_local(error):
            raise OutputError(f"{self._named} cannot be written: {_reason(error)}", hint=self._hint) from None

    def check(self, folder: Path, path: str, nbytes: int) -> None:
        """See that the file fits."""
        free = shutil.disk_usage(folder).free
        if nbytes > free:
            raise OutputError(
                f"`{Path(path).name}` needs {size(nbytes)}, {self._named} has {size(free)} free",
                hint=self._hint,
                needed=nbytes,
                free=free,
            )


def _reason(error: BaseException) -> str:
    return str(getattr(error, "strerror", None) or error)


def _by_xet(found: Listing, path: str, entry: Entry) -> bool:
    """Let huggingface_hub download a file from Xet. Returns whether it is here now, as announced."""
    if library().constants.HF_HUB_DISABLE_XET or find_spec("hf_xet") is None or entry.sha256 is None:
        return False
    url = library().hf_hub_url(found.repo, path, revision=found.commit)
    about: Any = patiently(found.pinned(path), lambda: library().get_hf_file_metadata(url))
    if about.xet_file_data is None:
        return False
    try:
        with hub.progress()(f"downloading {Path(path).name}", entry.size) as advance:
            linked = Path(
                library().hf_hub_download(found.repo, path, revision=found.commit, tqdm_class=_meter(advance))
            )
    except Exception:  # noqa: BLE001 -- whatever it is: plain HTTP is left, and says what is wrong
        return False
    if _is_announced(linked, entry):
        return True
    linked.resolve().unlink(missing_ok=True)
    linked.unlink(missing_ok=True)
    return False


def _meter(advance: Advance) -> type:
    """What huggingface_hub takes for a progress bar."""
    bar = utilities().tqdm

    def begin(self: Any, *_: Any, **__: Any) -> None:
        bar.__init__(self, disable=True)

    def update(_: Any, nbytes: float = 1) -> None:
        advance(int(nbytes or 0))

    return type("Meter", (bar,), {"__init__": begin, "update": update})


def _by_http(found: Listing, path: str, entry: Entry, blob: Path) -> None:
    """Download by ranges behind what an earlier attempt or run left, then compare the hash."""
    partial = blob.with_name(f"{blob.name}.sdops.incomplete")
    for attempt in range(2):
        fd = os.open(partial, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)  # another run may be at it
            if blob.exists():
                return
            with hub.progress()(f"downloading {Path(path).name}", entry.size) as advance:
                _complete(found, path, entry, fd, advance)
            if _is_announced(partial, entry):
                os.fsync(fd)
                os.replace(partial, blob)
                sync_folder(blob.parent)
                return
            partial.unlink()
        finally:
            os.close(fd)
        if attempt:
            break
    raise HubError(
        f"`{found.pinned(path)}` arrived damaged, twice: its hash is not the one that the Hub announces",
        hint="a proxy or mirror in between may alter it: check HF_ENDPOINT and the proxy, then run the command again",
        reason="damaged",
    )


def _complete(found: Listing, path: str, entry: Entry, fd: int, advance: Advance) -> None:
    """Append until the file has its size. As long as there is progress, every break is forgiven."""
    have = min(os.fstat(fd).st_size, entry.size)
    os.ftruncate(fd, have)
    advance(have)
    while have < entry.size:
        have += patiently(found.pinned(path), lambda: _append(found, path, entry, fd, advance))


def _append(found: Listing, path: str, entry: Entry, fd: int, advance: Advance) -> int:
    """One request for all that is missing; returns how many bytes it brought before it ended or broke off.

    Raises:
        Exception: as the client does, if it brought none.
    """
    have, brought = os.fstat(fd).st_size, 0
    url = library().hf_hub_url(found.repo, path, revision=found.commit)
    headers = {**utilities().build_hf_headers(library_name="sdops"), "Accept-Encoding": "identity"}
    if have:
        headers["Range"] = f"bytes={have}-"
    timeout = library().constants.HF_HUB_DOWNLOAD_TIMEOUT
    try:
        with (
            utilities()
            .get_session()
            .stream("GET", url, headers=headers, timeout=timeout, follow_redirects=True) as answer
        ):
            utilities().hf_raise_for_status(answer)
            if have and answer.status_code != 206:  # a server without ranges begins again
                advance(-have)
                os.ftruncate(fd, 0)
                have, brought = 0, -have
            for chunk in answer.iter_raw(_CHUNK):
                chunk = chunk[: entry.size - have]
                os.pwrite(fd, chunk, have)
                have += len(chunk)
                brought += len(chunk)
                advance(len(chunk))
        if brought <= 0:
            raise ConnectionError
    except Exception as error:
        if brought <= 0 or is_local(error):
            raise
    return brought


def _is_announced(file: Path, entry: Entry) -> bool:
    with file.open("rb") as content:
        return content_hash(content, file.stat().st_size, entry) == entry.blob


def content_hash(content: BinaryIO, nbytes: int, entry: Entry) -> str:
    """The hash by which the Hub knows a content: SHA-256 in LFS, else git's own."""
    return _hash(content, hashlib.sha256()) if entry.sha256 else git_hash(content, nbytes)


def git_hash(content: BinaryIO, nbytes: int) -> str:
    """What git calls a content: SHA-1 of it with its size in front."""
    return _hash(content, hashlib.sha1(b"blob %d\0" % nbytes, usedforsecurity=False))


def _hash(content: BinaryIO, digest: Any) -> str:
    while chunk := content.read(4 << 20):
        digest.update(chunk)
    return str(digest.hexdigest())


def remember_revision(found: Listing) -> None:
    """Note which commit a branch or tag was, for runs without network; not in a cache that may not be written."""
    revision = found.revision or MAIN
    if revision == found.commit or is_offline():
        return
    ref = cache_folder(found.repo) / "refs" / revision
    with suppress(OSError):
        if not ref.is_file() or ref.read_text(encoding="ascii") != found.commit:
            ref.parent.mkdir(parents=True, exist_ok=True)
            ref.write_text(found.commit, encoding="ascii")
