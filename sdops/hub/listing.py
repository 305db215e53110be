"""What a repository holds at one commit: one request, or what the cache of an earlier download knows."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from sdops.errors import HubError
from sdops.hub.reference import COMMIT, MAIN, Reference
from sdops.hub.session import api, endpoint, explained, is_offline, library, patiently, strange
from sdops.text import size

MODELS = (".safetensors", ".ckpt", ".pt", ".pth", ".bin", ".gguf")
PICKLES = (".ckpt", ".pt", ".pth", ".bin")
PIPELINE = "model_index.json"  # names the folder that it describes
INDEX = re.compile(r".*\.(safetensors|bin)\.index(\.[\w-]+)?\.json")
SHARD = re.compile(r".+-\d{1,5}-of-\d{1,5}\.(safetensors|bin)")
SIDE_FILE = "sdops_extra.safetensors"  # beside a folder of diffusers, what that cannot hold: no model
_SHOWN = 12


@dataclass(frozen=True, slots=True)
class Entry:
    """A file of a repository.

    Attributes:
        size: Bytes.
        sha256: Of the content, for files in LFS (all large ones).
        blob: The name of its content in the cache: the sha256, or git's own hash.
    """

    size: int
    sha256: str | None
    blob: str


@dataclass(frozen=True, slots=True)
class Listing:
    """All files of a repository.

    Attributes:
        repo: owner/name.
        revision: As it was asked for; empty = the main branch.
        commit: What that is now.
        files: Path -> Entry, plain relative paths only.
        private: Whether only its owners see it, if the Hub was asked.
    """

    repo: str
    revision: str
    commit: str
    files: Mapping[str, Entry]
    private: bool = False

    def pinned(self, path: str = "") -> Reference:
        """A reference that always means the same bytes."""
        return Reference(self.repo, self.commit, path)


def listing(what: Reference) -> Listing:
    """Ask the Hub, or the cache if HF_HUB_OFFLINE is set.

    Raises:
        HubError: there is no such repository or revision, or it may not be read.
    """
    if is_offline():
        return _remembered(what)
    found = patiently(what, lambda: _ask(what))
    files = {item.rfilename: _entry(item) for item in found.siblings or () if _is_plain(item.rfilename)}
    if not isinstance(found.sha, str) or not COMMIT.fullmatch(found.sha):
        raise strange()
    return Listing(what.repo, what.revision, found.sha, files, bool(found.private))


def _ask(what: Reference) -> Any:
    timeout = library().constants.HF_HUB_ETAG_TIMEOUT
    return api().model_info(what.repo, revision=what.revision or None, files_metadata=True, timeout=timeout)


def _entry(item: Any) -> Entry:
    lfs = item.lfs
    sha256 = lfs.sha256 if lfs is not None and re.fullmatch("[0-9a-f]{64}", str(lfs.sha256)) else None
    return Entry(int(item.size or 0), sha256, sha256 or str(item.blob_id))


def _is_plain(path: str) -> bool:
    """A path that stays in its folder, whatever a server may say."""
    parts = path.split("/")
    return all(part not in ("", ".", "..") and part.isprintable() and "\\" not in part for part in parts)


def cache_folder(repo: str) -> Path:
    """Where huggingface_hub keeps what it downloads of a repository."""
    from huggingface_hub.file_download import repo_folder_name

    return Path(library().constants.HF_HUB_CACHE) / repo_folder_name(repo_id=repo, repo_type="model")


def cached(found: Listing, path: str) -> Path | None:
    """A file that was downloaded before."""
    file = cache_folder(found.repo) / "snapshots" / found.commit / path
    return file if file.is_file() else None


def _remembered(what: Reference) -> Listing:
    """What earlier downloads left in the cache."""
    folder, revision = cache_folder(what.repo), what.revision or MAIN
    commit = revision
    if not COMMIT.fullmatch(revision):
        try:
            commit = (folder / "refs" / revision).read_text(encoding="ascii").strip()
        except (OSError, ValueError):
            raise _not_here(what) from None
    snapshot = folder / "snapshots" / commit
    files = {}
    for file in sorted(snapshot.rglob("*")):
        if file.is_file():
            blob = file.resolve().name
            sha256 = blob if re.fullmatch("[0-9a-f]{64}", blob) else None
            files[file.relative_to(snapshot).as_posix()] = Entry(file.stat().st_size, sha256, blob)
    if not files:
        raise _not_here(what)
    return Listing(what.repo, what.revision, commit, files)


def _not_here(what: Reference) -> HubError:
    from huggingface_hub.errors import OfflineModeIsEnabled

    return explained(what, OfflineModeIsEnabled())


def chosen(what: Reference, found: Listing) -> str:
    """The path of the file or folder that a reference means; "" for the whole repository.

    Raises:
        HubError: there is none, or there are several.
    """
    path = what.path.rstrip("/")
    if path.rpartition("/")[2] == PIPELINE and path in found.files:
        return path.rpartition("/")[0]
    if path in found.files:
        return path
    if path and any(name.startswith(f"{path}/") for name in found.files):
        return path
    if path:
        raise _missing(what, found)
    return _only_model(what, found)


def _only_model(what: Reference, found: Listing) -> str:
    """The one model of a repository."""
    at_root = [path for path in found.files if "/" not in path and path != SIDE_FILE]
    safe = [path for path in at_root if path.endswith(".safetensors") and not SHARD.fullmatch(path)]
    indexes = [path for path in at_root if INDEX.fullmatch(path)]
    is_pipeline = PIPELINE in found.files
    options = (safe + indexes) or [path for path in at_root if path.endswith((".gguf", *PICKLES))]
    has_recipes = any(path.endswith(".toml") for path in at_root)
    if (is_pipeline and not safe) or (has_recipes and not any(path.endswith(MODELS) for path in found.files)):
        return ""
    if len(options) == 1 and not is_pipeline:
        return options[0]
    raise _ambiguous(what, found, options, is_pipeline=is_pipeline)


def _ambiguous(what: Reference, found: Listing, options: list[str], *, is_pipeline: bool) -> HubError:
    options = options or [path for path in found.files if path.endswith(MODELS)]
    if not options:
        return HubError(
            f"`{what}` holds no model file", hint=f"look at {endpoint()}/{what.repo}", reason="missing-file"
        )
    shown = [f"`{path}` ({size(found.files[path].size)})" for path in sorted(options)[:_SHOWN]]
    more = f" and {len(options) - _SHOWN} more" if len(options) > _SHOWN else ""
    whole = ", and is a diffusers folder" if is_pipeline else ""
    choice = Reference(what.repo, what.revision, sorted(options)[0])
    folder = f"; the folder is `{Reference(what.repo, what.revision, PIPELINE)}`" if is_pipeline else ""
    return HubError(
        f"`{what}` holds several models: {', '.join(shown)}{more}{whole}",
        hint=f"name one: `{choice}`{folder}; `sdops pull {Reference(what.repo, what.revision)}/` brings everything",
        reason="ambiguous",
        files=sorted(options),
    )


def _missing(what: Reference, found: Listing) -> HubError:
    close = get_close_matches(what.path, found.files, n=1, cutoff=0.5)
    models = [path for path in found.files if path.endswith(MODELS)]
    if close:
        hint = f"did you mean `{Reference(what.repo, what.revision, close[0])}`?"
    elif models:
        hint = f"its models are {', '.join(f'`{path}`' for path in models[:_SHOWN])}"
    else:
        hint = f"look at {endpoint()}/{what.repo}"
    where = f" at `{what.revision}`" if what.revision else ""
    return HubError(f"`{what.repo}` has no file `{what.path}`{where}", hint=hint, reason="missing-file")
