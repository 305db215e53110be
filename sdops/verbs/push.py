"""Publish a model on the Hub: checked, in one commit, with a model card."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path

from sdops import hub, standin
from sdops.archs.detect import detect
from sdops.core.hashing import sha256
from sdops.errors import FormatError, HubError, SdopsError, UsageError
from sdops.formats import open_source
from sdops.formats._file import irregular, read_head
from sdops.hub import upload
from sdops.hub.listing import MODELS, Listing
from sdops.hub.reference import MAIN, Reference, parse
from sdops.hub.session import endpoint
from sdops.report import Progress, Report, Section, silent
from sdops.text import count, size
from sdops.verbs import _model_card, _private
from sdops.verbs._model_card import MARK, Published

_CARD = "README.md"
_MODELS = (".safetensors", ".gguf")
_PICKLES = (".ckpt", ".pt", ".pth", ".bin", ".pkl", ".pickle")
_TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{30,}")
_ZIP, _PICKLE = b"PK\3\4", re.compile(rb"\x80[\x02-\x05]")


def push(
    path: str | os.PathLike[str],
    repo: str,
    *,
    private: bool = False,
    pr: bool = False,
    revision: str | None = None,
    message: str | None = None,
    base: Sequence[str] = (),
    license_: str | None = None,
    tags: Sequence[str] = (),
    card: bool = True,
    allow_pickles: bool = False,
    dry_run: bool = False,
    progress: Progress = silent,
) -> Report:
    """Upload a file, or all files of a folder, in one commit.

    A model card is written unless the folder, or the repository, has one that somebody wrote.

    Args:
        path: A model file, or a folder.
        repo: owner/name; made if it is not there.
        private: Make a new repository private.
        pr: Open a pull request instead of writing to the branch.
        revision: Branch to write to; default: main.
        message: Of the commit.
        base: Repositories that it was made from, besides those in its metadata.
        license_: For the card.
        tags: More tags for the card.
        card: Write a card.
        allow_pickles: Upload torch checkpoints, too.
        dry_run: Upload nothing, tell what would be.
        progress: Called as `progress(label, total_bytes)`.

    Raises:
        UsageError: `repo` is no name of a repository.
        FormatError: a file is damaged, a pickle, or holds a token.
        HubError: the Hub does not take it, for whatever reason; `data["reason"]` tells which.
    """
    hub.show_progress(progress)
    what = _repository(repo, revision)
    names = {one: _repository(one, None).repo for one in base}
    if license_ is not None and not _model_card.LICENSE.fullmatch(license_):
        raise UsageError(
            f"`{license_}` is no identifier of a licence",
            hint="such as `apache-2.0`, `creativeml-openrail-m`, `openrail++`, `cc-by-nc-4.0`; `other` for all else",
        )
    files = _collect(hub.located(path))
    for file in files.values():
        _check(file, allow_pickles=allow_pickles)
    if not dry_run:
        upload.check_token(what)
    facts = {name: (file.stat().st_size, sha256(file, progress)) for name, file in files.items()}
    model = _describe(hub.located(path), what.repo, files, facts)
    if model is not None:
        _check_secrets(model)
    report = Report("push")
    contents: dict[str, Path | bytes] = dict(files)
    found = upload.existing(what)
    _check_place(what, found, private=private, pr=pr)
    if model is not None:
        model.bases, model.license, model.tags = list(names.values()), license_ or "", tags
        model.files = {**_models_of(found), **facts}
        is_kept = card and _CARD not in files and _has_own_card(what, found)
        if is_kept:
            report.warnings.append("the repository's README.md was not written by `sdops push` and stays as it is")
        writes = card and _CARD not in files and not is_kept
        if writes:
            contents[_CARD] = _model_card.card(model).encode()
        _warn(report, model, cards=writes)
    _send(report, what, contents, found, private=private, pr=pr, message=message or _message(files, model), dry=dry_run)
    return report


def _repository(text: str, revision: str | None) -> Reference:
    found = parse(text if ":" in text else f"hf://{text}")
    if found.path:
        raise UsageError(f"`{text}` is more than a repository", hint=f"`{found.repo}`; files keep their names")
    if revision and found.revision:
        raise UsageError(f"`{text}` names a revision already", hint="leave `--revision` out")
    return Reference(found.repo, revision or found.revision)


def _check_place(what: Reference, found: Listing | None, *, private: bool, pr: bool) -> None:
    """Refuse what would publish more than was asked for, or leave an empty repository behind.

    Raises:
        HubError: the repository is public and shall be private, or is missing and shall have a branch or pull request.
    """
    if found is not None:
        if private and not found.private:
            raise HubError(
                f"`{what.repo}` is there and public, `--private` makes new repositories private",
                hint=f"{endpoint()}/{what.repo}/settings changes it; without `--private` the files are public, too",
                reason="public",
            )
    elif pr:
        raise HubError(
            f"there is no repository `{what.repo}` that a pull request could go to",
            hint="check the name; without `--pr` the repository is made",
            reason="missing-repository",
        )
    elif what.revision not in ("", MAIN):
        raise HubError(
            f"there is no repository `{what.repo}`, and a new one has no branch `{what.revision}`",
            hint="push without `--revision` first",
            reason="missing-revision",
        )


def _collect(path: Path) -> dict[str, Path]:
    """Path in the repository -> file. Hidden files, drafts and links out of the folder stay here.

    What is on the Hub is brought here.
    """
    if not path.is_dir():
        read_head(path)  # refuses what is missing or no file
        return {path.name: standin.real(path)}
    root, is_ours = path.resolve(), standin.is_folder(path)
    files = {}
    for file in sorted(path.rglob("*")):
        name = file.relative_to(path)
        if file.is_file() and not any(part.startswith(".") for part in name.parts):
            if not is_ours and not file.resolve().is_relative_to(root):
                raise irregular(file, 0)
            files[name.as_posix()] = standin.real(file)
    if not files:
        raise SdopsError(f"`{path}` holds no files", hint="name a folder with a model in it")
    return files


def _check(file: Path, *, allow_pickles: bool) -> None:
    """Refuse damaged models, and pickles unless they are wanted.

    Raises:
        FormatError: it is one of these.
    """
    head = read_head(file)
    is_pickle = file.suffix.lower() in _PICKLES or _PICKLE.match(head) or (head[:4] == _ZIP and b"data.pkl" in head)
    if is_pickle and not allow_pickles:
        raise FormatError(
            f"`{file}` is a pickle, which can run code where it is loaded",
            hint=f"`sdops convert {file} --to safetensors` makes it safe; `--allow-pickles` uploads it as it is",
            path=file,
        )
    if file.suffix.lower() in _MODELS:
        open_source(file).close()


def _describe(
    path: Path, repo: str, files: Mapping[str, Path], facts: Mapping[str, tuple[int, str]]
) -> Published | None:
    """The model that the card is about: the folder as a whole, or its largest file; None if there is none."""
    models = sorted((name for name in files if name.endswith((*_MODELS, *_PICKLES))), key=lambda name: -facts[name][0])
    tries = (
        [("", path), *((name, files[name]) for name in models)] if path.is_dir() else [(m, files[m]) for m in models]
    )
    found: Published | None = None
    for name, place in tries:
        try:
            source = open_source(place)
        except SdopsError:
            continue
        with closing(source):
            found = found or Published(repo, facts, name, detect(source.specs), dict(source.metadata))
            found.models[name] = dict(source.metadata)
        if not found.main:  # a folder that is one model
            break
    return found


def _check_secrets(model: Published) -> None:
    """Raises FormatError if metadata hold what gives others the owner's rights."""
    for name, metadata in model.models.items():
        for key, text in metadata.items():
            if _TOKEN.search(text):
                raise FormatError(
                    f"the metadata `{key}` hold what looks like a token of the Hub",
                    hint=f"`sdops meta {name or 'FILE'} --unset {key}` removes it; revoke the token if others saw it",
                )


