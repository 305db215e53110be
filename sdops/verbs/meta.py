"""Show and change the metadata of a safetensors file; the tensors and their hashes stay as they are."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from sdops.core import files
from sdops.errors import FormatError, OutputError, SdopsError, UsageError
from sdops.formats import FileSource, open_source
from sdops.formats.safetensors import SafetensorsFile
from sdops.hub import is_reference, located
from sdops.report import Progress, Report, Section, silent
from sdops.text import count, shorten, size, suggest
from sdops.verbs import _modelspec, _private
from sdops.verbs._each import FilePath
from sdops.verbs._traits import metadata_order

_VALUE = 160  # characters of a value that are shown; all with `-v`
_LEGACY = "sshs_legacy_hash"

# What names of LoRA layers of a UNet tell about the model that they are for.
_LAYOUTS = (
    (re.compile(r"(input|output)_blocks"), "ldm"),
    (re.compile(r"(down|up)_blocks"), "diffusers"),
)


def meta(
    file: FilePath,
    *,
    set_: Mapping[str, str] | None = None,
    unset: Iterable[str] = (),
    strip: Iterable[str] = (),
    strip_training: bool = False,
    strip_workflow: bool = False,
    from_json: FilePath | None = None,
    thumbnail: FilePath | None = None,
    output: FilePath | None = None,
    force: bool = False,
    dry_run: bool = False,
    progress: Progress = silent,
) -> Report:
    """Show the metadata of a model file, or change them.

    Names of ModelSpec may be given without `modelspec.`. First keys are removed, then those of `from_json`, `set_` and
    `thumbnail` are written, in this order. The header is overwritten in place where the new one fits into its room, in
    a way that survives a crash (core/sink_header.py); else the file is replaced by a new one with room to spare.

    Args:
        file: The model file; to be changed it must be one safetensors file.
        set_: Key -> value. `--set` on the command line.
        unset: Keys to remove.
        strip: Patterns (`*`, `?`, `[...]`) of keys to remove.
        strip_training: Remove what trainers note beyond what is needed to use the file: tags, folders, settings.
        strip_workflow: Remove prompts and workflows.
        from_json: A file with an object of keys and values, also as `sdops meta --json` prints it; null removes.
        thumbnail: An image file.
        output: Write to this file instead and leave the input alone.
        force: Replace the output if it exists.
        dry_run: Show what would change.
        progress: Called as `progress(label, total_bytes)` while a file is copied or hashed.

    Raises:
        UsageError: a value is not as ModelSpec wants it; a key to be unset is not there.
        FormatError: the file is no safetensors file and shall be changed.
        OutputError: it cannot be written.
    """
    from sdops.core.sink_header import recover

    path = located(file)
    recovered = recover(path) if path.is_file() else False
    source = open_source(path)
    try:
        wishes = (set_, unset, strip, strip_training, strip_workflow, from_json, thumbnail, output)
        if not any(wishes):
            return _told(_shown(source), recovered, path)
        if output is None and is_reference(file):
            raise OutputError(
                f"`{path}` is on the Hugging Face Hub: files there are not changed in place",
                hint="`-o FILE` writes a changed copy, `sdops push FILE REPO` publishes it",
            )
        if not isinstance(source, SafetensorsFile):
            raise FormatError(
                f"`{path}` is not a safetensors file: its metadata cannot be changed",
                hint=f"`sdops convert {path} --to safetensors` makes one",
            )
        new = _without(source.metadata, tuple(unset), tuple(strip), strip_training, strip_workflow)
        new = _with(new, _read_json(from_json), set_ or {}, thumbnail)
        notes = _completed(source, new) + _kept_true(source, new, progress)
        how = _save(source, new, output, force, dry_run, progress)
        return _told(_changed(source, new, how, notes), recovered, path)
    finally:
        source.close()


# -------------------------------------------------------------------------------------------------------- what to write


def _without(
    metadata: Mapping[str, str], unset: tuple[str, ...], strip: tuple[str, ...], training: bool, workflow: bool
) -> dict[str, str]:
    """What remains."""
    gone = {_modelspec.full_name(name) for name in unset}
    for name in gone - metadata.keys():
        close = suggest(name, metadata)
        hint = f"did you mean `{close}`?" if close else "`sdops meta FILE` shows what is there"
        raise UsageError(f"there is no `{name}` to unset", hint=hint)
    gone |= {key for key in metadata if any(fnmatchcase(key, pattern) for pattern in strip)}
    gone |= set(_private.training_keys(metadata)) if training else set()
    gone |= set(_private.workflow_keys(metadata)) if workflow else set()
    return {key: text for key, text in metadata.items() if key not in gone}


def _with(
    metadata: dict[str, str],
    document: Mapping[str, str | None],
    wishes: Mapping[str, str],
    image: FilePath | None,
) -> dict[str, str]:
    """What is written over it, checked."""
    values: dict[str, str | None] = {**document, **wishes}
    if image is not None:
        values["thumbnail"] = _modelspec.thumbnail(Path(image))
    new = dict(metadata)
    for name, value in values.items():
        key = _modelspec.full_name(name)
        if value is None:
            new.pop(key, None)
            continue
        if not key:
            raise UsageError("a key needs a name", hint="`--set key=value`")
        _modelspec.check(key, value)
        new[key] = value
    return new


def _read_json(path: FilePath | None) -> dict[str, str | None]:
    """Keys and values of a JSON file; what is no text is written as JSON."""
    if path is None:
        return {}
    try:
        document = json.loads(Path(path).read_bytes())
    except OSError as error:
        raise SdopsError(f"`{path}` cannot be read: {error.strerror}", hint="name a JSON file") from error
    except (ValueError, RecursionError) as error:
        raise UsageError(f"`{path}` is no JSON: {error}", hint='it must hold an object: {"title": "..."}') from error
    if isinstance(document, dict) and document.get("verb") == "meta":
        document = document.get("metadata")
    if not isinstance(document, dict):
        raise UsageError(f"`{path}` holds no object of keys and values", hint='for example {"title": "..."}')
    plain = (str, type(None))
    return {
        key: value if isinstance(value, plain) else json.dumps(value, ensure_ascii=False, separators=(",", ":"))
        for key, value in document.items()
    }


def _completed(source: FileSource, new: dict[str, str]) -> list[str]:
    """Add what every ModelSpec has and what can be told from the tensors; returns what does not fit."""
    if not any(key.startswith(_modelspec.PREFIX) and new[key] != source.metadata.get(key) for key in new):
        return []
    found = _told_by_tensors(source)
    for field, value in {"sai_model_spec": _modelspec.VERSION, **found}.items():
        new.setdefault(_modelspec.PREFIX + field, value)
    known, stated = found.get("architecture", ""), new.get(f"{_modelspec.PREFIX}architecture", "")
    if known and stated.partition("/")[0] != known.partition("/")[0]:
        return [f"`{stated}` is written as the architecture; the tensors look like `{known}`"]
    return []


def _told_by_tensors(source: FileSource) -> dict[str, str]:
    """Architecture and implementation in the words of ModelSpec, as far as the tensors tell them."""
    from sdops.archs.detect import detect

    found = detect(source.specs)
    architecture, layout = found.modelspec, found.layout
    if found.family == "adapter":
        base = _base_of_adapter(source)
        architecture = base and f"{base}/lora"
        layout = next((layout for words, layout in _LAYOUTS if any(words.search(key) for key in source.specs)), "")
    if not architecture:
        return {}
    implementation = _modelspec.IMPLEMENTATIONS.get(layout)
    return {"architecture": architecture} | ({"implementation": implementation} if implementation else {})


def _base_of_adapter(source: FileSource) -> str:
    """The architecture that a LoRA is for; empty if its family has several, or the file is not understood."""
    from sdops.archs.tables import tables
    from sdops.verbs._adapters import read_adapter

    try:
        family = read_adapter(source).architecture
    except SdopsError:
        return ""
    return next((table.modelspec.get("default", "") for table in tables() if table.family == family), "")


def _kept_true(source: SafetensorsFile, new: dict[str, str], progress: Progress) -> list[str]:
    """See to it that hashes inside the file say the truth: given ones are checked, kohya's follows its `ss_` keys."""
    from sdops.verbs.hash import OF_TENSORS, STORED, training_legacy

    given = [key for key in STORED if key in new and new[key] != source.metadata.get(key)]
    if any(key in OF_TENSORS for key in given):
        from sdops.core.hashing import digests

        _check_given(new, [key for key in given if key in OF_TENSORS], digests(source.path, progress).tensors or "")
    if _LEGACY not in new or (_LEGACY not in given and _training(new) == _training(source.metadata)):
        return []
    true = training_legacy(source.path, {"__metadata__": new, **_entries(source)})
    if _LEGACY in given:
        _check_given(new, [_LEGACY], true)
        return []
    if true is None:
        del new[_LEGACY]
        return [f"removed `{_LEGACY}`: it depends on the `ss_` keys and cannot be computed anew"]
    new[_LEGACY] = true
    return [f"updated `{_LEGACY}`: it depends on the `ss_` keys"]


