"""Repair model files: broken position ids, missing parts of names, wrong hashes, junk; everything is told."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterable, Mapping
from pathlib import Path

from sdops import standin
from sdops.archs.detect import detect
from sdops.core.run import default_jobs, run
from sdops.core.sink import check_inputs, check_target, in_safetensors_order
from sdops.core.sink_header import SameDataSink, check_place, encode, recover
from sdops.core.source import Source, aligned
from sdops.core.spec import Spec
from sdops.errors import FormatError, UsageError
from sdops.formats import FileSource, open_source
from sdops.formats._file import read_head
from sdops.formats.safetensors import SafetensorsFile, sniff
from sdops.hub import is_reference, located
from sdops.report import Progress, Report, Section, silent
from sdops.text import suggest
from sdops.verbs._each import FilePath
from sdops.verbs._repairs import HASHES, NAMES, TABLE, Draft
from sdops.verbs.hash import OF_TENSORS, training_part

_LEGACY = "sshs_legacy_hash"
_PIECE = 1 << 20
_ON_REQUEST = [["what there is to repair is done on request only"]]
_NOTHING = [["no known fault in names, header and small tensors; `sdops verify` reads all values"]]

Done = dict[str, list[str]]  # repair -> what it did


def fix(
    file: FilePath,
    *,
    only: Iterable[str] = (),
    output: FilePath | None = None,
    in_place: bool = False,
    force: bool = False,
    dry_run: bool = False,
    progress: Progress = silent,
) -> Report:
    """Find what is known to be wrong with model files, and write a file in which it is right.

    Where nothing is to be repaired, nothing is written. Tensors that no repair names keep their bytes.

    Args:
        file: A model of one file, of any format; bytes after its last tensor are put up with.
        only: Names of repairs (verbs/_repairs.py); default: all but those that remove tensors.
        output: Where to write; default: `NAME.fixed.safetensors` beside the file.
        in_place: Replace the file, once the new one is complete.
        force: Replace an existing output.
        dry_run: Say what would be done, write nothing.
        progress: Called as `progress(label, total_bytes)`.

    Raises:
        UsageError: there is no such repair; an output is given for a repair in place.
        FormatError: the file cannot be read, or is one of several.
        OutputError: the output cannot be written.
    """
    chosen = _chosen(tuple(only))
    path = located(file)
    if in_place and output is not None:
        raise UsageError("either `--in-place` or `--output`", hint="leave one of them out")
    if in_place and is_reference(file):
        raise UsageError(f"`{path}` is on the Hub and cannot be repaired in place", hint="leave `--in-place` out")
    recovered = recover(path) if path.is_file() else False
    source = _open(path)
    try:
        if in_place and not isinstance(source, SafetensorsFile):
            raise FormatError(
                f"`{path}` is not a safetensors file and cannot be repaired in place", hint=f"`sdops fix {path}`"
            )
        draft = _draft(source)
        done = {name: told for name in chosen if name in TABLE and (told := TABLE[name].apply(draft))}
        left = {name: told for name in TABLE if name not in chosen and (told := TABLE[name].apply(draft.copy()))}
        if told := _true_hashes(draft, HASHES in chosen, progress):
            done[HASHES] = told
        folder = Path() if is_reference(file) else path.parent
        target = path if in_place else Path(output) if output is not None else folder / _fixed_name(path)
        if done:
            _write(source, draft, done, target, in_place, force, dry_run, progress)
        report = _report(path, target, done, left, dry_run)
        if not done and output is not None:
            report.warnings.append(f"nothing was to be repaired, so `{output}` was not written")
        if set(done) == {"permissions"} and not in_place:
            report.hints.append(f"`sdops fix {path} --in-place` changes the permissions without a copy")
        if recovered:
            report.warnings.append(f"an earlier change of `{path}` was cut short; its header was put right")
        return report
    finally:
        source.close()


def _chosen(only: tuple[str, ...]) -> tuple[str, ...]:
    for name in only:
        if name not in NAMES:
            close = suggest(name, NAMES)
            hint = f"did you mean `{close}`?" if close else f"there are {', '.join(NAMES)}"
            raise UsageError(f"there is no repair `{name}`", hint=hint)
    defaults = (*(name for name, repair in TABLE.items() if repair.by_default), HASHES)
    return tuple(name for name in NAMES if name in (only or defaults))


def _open(path: Path) -> FileSource:
    """The file, with what may follow its last tensor."""
    if path.is_file() and sniff(path, read_head(path)):
        return SafetensorsFile(path, lenient=True)
    source = open_source(path)
    if len(source.files) != 1:
        source.close()
        raise FormatError(
            f"`{path}` has several files", hint=f"`sdops convert {path} --to safetensors` makes one of them"
        )
    return source


def _draft(source: FileSource) -> Draft:
    """The file as it is; of what is not safetensors, as it will be at least: with `format` and usual permissions."""
    draft = Draft(source, detect(source.specs), {key: key for key in source.specs}, dict(source.metadata))
    if not isinstance(source, SafetensorsFile):
        draft.metadata.setdefault("format", "pt")
        return draft
    draft.surplus, draft.offsets = source.surplus, source.offsets
    if not standin.find(source.path):
        draft.mode = stat.S_IMODE(os.stat(source.path).st_mode)
    return draft


def _fixed_name(path: Path) -> str:
    return f"{path.stem}.fixed.safetensors"


# -------------------------------------------------------------------------------------------------------------- hashes


def _true_hashes(draft: Draft, wanted: bool, progress: Progress) -> list[str]:
    """Hashes in the header: made true where they are wrong, or would become so. They depend on all other repairs."""
    told = []
    stored = [key for key in OF_TENSORS if key in draft.metadata]
    if stored and (wanted or not draft.same_data):
        true = _tensor_hash(_Drafted(draft), progress)
        for key in stored:
            value = f"0x{true}" if key.startswith("modelspec.") else true
            digits = draft.metadata[key].lower().removeprefix("0x")
            if not (len(digits) >= 8 and true.startswith(digits)):
                draft.metadata[key] = value
                told.append(f"`{key}` became {value}")
    if _LEGACY in draft.metadata and (wanted or not draft.same_data):
        true_legacy = _legacy_hash(_Drafted(draft))
        if true_legacy is None:
            del draft.metadata[_LEGACY]
            told.append(f"removed `{_LEGACY}`, which has no value for a header of this length")
        elif true_legacy != draft.metadata[_LEGACY].lower().removeprefix("0x"):
            draft.metadata[_LEGACY] = true_legacy
            told.append(f"`{_LEGACY}` became {true_legacy}")
    return told


def _legacy_hash(source: Source) -> str | None:
    """kohya's hash of a part of the tensors; None if the part reaches into the header."""
    part = training_part({"__metadata__": source.metadata, **_entries(source.specs)})
    if part is None:
        return None
    digest, position = hashlib.sha256(), 0
    for key, spec in source.specs.items():
        start, stop = max(part.start - position, 0), min(part.stop - position, spec.nbytes)
        if start < stop:
            view = aligned(stop - start)
            source.read_into(key, start, view[: stop - start])
            digest.update(view[: stop - start])
        position += spec.nbytes
    return digest.hexdigest()[:8]