def _models_of(found: Listing | None) -> dict[str, tuple[int, str]]:
    """Models that the repository has already: size and SHA-256."""
    there = found.files if found else {}
    return {name: (one.size, one.sha256) for name, one in there.items() if one.sha256 and name.endswith(MODELS)}


def _has_own_card(what: Reference, found: Listing | None) -> bool:
    """Whether the repository has a card that a person wrote or changed."""
    if found is None or _CARD not in found.files:
        return False
    text = standin.real(hub.located(f"{Reference(what.repo, found.commit, _CARD)}")).read_text(errors="replace")
    return MARK not in text


def _warn(report: Report, model: Published, *, cards: bool) -> None:
    for name, metadata in model.models.items():
        where = f" of `{name}`" if len(model.models) > 1 else ""
        for key, tells in _private.findings(metadata).items():
            unset = f"`sdops meta {name or 'FILE'} --unset {key}` removes it"
            report.warnings.append(f"the metadata `{key}`{where} hold {tells}; {unset}")
    if cards and not _model_card.base_models(model):
        report.warnings.append("the card names no base model: `--base OWNER/REPO` does")
    if cards and not _model_card.license_of(model):
        report.warnings.append("the card names no licence: `--license NAME` does")


def _message(files: Mapping[str, Path], model: Published | None) -> str:
    name = next(iter(files)) if len(files) == 1 else count(len(files), "file")
    verb = str(model.recipe.get("verb", "")) if model else ""
    return f"Add {name}" + (f" ({verb})" if verb else "")


def _send(
    report: Report,
    what: Reference,
    contents: Mapping[str, Path | bytes],
    found: Listing | None,
    *,
    private: bool,
    pr: bool,
    message: str,
    dry: bool,
) -> None:
    """Upload, or tell what would be uploaded."""
    now = found
    readme = contents.get(_CARD)
    url = f"{endpoint()}/{what.repo}"
    if dry:
        changed = upload.changes(now, contents)
        commit = now.commit if now else ""
    else:
        if now is None:
            if readme is not None:
                upload.check_card(what, readme)
            upload.create(Reference(what.repo), private=private)
            now = upload.existing(what)
        done = upload.upload(what, contents, now, message=message, pull_request=pr)
        changed, url, commit = done.changed, done.url, done.commit
    kind = "there already" if found else f"new, {'private' if private else 'public'}"
    rows = [
        [name, _size(content), "new or changed" if name in changed else "there already"]
        for name, content in contents.items()
    ]
    report.data = {
        "repository": what.repo,
        "created": found is None and not dry,
        "url": url,
        "commit": commit,
        "message": message,
        "changed": list(changed),
        "files": list(contents),
        "dry_run": dry,
    }
    report.sections = [
        Section(f"{what.repo} ({kind})", [["url", url], ["message", message]]),
        Section("Files", rows, ("file", "size>", "")),
    ]
    if dry and isinstance(readme, bytes):
        report.data["card"] = readme.decode()
        report.sections.append(Section("Model card", [[line] for line in readme.decode().splitlines()]))
    report.result = [url]
    if dry:
        report.hints = ["nothing was uploaded; leave `--dry-run` away to upload"]


def _size(content: Path | bytes) -> str:
    return size(len(content) if isinstance(content, bytes) else content.stat().st_size)