def _check_given(new: Mapping[str, str], keys: Iterable[str], true: str | None) -> None:
    for key in keys:
        value = f"0x{true}" if key.startswith(_modelspec.PREFIX) else true
        if new[key] != value:
            hint = f"it is {value}" if value else "a file with so long a header has none: leave it out"
            raise UsageError(f"`{new[key]}` is not the `{key}` of the tensors", hint=hint)


def _training(metadata: Mapping[str, str]) -> dict[str, str]:
    return {key: text for key, text in metadata.items() if key.startswith("ss_")}


# ---------------------------------------------------------------------------------------------------------- writing it


def _header(source: SafetensorsFile) -> bytes:
    """The file's header as it is, with the leading length."""
    header = files.read_bytes(source.fd, source.data_start, 0)
    source.check_unchanged()
    return header


def _entries(source: SafetensorsFile) -> dict[str, Any]:
    """What the header says of the tensors, in its own order and with whatever else it says of them."""
    entries: dict[str, Any] = json.loads(_header(source)[8:])
    entries.pop("__metadata__", None)
    return entries


def _save(
    source: SafetensorsFile,
    new: Mapping[str, str],
    output: FilePath | None,
    force: bool,
    dry_run: bool,
    progress: Progress,
) -> str:
    """Write the header by the cheapest safe way; returns which it was."""
    from sdops.core.sink_header import check_place, encode, replace_header

    if output is None and new == source.metadata:
        return "nothing to change"
    if output is None:
        check_place(source.path)
    entries = _entries(source)
    header = encode(entries, new, source.data_start) if output is None else None
    if header is not None:
        if not dry_run:
            replace_header(source.path, _header(source), header)
        return "in place"
    _copy(source, encode(entries, new) or b"", output, force, dry_run, progress)
    return "rewritten: the header had no room" if output is None else f"written to {output}"