def _tensor_hash(source: Source, progress: Progress) -> str:
    """SHA-256 of all tensors in the order of the file."""
    digest, buffer = hashlib.sha256(), aligned(_PIECE)
    with progress("hashing", sum(spec.nbytes for spec in source.specs.values())) as advance:
        for key, spec in source.specs.items():
            for start in range(0, spec.nbytes, _PIECE):
                part = buffer[: min(_PIECE, spec.nbytes - start)]
                source.read_into(key, start, part)
                digest.update(part)
                advance(len(part))
    return digest.hexdigest()


# ------------------------------------------------------------------------------------------------------------- writing


class _Drafted:
    """The draft as a Source, in the order in which it will be written."""

    def __init__(self, draft: Draft) -> None:
        self.name = draft.source.name
        self.specs: Mapping[str, Spec] = _order(draft)
        self.metadata: Mapping[str, str] = draft.metadata
        self._draft = draft

    def read_into(self, key: str, start: int, buffer: memoryview) -> None:
        """From the source, or what a repair put in its place."""
        if key in self._draft.values:
            buffer[:] = self._draft.values[key][1][start : start + len(buffer)]
        else:
            self._draft.source.read_into(self._draft.names[key], start, buffer)

    def close(self) -> None:
        """Nothing to release: the source belongs to whoever opened it."""


def _order(draft: Draft) -> dict[str, Spec]:
    """The new file's tensors: in the order of the old one as long as nothing else moves them."""
    return draft.specs if draft.same_data else in_safetensors_order(draft.specs)


def _entries(specs: Mapping[str, Spec]) -> dict[str, object]:
    """What a header says of tensors that lie one after the other."""
    entries: dict[str, object] = {}
    position = 0
    for key, spec in specs.items():
        end = position + spec.nbytes
        entries[key] = {"dtype": spec.dtype, "shape": list(spec.shape), "data_offsets": [position, end]}
        position = end
    return entries


def _write(
    source: FileSource,
    draft: Draft,
    done: Done,
    target: Path,
    in_place: bool,
    force: bool,
    dry_run: bool,
    progress: Progress,
) -> None:
    if in_place:
        check_place(target)
    if in_place and set(done) == {"permissions"}:
        if not dry_run and draft.mode is not None:
            os.chmod(target, draft.mode)
        return
    if not in_place:
        check_inputs(target, source.files)
        check_target(target, force=force)
    drafted = _Drafted(draft)
    header = encode(_entries(drafted.specs), draft.metadata) or b""
    sink = SameDataSink(target, drafted.specs, header, force=force or in_place)
    if dry_run:
        return
    with sink, progress(f"writing {target.name}", sink.nbytes) as advance:
        run(drafted, sink, jobs=default_jobs(), progress=advance)
        source.check_unchanged()
        sink.commit()
    if "permissions" in done and draft.mode is not None:
        os.chmod(target, draft.mode)


def _report(path: Path, target: Path, done: Done, left: Done, dry_run: bool) -> Report:
    report = Report("fix")
    written = bool(done) and not dry_run
    report.data = {"file": str(path), "output": str(target) if written else None, "repairs": done, "left": left}
    report.result = [str(target)] if written else []
    nothing = "is left as it is" if left else "nothing to repair"
    state = f"-> {target}" if written else "would be repaired" if done else nothing
    rows = [[name if not index else "", text] for name, told in done.items() for index, text in enumerate(told)]
    report.sections = [
        Section(f"{path} {state}", rows or (_ON_REQUEST if left else _NOTHING), ("repair", "what") if rows else ())
    ]
    rows = [[name, text] for name, told in left.items() for text in told]
    report.sections.append(Section("Left as it is", rows, ("repair", "what it would do")))
    if left:
        report.hints = [f"`sdops fix {path} --only {' --only '.join(left)}` does {'the rest' if done else 'so'}"]
    return report
