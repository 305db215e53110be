"""Stand-ins on this disk for files on the Hub: a folder of this process, with files that have names and sizes alone."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path

from sdops import hub, standin
from sdops.hub.download import remember_revision
from sdops.hub.listing import Listing, cached, chosen, listing
from sdops.hub.ranges import HubFile
from sdops.hub.reference import Reference, parse

_listings: dict[tuple[str, str], tuple[Listing, Path]] = {}
_files: dict[Path, HubFile] = {}
_root: Path | None = None


def mounted(text: str, *, whole: bool = False) -> Path:
    """The stand-in for the file or folder that a reference names; for the whole repository, if that is wanted.

    Beside a file are its neighbours: shards, an index and configurations are looked for there.

    Raises:
        UsageError: the reference is malformed.
        HubError: there is no such repository, revision or file, or it may not be read.
    """
    what = parse(text)
    found, folder = _listed(what)
    path = "" if whole else chosen(what, found)
    inside = path.rpartition("/")[0] if path in found.files else path
    for name in found.files:
        if not inside or name.startswith(f"{inside}/"):
            _stand_in(found, name, folder)
    return folder / path if path else folder


def commit_of(text: str) -> str:
    """The commit that a reference means now."""
    return _listed(parse(text))[0].commit


def fetch(text: str) -> Path:
    """As `mounted`, but a file with its content.

    Raises:
        HubError: as `mounted`; the download fails or is damaged.
    """
    return standin.real(mounted(text))


def hold() -> list[HubFile]:
    """Have all files that are streamed read from where `hub.holder` says; returns those."""
    found = [file for file in _files.values() if file.stream]
    for file in found:
        file.stream = False
    return found


def let_go(streamed: list[HubFile]) -> None:
    """Forget what was brought there, and stream again what was streamed before."""
    for file in _files.values():
        file.let_go()
    for file in streamed:
        file.stream = True


def _listed(what: Reference) -> tuple[Listing, Path]:
    """A repository's listing and the folder for its stand-ins; asked for once a run."""
    key = what.repo, what.revision
    if key not in _listings:
        found = listing(what)
        owner, _, name = what.repo.partition("/")
        folder = _own_folder() / str(len(_listings)) / owner / name  # a folder is called as the repository is
        folder.mkdir(parents=True)
        standin.name(folder, str(replace(what, path="")))
        _listings[key] = found, folder
    return _listings[key]


def _stand_in(found: Listing, path: str, folder: Path) -> None:
    place = folder / path
    if place in _files:
        _files[place].stream = hub.is_streaming()
        return
    if place.is_symlink():
        return
    place.parent.mkdir(parents=True, exist_ok=True)
    if here := cached(found, path):
        remember_revision(found)
        place.symlink_to(here)
        return
    fd = os.open(place, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        os.fchmod(fd, 0o644)  # as files in the cache; the folder is ours alone
        os.ftruncate(fd, found.files[path].size)
    finally:
        os.close(fd)
    file = _files[place] = HubFile(found, path, place)
    file.stream = hub.is_streaming()
    standin.add(place, file)


def _own_folder() -> Path:
    """A folder that goes away with this process."""
    global _root
    if _root is None:
        _root = Path(os.path.realpath(tempfile.mkdtemp(prefix="sdops-hub-")))
        atexit.register(_remove, _root, os.getpid())
    return _root


def _remove(root: Path, owner: int) -> None:
    if os.getpid() == owner:
        shutil.rmtree(root, ignore_errors=True)
