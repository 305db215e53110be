"""Bring a model from the Hub: into the cache that all programs share, or to a place of one's own."""

from __future__ import annotations

import os
import shlex
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

from sdops import hub, standin
from sdops.core import hashing
from sdops.core.run import PIECE_BYTES
from sdops.core.sink import FileSink, check_parent, check_target
from sdops.core.sink_folder import publish
from sdops.core.source import aligned
from sdops.core.spec import Spec
from sdops.errors import HubError, OutputError, SdopsError, UsageError
from sdops.formats import open_source
from sdops.formats._file import InputFile
from sdops.formats.sharded import INDEX, SHARD
from sdops.hub.download import git_hash
from sdops.hub.listing import PIPELINE
from sdops.hub.mount import mounted
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
_SHA256, _SHA1 = 64, 40  # digits


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
            model of the repository; with a slash at its end, `hf://owner/repo/`, all of it.
        revision: Branch, tag, commit or refs/pr/N; default: the main branch.
        output: A file, or a folder to put it into; default: nothing but the shared cache.
        force: Replace an existing output.
        progress: Called as `progress(label, total_bytes)`.

    Raises:
        UsageError: the reference is malformed.
        HubError: it cannot be had, for whatever reason; `data["reason"]` tells which.
        OutputError: the output exists, would replace other things, or does not fit on the disk.
    """
    hub.show_progress(progress)
    what = parse(reference if ":" in reference else f"hf://{reference}")
    if revision is not None:
        if what.revision:
            raise UsageError(f"`{reference}` names a revision already", hint="leave `--revision` or `@...` out")
        what = replace(what, revision=revision)
    whole = reference.endswith("/") and not what.path
    place = mounted(str(what), whole=whole)
    files = _everything(place) if whole else _wanted(place)
    inside = {file.relative_to(place).as_posix() if place.is_dir() else file.name: file for file in files}
    is_folder = place.is_dir() or len(inside) > 1
    if output is not None and is_folder:
        _check_folder(output, inside, force=force)
    file = None if output is None or is_folder else _target_file(output, place.name, force=force)
    standin.prepare(inside.values())
    here = {name: _checked(standin.real(file)) for name, file in inside.items()}
    if file is not None:
        path = _file_copied(here[place.name], file, progress, force=force)
    elif output is not None:
        path = _folder_copied(here, Path(output), progress, force=force)
    else:
        path = _in_cache(here, is_folder=is_folder)
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
        return _everything(place)
    source.close()
    if place.is_file():
        return sorted({place, *source.files})
    others = [file for file in place.rglob("*") if file.is_file() and not file.name.endswith(_WEIGHTS)]
    return sorted({*source.files, *others})


def _everything(place: Path) -> list[Path]:
    return sorted(file for file in place.rglob("*") if file.is_file())


def _checked(file: Path) -> Path:
    """A file of the cache; what another program downloaded was not compared with its hash.

    Raises:
        HubError: it is damaged.
    """
    if file.is_symlink() and os.path.isabs(os.readlink(file)):  # a stand-in of what was there already
        file = Path(os.readlink(file))
    blob = file.resolve()
    if blob.name != _hash_like(blob.name, blob):
        blob.unlink()
        file.unlink(missing_ok=True)
        raise HubError(
            f"`{file.name}` was damaged in the cache, and is removed from it",
            hint="run the command again: it is downloaded once more, and checked",
            reason="damaged",
        )
    return file


def _hash_like(digest: str, blob: Path) -> str:
    """The hash of a file, of the same kind as another."""
    if len(digest) == _SHA256:
        return hashing.sha256(blob)
    with blob.open("rb") as content:
        return git_hash(content, blob.stat().st_size) if len(digest) == _SHA1 else digest


def _in_cache(here: dict[str, Path], *, is_folder: bool) -> Path:
    """The file, or the folder that holds all of them."""
    name, file = next(iter(here.items()))
    return file.parents[name.count("/")] if is_folder else file


def _target_file(output: str | os.PathLike[str], name: str, *, force: bool) -> Path:
    """The file to write, in a folder if one is named.

    Raises:
        OutputError: it exists, or its folder does not.
    """
    path = Path(output)
    if os.fspath(output).endswith("/") and not os.path.lexists(path):
        check_parent(path)
        return path / name
    path = path / name if path.is_dir() else path
    check_target(path, force=force)
    return path


def _check_folder(output: str | os.PathLike[str], inside: Mapping[str, Path], *, force: bool) -> None:
    """See that a folder can be written. `force` replaces one that holds the same files or a pipeline, no other.

    Raises:
        OutputError: it exists, or its parent does not; a file is named.
    """
    path = Path(output)
    if path.suffix in _WEIGHTS and not os.fspath(output).endswith("/"):
        raise OutputError(
            f"these are {count(len(inside), 'file')}, and `{path}` is the name of one",
            hint=f"`-o FOLDER`; `sdops convert REFERENCE -o {path}` makes one file of shards",
        )
    target = check_parent(path)
    if not os.path.lexists(target):
        return
    if not target.is_dir():
        raise OutputError(f"`{path}` is a file, the output is a folder", hint="`-o` names another place")
    old = [file.relative_to(target).as_posix() for file in target.rglob("*") if not file.is_dir()]
    others = [name for name in old if name not in inside]
    if others and PIPELINE not in old:
        raise OutputError(
            f"the folder `{path}` holds other things, such as `{min(others)}`", hint=f"`-o {path / 'NAME'}`"
        )
    if old and not force:
        raise OutputError(f"`{path}` exists already", hint="`--force` replaces it, `-o` names another place")


class _Copy(FileSink):
    """A file like another, in the making."""

    def __init__(self, path: Path, nbytes: int, *, force: bool) -> None:
        super().__init__(path, {"": Spec("U8", (nbytes,))}, {}, force=force)

    def _encode_header(self) -> bytes:
        return b""


def _file_copied(file: Path, target: Path, progress: Progress, *, force: bool) -> Path:
    """Copy the one file out of the cache."""
    target.parent.mkdir(exist_ok=True)
    with progress(f"writing {target.name}", file.stat().st_size) as advance:
        _copy(file, target, advance, force=force)
    return target


def _folder_copied(here: Mapping[str, Path], path: Path, progress: Progress, *, force: bool) -> Path:
    """Copy files out of the cache; the folder appears as a whole."""
    target = check_parent(path)
    draft = target.with_name(f".sdops-{target.name[:40]}-{os.getpid()}.tmp")
    try:
        with progress(f"writing {target.name}", sum(file.stat().st_size for file in here.values())) as advance:
            for name, file in here.items():
                (draft / name).parent.mkdir(parents=True, exist_ok=True)
                _copy(file, draft / name, advance, force=False)
        publish(draft, target, force=force)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return path


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
    if place.is_dir() or path.suffix in _WEIGHTS:
        report.hints = [f"`sdops inspect {shlex.quote(str(path))}` shows what it is"]
    return report
