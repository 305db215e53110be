"""The Hugging Face Hub: files at `hf://owner/repo[@revision]/path`, everywhere a path stands.

    located(path) -> Path          what a verb can open: the path itself, or a stand-in for the file on the Hub

Opening a stand-in asks the Hub for the list of files of one commit; reading it takes small portions by range requests,
and brings the whole file into huggingface_hub's cache once a verb reads more than headers, unless `streaming`. Whoever
goes through streamed files more than once has them `held` in a folder meanwhile.
huggingface_hub, slow to import, is imported by the first reference.

reference   the text `hf://...` and its parts
session     requests: typed errors, patience, never a token in a message
listing     what a repository holds at a commit
mount       stand-ins on this disk for the files of a repository
ranges      a file on the Hub, read in portions
blocks      the same, read to its end
download    whole files into the shared cache: resumed, checked
upload      one commit with everything in it
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sdops.report import Progress, silent

_progress: Progress = silent
_streaming = False
_holder: Path | None = None


def is_reference(path: str | os.PathLike[str]) -> bool:
    """Whether it names something on the Hub; also in the form that `Path` makes of it, with one slash."""
    return os.fspath(path).startswith(("hf:/", "https:/", "http:/"))


def located(path: str | os.PathLike[str]) -> Path:
    """The file or folder that a path means: itself, or a stand-in for what a reference names.

    Raises:
        UsageError: the reference is malformed.
        HubError: there is no such repository, revision or file, or it may not be read.
    """
    if not is_reference(path):
        return Path(path)
    from sdops.hub.mount import mounted

    return mounted(os.fspath(path))


def commit_of(reference: str) -> str:
    """The commit that a reference meant when it was located."""
    from sdops.hub import mount

    return mount.commit_of(reference)


@contextmanager
def streaming(wish: bool = True) -> Iterator[None]:
    """Whether files opened now are read by range requests to the end, and kept nowhere."""
    global _streaming
    before, _streaming = _streaming, wish or _streaming
    try:
        yield
    finally:
        _streaming = before


def set_streaming(wish: bool) -> None:
    """`streaming` for the rest of the run."""
    global _streaming
    _streaming = wish


def is_streaming() -> bool:
    """Whether `streaming` is in force."""
    return _streaming


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Files that would be streamed are brought into a folder instead, as a whole, once, by whichever process comes
    first. The folder is the caller's, and may go as soon as this ends.
    """
    from sdops.hub import mount

    global _streaming, _holder
    before = _streaming, _holder
    _streaming, _holder = False, folder
    files = mount.hold()
    try:
        yield
    finally:
        _streaming, _holder = before
        mount.let_go(files)


def holder() -> Path | None:
    """The folder for files of which no copy is to be kept, but while `held` is in force."""
    return _holder


def show_progress(progress: Progress) -> None:
    """Who is told of downloads."""
    global _progress
    _progress = progress


def progress() -> Progress:
    """Whom to tell of downloads."""
    return _progress