def _copy(
    source: SafetensorsFile,
    header: bytes,
    output: FilePath | None,
    force: bool,
    dry_run: bool,
    progress: Progress,
) -> None:
    """The tensors behind another header, in a new file."""
    from sdops.core.run import default_jobs, run
    from sdops.core.sink import check_inputs
    from sdops.core.sink_header import SameDataSink

    target = source.path if output is None else Path(output)
    if output is not None:
        check_inputs(target, source.files)
    sink = SameDataSink(target, source.specs, header, force=force or output is None)
    if dry_run:
        return
    with sink, progress(f"writing {target.name}", sink.nbytes) as advance:
        run(source, sink, jobs=default_jobs(), progress=advance)
        source.check_unchanged()
        sink.commit()


# ---------------------------------------------------------------------------------------------------------- the report


def _told(report: Report, recovered: bool, path: Path) -> Report:
    if recovered:
        report.warnings.append(f"an earlier change of `{path}` was cut short; its header is as it was before")
    return report


def _shown(source: FileSource) -> Report:
    private = _private.findings(source.metadata)
    report = Report("meta")
    report.data = {"file": str(source.path), "metadata": dict(source.metadata), "private": private}
    report.result = [f"{key}={source.metadata[key]}" for key in sorted(source.metadata, key=metadata_order)]
    report.sections = list(_tables(source.path, source.metadata))
    report.sections.append(Section("Tells more than needed", [[key, what] for key, what in private.items()]))
    report.warnings += _lacking(source.metadata)
    removers = {
        "--strip-workflow": _private.workflow_keys(private),
        "--strip-training": _private.training_keys(private),
    }
    if chosen := " ".join(option for option, keys in removers.items() if keys):
        report.hints.append(f"`sdops meta {source.path} {chosen}` removes it")
    return report


def _lacking(metadata: Mapping[str, str]) -> list[str]:
    names = ", ".join(f"`{name}`" for name in _modelspec.lacking(metadata))
    return [f"ModelSpec asks for {names} as well"] if names else []


def _tables(path: Path, metadata: Mapping[str, str]) -> Iterable[Section]:
    rows = [[key, _modelspec.shown(metadata[key])] for key in sorted(metadata, key=metadata_order)]
    yield Section(str(path), [[key, shorten(text, _VALUE)] for key, text in rows] or [["no metadata"]])
    long = [[key, text] for key, text in rows if len(text) > _VALUE]
    yield Section("In full", long, detail=True)


def _changed(source: SafetensorsFile, new: Mapping[str, str], how: str, notes: list[str]) -> Report:
    old = source.metadata
    report = Report("meta", warnings=[*notes, *_lacking(new)])
    added, removed = [k for k in new if k not in old], [k for k in old if k not in new]
    changed = [k for k in new if k in old and new[k] != old[k]]
    report.data = {
        "file": str(source.path),
        "how": how,
        "added": added,
        "changed": changed,
        "removed": removed,
        "metadata": dict(new),
    }
    report.result = [str(source.path)]
    rows = [["added", key, shorten(_modelspec.shown(new[key]), _VALUE)] for key in added]
    rows += [["changed", key, shorten(_modelspec.shown(new[key]), _VALUE)] for key in changed]
    rows += [["removed", key, size(len(old[key].encode(errors="replace")))] for key in removed]
    report.sections = [Section(f"{source.path}: {how}", rows or [["no change"]], ("", "key", "value") if rows else ())]
    if len(new.get(f"{_modelspec.PREFIX}thumbnail", "")) > _modelspec.LARGE:
        report.warnings.append("the thumbnail is large: ModelSpec recommends a JPEG of 256x256")
    if how == "in place" and os.fstat(source.fd).st_nlink > 1:
        report.warnings.append(f"`{source.path}` has {count(os.fstat(source.fd).st_nlink, 'name')}, all are changed")
    return report
