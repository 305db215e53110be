"""Put files into a repository with one commit: all of them, or none."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any
from warnings import catch_warnings

from sdops import hub
from sdops.core.hashing import sha256
from sdops.errors import HubError
from sdops.hub.download import git_hash
from sdops.hub.listing import Listing, listing
from sdops.hub.reference import Reference
from sdops.hub.session import (
    api,
    causes,
    client,
    endpoint,
    explained,
    has_token,
    is_offline,
    is_transport,
    library,
    patiently,
    utilities,
)
from sdops.report import silent

Content = Path | bytes


@dataclass(frozen=True, slots=True)
class Uploaded:
    """What came of an upload.

    Attributes:
        url: Of the commit or pull request, else of the repository.
        commit: Its hash.
        changed: Paths that are new or different; none if everything was there already.
    """

    url: str
    commit: str
    changed: tuple[str, ...]


def existing(what: Reference) -> Listing | None:
    """What the repository holds now; None if there is none that this token can see.

    Raises:
        HubError: the Hub cannot be asked, or has no such revision.
    """
    try:
        return listing(what)
    except HubError as error:
        if error.data.get("reason") != "missing-repository":
            raise
        return None


def changes(found: Listing | None, files: Mapping[str, Content]) -> tuple[str, ...]:
    """Paths whose content is not what the repository has."""
    return tuple(path for path, content in files.items() if not _is_there(found, path, content))


def _is_there(found: Listing | None, path: str, content: Content) -> bool:
    entry = found.files.get(path) if found else None
    if entry is None or entry.size != (len(content) if isinstance(content, bytes) else content.stat().st_size):
        return False
    if entry.sha256:
        own = hashlib.sha256(content).hexdigest() if isinstance(content, bytes) else sha256(content)
        return own == entry.sha256
    with BytesIO(content) if isinstance(content, bytes) else content.open("rb") as data:
        return git_hash(data, entry.size) == entry.blob


def check_token(what: Reference) -> None:
    """Raises HubError if there is no token, or none may be used."""
    if is_offline():
        raise HubError(
            f"`{what}` cannot be written to: HF_HUB_OFFLINE forbids it", hint="`HF_HUB_OFFLINE=0`", reason="offline"
        )
    if not has_token():
        raise HubError(
            f"uploading to `{what.repo}` needs a token, and none is set",
            hint="`hf auth login`, or set HF_TOKEN, with one that may write",
            reason="token",
        )


def check_card(what: Reference, card: Content) -> None:
    """Ask the Hub whether it takes a README.md, before a repository is made for it.

    Raises:
        HubError: its front matter is wrong.
    """
    text = card.decode() if isinstance(card, bytes) else card.read_text(encoding="utf-8", errors="replace")

    def ask() -> None:
        address = f"{library().constants.ENDPOINT}/api/validate-yaml"
        answer = client().post(address, json={"content": text, "repoType": "model"})
        if answer.status_code == 400:
            raise _bad_card()
        utilities().hf_raise_for_status(answer)

    patiently(what, ask)


def _bad_card() -> HubError:
    return HubError(
        "the Hub does not accept the front matter of the model card `README.md`",
        hint="look at licence, tags and base models: `--dry-run` shows the card, `--no-card` writes none",
        reason="card",
    )


def create(what: Reference, *, private: bool) -> None:
    """Make a repository, unless it is there.

    Raises:
        HubError: the token may not.
    """
    patiently(what, lambda: api().create_repo(what.repo, private=private, exist_ok=True))


def upload(
    what: Reference, files: Mapping[str, Content], found: Listing | None, *, message: str, pull_request: bool
) -> Uploaded:
    """Commit files on top of what was found, or propose to.

    An answer that gets lost does not tell whether the commit was made: the repository does, and is asked.

    Raises:
        HubError: the token may not write, the branch moved meanwhile, or the Hub does not take the files.
    """
    changed = changes(found, files)
    if found is not None and not changed:
        return Uploaded(f"{endpoint()}/{what.repo}", found.commit, ())
    try:
        done = _commit(what, files, found, message=message, pull_request=pull_request)
    except Exception as raised:  # noqa: BLE001 -- all that a foreign library raises becomes a HubError
        error = _behind(raised)
        if not is_transport(error):
            raise _refused(what, error) from None
        done = None
    if done is not None:
        url = str(done.pr_url or done.commit_url)
        return Uploaded(url, str(done.oid), changed)
    if pull_request:
        raise HubError(
            f"the connection broke while a pull request to `{what.repo}` was made",
            hint=f"look at {endpoint()}/{what.repo}/discussions whether it is there before you try again",
            reason="unreachable",
        )
    now = existing(what)
    if now is None or changes(now, files):
        raise HubError(
            f"the connection to `{endpoint()}` broke: nothing was added to `{what.repo}`",
            hint="run the command again; what was transferred is not transferred again",
            reason="unreachable",
        )
    return Uploaded(f"{endpoint()}/{what.repo}/commit/{now.commit}", now.commit, changed)


def _commit(
    what: Reference, files: Mapping[str, Content], found: Listing | None, *, message: str, pull_request: bool
) -> Any:
    add = library().CommitOperationAdd
    total = sum(len(content) if isinstance(content, bytes) else content.stat().st_size for content in files.values())
    if hub.progress() is not silent and sys.stderr is not None and sys.stderr.isatty():
        utilities().enable_progress_bars()  # huggingface_hub knows which bytes need not be sent
    with hub.progress()(f"uploading to {what.repo}", total) as advance:
        operations = [
            add(path_in_repo=path, path_or_fileobj=content if isinstance(content, bytes) else str(content))
            for path, content in files.items()
        ]
        with catch_warnings(action="ignore"):  # what the Hub has to say of a README.md
            done = api().create_commit(
                what.repo,
                operations,
                commit_message=message,
                revision=what.revision or None,
                create_pr=pull_request,
                parent_commit=found.commit if found is not None else None,
            )
        advance(total)
    return done


def _behind(error: BaseException) -> BaseException:
    """Of a content that could not be sent, huggingface_hub says only that; what happened is behind it."""
    if type(error) is not RuntimeError:
        return error
    return next((cause for cause in causes(error) if is_transport(cause) or hasattr(cause, "response")), error)


def _refused(what: Reference, error: BaseException) -> HubError:
    if getattr(getattr(error, "response", None), "status_code", None) == 412:
        return HubError(
            f"`{what.repo}` changed while the files were uploaded: nothing was added",
            hint="run the command again; what was transferred is not transferred again",
            reason="refused",
        )
    if type(error) is ValueError:  # so create_commit tells of a README.md; its other errors are of kinds of their own
        return _bad_card()
    return explained(what, error)
