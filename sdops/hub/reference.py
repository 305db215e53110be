"""The text of a reference: hf://owner/repo, hf://owner/repo@revision/path/in/it, or a link copied from the browser."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote, unquote

from sdops import settings
from sdops.errors import UsageError

MAIN = "main"
_NAME = r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,94}[A-Za-z0-9])?"
_REFERENCE = re.compile(
    rf"hf:/{{1,2}}(?:models/)?(?P<repo>{_NAME}/{_NAME})(?:@(?P<revision>refs/(?:pr|convert)/[^/]+|[^/]+))?(?:/(?P<path>.*))?"
)
_LINK = re.compile(
    rf"https?:/{{1,2}}(?:www\.)?(?:huggingface\.co|hf\.co)/(?P<repo>{_NAME}/{_NAME})(?:/(?:resolve|blob|tree)/(?P<rest>.+?))?/?(?:\?.*)?"
)
_EXAMPLE = "hf://owner/repo/model.safetensors"
COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True, slots=True)
class Reference:
    """Something on the Hub.

    Attributes:
        repo: owner/name.
        revision: Branch, tag, commit or refs/pr/N; empty = the main branch.
        path: Of a file or folder in it; empty = the repository. A folder may end in a slash.
    """

    repo: str
    revision: str = ""
    path: str = ""

    def __str__(self) -> str:
        at = f"@{quote(self.revision, safe='')}" if self.revision and not _plain(self.revision) else ""
        at = at or (f"@{self.revision}" if self.revision else "")
        return f"hf://{self.repo}{at}" + (f"/{self.path}" if self.path else "")


def _plain(revision: str) -> bool:
    return not re.search("[/%]", revision) or re.fullmatch(r"refs/(?:pr|convert)/[^/]+", revision) is not None


def parse(text: str) -> Reference:
    """Read a reference.

    Raises:
        UsageError: it is none.
    """
    if text.startswith(("https:/", "http:/")):
        return _parse_link(text)
    if re.match(r"hf:/{1,2}(datasets|spaces|buckets|kernels)/", text):
        raise UsageError(f"`{_harmless(text)}` is no repository of models", hint=f"a model is called `{_EXAMPLE}`")
    found = _REFERENCE.fullmatch(text)
    if found is None:
        raise UsageError(f"`{_harmless(text)}` is no reference to the Hub", hint=f"write it as `{_EXAMPLE}`")
    path = found["path"] or ""
    _check_path(text, path)
    return Reference(found["repo"], unquote(found["revision"] or ""), path)


def _parse_link(text: str) -> Reference:
    found = _LINK.fullmatch(_at_home(text))
    if found is None:
        raise UsageError(f"`{_harmless(text)}` is no link to a model on the Hub", hint=f"write it as `{_EXAMPLE}`")
    rest = found["rest"] or ""
    match = re.match(r"refs/(?:pr|convert)/[^/]+|refs%2F[^/]+|[^/]+", rest)
    revision = unquote(match[0]) if match else ""
    path = unquote(rest[match.end() :].lstrip("/")) if match else ""
    _check_path(text, path)
    return Reference(found["repo"], "" if revision == MAIN else revision, path)


def _at_home(link: str) -> str:
    """A link to the Hub that HF_ENDPOINT names, as if it led to huggingface.co."""
    slashes = re.sub(r"(https?):/+", r"\1://", link, count=1)
    home = settings.hub_endpoint()
    return f"https://huggingface.co{slashes.removeprefix(home)}" if home and slashes.startswith(f"{home}/") else link


def _harmless(text: str) -> str:
    """A text for messages, without secrets: before the host of a link, behind a question mark, or tokens."""
    return re.sub(r"(?<=/)[^/@\s]*:[^/@\s]*@|(?<=\?).*|\bhf_\w{8,}", "...", text)


def cached_reference(path: Path) -> str:
    """The reference of a file in huggingface_hub's cache, by its place: models--OWNER--REPO/snapshots/COMMIT/..."""
    cache = Path(os.path.abspath(settings.hub_cache_directory()))
    for candidate in (Path(os.path.abspath(path)), Path(os.path.abspath(_target(path)))):
        if not candidate.is_relative_to(cache):
            continue
        repo, *rest = candidate.relative_to(cache).parts
        owner, _, name = repo.removeprefix("models--").partition("--")
        if repo.startswith("models--") and name and rest[:1] == ["snapshots"] and len(rest) > 2:
            return str(Reference(f"{owner}/{name}", rest[1], "/".join(rest[2:])))
    return ""


def _target(path: Path) -> str:
    """What a link leads to, one step: the stand-in of a file in the cache leads to its name there."""
    return os.readlink(path) if path.is_symlink() else os.fspath(path)


def _check_path(text: str, path: str) -> None:
    """No way out of the repository: dots would be resolved by the server, with the user's token."""
    parts = path.rstrip("/").split("/") if path else []
    if any(part in ("", ".", "..") or not part.isprintable() or "\\" in part for part in parts):
        raise UsageError(f"`{_harmless(text)}` names no file of a repository", hint=f"write it as `{_EXAMPLE}`")
