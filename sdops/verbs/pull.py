"""Bring a model from the Hub: into the cache that all programs share, or to a place of one's own."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from sdops import hub, standin
from sdops.core import hashing
from sdops.core.run import PIECE_BYTES
from sdops.core.sink import FileSink, check_parent
from sdops.core.source import aligned
from sdops.core.spec import Spec
from sdops.errors import HubError, OutputError, SdopsError, UsageError
from sdops.formats import open_source
from sdops.formats._file import InputFile
from sdops.formats.sharded import INDEX, SHARD
from sdops.hub.reference import parse
from sdops.report import Progress, Report, Section, silent
from sdops.text import count, size

_WEIGHTS = (
    ".safetensors",
    ".bin",
    ".ckpt",
    ".pt",
    ".pth",
    ".gguf",
    ".onnx",
    ".onnx_data",
    ".msgpack",
    ".h5",
    ".tflite",
)
_SHA256 = 64  # digits


def pull(
    reference: str,
    *,
    revision: str | None = None,
    output: str | os.PathLike[str] | None = None,
    force: bool = False,
    progress: Progress = silent,
) -> Report:
    """Download a file, or a folder of diffusers, and compare it with the hashes that the Hub announces.

    Args:
        reference: `hf://owner/repo[@revision]/path`, `owner/repo`, or a link from the browser. Without a path: the one
            model of the repository.
        revision: Branch, tag, commit or refs/pr/N; default: the main branch.
        output: A file, or a folder to put it into; default: nothing but the shared cache.
        force: Replace an existing output.
        progress: Called as `progress(label, total_bytes)`.

    Raises:
        UsageError: the reference is malformed.
        HubError: it cannot be had, for whatever reason; `data["reason"]` tells which.
        OutputError: the output exists, or does not fit on the disk.
    """
    hub.show_progress(progress)
    what = parse(reference if ":" in reference else f"hf://{reference}")
    if revision is not None:
        if what.revision:
            raise UsageError(f"`{reference}` names a revision already", hint="leave `--revision` or `@...` out")
        what = replace(what, revision=revision)
    place = hub.located(str(what))
    inside = {file.relative_to(place).as_posix() if place.is_dir() else file.name: file for file in _wanted(place)}
    target = None if output is None else _target(place, output, force=force)
    standin.prepare(inside.values())
    here = {name: _checked(standin.real(file)) for name, file in inside.items()}
    path = _in_cache(here) if target is None else _copied(here, target, progress, force=force)
    return _report(str(what), place, here, path)


def _wanted(place: Path) -> list[Path]:
    """The files of a model: all shards, and of a folder the weights that would be read and everything small."""
    if place.is_file() and not (INDEX.fullmatch(place.name) or SHARD.fullmatch(place.name)):
        return [place]
    try:
        source = open_source(place)
    except HubError:
        raise
    except SdopsError:  # a folder of something else
        return sorted(file for file in place.rglob("*") if file.is_file())
    source.close()
    if place.is_file():
        return sorted({place, *source.files})
    others = [file for file in place.rglob("*") if file.is_file() and not file.name.endswith(_WEIGHTS)]
    return sorted({*source.files, *others})


def _checked(file: Path) -> Path:
    """A file of the cache; what another program downloaded was not compared with its hash.

    Raises:
        HubError: it is damaged.
    """
    if file.is_symlink() and os.path.isabs(os.readlink(file)):  # a stand-in of what was there already
        file = Path(os.readlink(file))
    blob = file.resolve()
    if len(blob.name) == _SHA256 and hashing.sha256(blob) != blob.name:
        blob.unlink()
        file.unlink(missing_ok=True)
        raise HubError(
            f"`{file.name}` was damaged in the cache, and is removed from it",
            hint="run the command again: it is downloaded once more, and checked",
            reason="damaged",
        )
    return file


def _in_cache(here: dict[str, Path]) -> Path:
    """The file, or the folder that holds all of them."""
    name, file = next(iter(here.items()))
    return file if len(here) == 1 and "/" not in name else file.parents[name.count("/")]


def _target(place: Path, output: str | os.PathLike[str], *, force: bool) -> Path:
    """The file or folder to write.

    Raises:
        OutputError: it exists, or its folder does not.
    """
    path = Path(output)
    if place.is_file() and (path.is_dir() or os.fspath(output).endswith("/")):
        path.mkdir(exist_ok=True)
        path = path / place.name
    check_parent(path)
    if path.exists() and not force:
        raise OutputError(f"`{path}` exists already", hint="`--force` replaces it, `-o` names another place")
    return path


class _Copy(FileSink):
    """A file like another, in the making."""

    def __init__(self, path: Path, nbytes: int, *, force: bool) -> None:
        super().__init__(path, {"": Spec("U8", (nbytes,))}, {}, force=force)

    def _encode_header(self) -> bytes:
        return b""


def _copied(here: dict[str, Path], target: Path, progress: Progress, *, force: bool) -> Path:
    """Copy files out of the cache; a folder appears as a whole."""
    total = sum(file.stat().st_size for file in here.values())
    with progress(f"writing {target.name}", total) as advance:
        if len(here) == 1:
            (file,) = here.values()
            _copy(file, target, advance, force=force)
            return target
        draft = target.with_name(f".sdops-{target.name[:40]}-{os.getpid()}.tmp")
        try:
            for name, file in here.items():
                (draft / name).parent.mkdir(parents=True, exist_ok=True)
                _copy(file, draft / name, advance, force=False)
            if target.is_dir():
                shutil.rmtree(target)
            os.replace(draft, target)
        finally:
            shutil.rmtree(draft, ignore_errors=True)
    return target


def _copy(file: Path, target: Path, advance: Callable[[int], None], *, force: bool) -> None:
    source, buffer = InputFile(file), aligned(PIECE_BYTES)
    try:
        with _Copy(target, source.size, force=force) as sink:
            for start in range(0, source.size, PIECE_BYTES):
                view = buffer[: source.size - start]
                source.read_into(start, view)
                sink.write("", start, view)
                advance(len(view))
            source.check_unchanged()
            sink.commit()
    finally:
        source.close()


def _report(what: str, place: Path, here: dict[str, Path], path: Path) -> Report:
    commit = hub.commit_of(what)
    sizes = {name: file.stat().st_size for name, file in here.items()}
    blobs = {name: file.resolve().name for name, file in here.items()}
    facts = {name: {"bytes": sizes[name], "blob": blobs[name]} for name in here}
    report = Report("pull", data={"reference": what, "commit": commit, "path": str(path), "files": facts})
    report.result = [str(path)]
    rows = [["from", str(place)], ["commit", commit], ["to", str(path)]]
    if len(here) == 1:
        (title,) = here
        rows.append(["size", size(sizes[title])])
        rows += [["sha256", blobs[title]]] if len(blobs[title]) == _SHA256 else []
    else:
        rows.append(["size", f"{size(sum(sizes.values()))} in {count(len(here), 'file')}, all hashes compared"])
        title = Path(what).name
    report.sections = [Section(title, rows)]
    report.hints = [f"`sdops inspect {path}` shows what it is"]
    return report
