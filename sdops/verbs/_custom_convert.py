"""Custom diffusion from any layout to any other that can hold it, bit for bit; words go along."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from sdops.core.sink import check_inputs, check_target
from sdops.core.source import read
from sdops.core.spec import Spec
from sdops.core.tree import Leaf
from sdops.custom_diffusion import ORDER, layout
from sdops.custom_diffusion._types import Edit
from sdops.embeddings._types import Embedding
from sdops.errors import MismatchError, UsageError
from sdops.hub import is_reference
from sdops.report import Report, Section
from sdops.text import instead_of, size
from sdops.verbs._adapter_names import names_of
from sdops.verbs._adapter_source import AdapterSource, Lazy
from sdops.verbs._custom_open import ConceptFile, FilePath, open_concepts, word_tensor
from sdops.verbs._embed_convert import write as write_embeddings
from sdops.verbs._hypernet_open import save

_HOW = {"whole": "whole weights", "delta": "differences", "factors": "factors"}


def convert(
    file: FilePath,
    *,
    to: str,
    output: FilePath | None = None,
    words: Sequence[FilePath] = (),
    force: bool = False,
    dry_run: bool = False,
) -> Report:
    """Write custom diffusion in another layout, its numbers unchanged.

    Whole weights go from adobe to compvis and diffusers and back, factors from compressed to webui and back.

    Args:
        file: Custom diffusion of any layout.
        to: adobe, compvis, compressed, webui or diffusers.
        output: A file or a folder; default: beside the input, as the layout's own program calls it. Words that lie
            beside a file in that layout are written into the same folder.
        words: Embeddings to take along as its words, where they lie elsewhere.
        force: Replace existing outputs.
        dry_run: Only say what would be written.

    Raises:
        UsageError: there is no such layout, or its files end otherwise.
        MismatchError: the layout cannot hold what the file has without computing.
        OutputError: an output exists or cannot be written.
    """
    check_layout(to)
    opened = open_concepts(file, words)
    try:
        kinds = {edit.kind for edit in opened.concepts.edits}
        if not layout(to).holds(kinds):
            raise _cannot_hold(opened, to, kinds)
        path, container = _target(opened, to, output, Path() if is_reference(file) else opened.path.parent)
        check_inputs(path, opened.paths)
        check_target(path, force=force)
        beside = _beside(opened, to, path)
        outputs = [path, *_write_words(beside, to, path, opened.paths, force=force, dry_run=True)]
        tensors: dict[str, Lazy] = {}
        written = layout(to).write(_edits(opened, to, tensors), _words(opened, to, tensors))
        if container == "safetensors":
            written = replace(written, tree={key: leaf for key, leaf in written.tree.items() if type(leaf) is Leaf})
        if not dry_run:
            save(written, container, AdapterSource(path.name, tensors, {}), path, force=force)
            _write_words(beside, to, path, opened.paths, force=force, dry_run=False)
        return _report(opened, to, outputs, sum(lazy.spec.nbytes for lazy in tensors.values()), dry_run=dry_run)
    finally:
        opened.source.close()


def check_layout(name: str) -> None:
    """Raises UsageError if there is no layout of that name."""
    if name not in ORDER:
        raise UsageError(f"there is no layout `{name}` of custom diffusion", hint=instead_of(name, ORDER))


def _cannot_hold(file: ConceptFile, to: str, kinds: AbstractSet[str]) -> MismatchError:
    fitting = [name for name in ORDER if layout(name).holds(kinds)]
    others = " or ".join(f"`--to {name}`" for name in fitting)
    return MismatchError(
        f"`{file.path}` holds {' and '.join(_HOW[kind] for kind in sorted(kinds))}, which `{to}` files cannot hold",
        hint=f"{others} keeps every bit; `sdops custom to-lora` computes factors of a rank",
    )


def _target(file: ConceptFile, to: str, output: FilePath | None, folder: Path) -> tuple[Path, str]:
    """Where the file goes, and its container.

    Raises:
        UsageError: such files end otherwise.
    """
    names = layout(to).NAMES
    path = folder if output is None else Path(output)
    if output is None or os.fspath(output).endswith("/") or path.is_dir():
        stem = file.path.stem.removesuffix(".delta").removeprefix("compressed_")
        return path / next(iter(names.values())).format(stem), next(iter(names))
    endings = {Path(name).suffix: container for container, name in names.items()}
    if path.suffix not in endings:
        ending = next(iter(endings))
        raise UsageError(f"`{to}` files are never `{path.suffix}` files", hint=f"`-o {path.with_suffix(ending)}`")
    return path, endings[path.suffix]


def _edits(file: ConceptFile, to: str, tensors: dict[str, Lazy]) -> list[Edit]:
    """The edits under the names of a layout; their tensors go to `tensors`."""
    names = names_of(file.family)
    spelled = {target: name for name, target in names.modules(names.denoiser, layout(to).LAYERS).items()}
    found = []
    for edit in file.concepts.edits:
        leaves = []
        for leaf in edit.tensors:
            key = str(len(tensors))
            tensors[key] = Lazy(leaf.spec, partial(read, file.source, leaf.key))
            leaves.append(Leaf(key, leaf.spec))
        found.append(replace(edit, layer=spelled[file.target(edit)], tensors=tuple(leaves)))
    return found


def _words(file: ConceptFile, to: str, tensors: dict[str, Lazy]) -> dict[str, Leaf]:
    """The words that go into the file, each [n, width], or one table of all.

    Raises:
        MismatchError: they are for several encoders, or differ in dtype where they share a table.
    """
    if layout(to).WORDS not in ("inside", "table"):
        return {}
    found = {}
    for name, parts in file.words.items():
        if len(parts) != 1:
            raise MismatchError(
                f"`{to}` files hold words for one text encoder, `{name}` has {', '.join(parts)}",
                hint="leave the words out and keep their embedding beside the file",
            )
        found[name] = word_tensor(next(iter(parts.values())))
    if layout(to).WORDS == "table" and found:
        found = {"embed": _table(list(found.values()))}
    leaves = {}
    for name, lazy in found.items():
        key = str(len(tensors))
        tensors[key] = lazy
        leaves[name] = Leaf(key, lazy.spec)
    return leaves


def _table(rows: Sequence[Lazy]) -> Lazy:
    """Words below each other."""
    first = rows[0].spec
    if any(lazy.spec != first or first.shape[0] != 1 for lazy in rows):
        raise MismatchError(
            "a `compvis` file has one table of its words, one row each; these differ in dtype or have more vectors",
            hint="`--to adobe` holds them as they are",
        )
    spec = Spec(first.dtype, (len(rows), first.shape[1]))
    return Lazy(spec, lambda: b"".join(bytes(lazy.make()) for lazy in rows))


def _beside(file: ConceptFile, to: str, path: Path) -> list[Embedding]:
    """The words that go into files of their own; the web UI calls the only one as the weights."""
    if layout(to).WORDS in ("inside", "table"):
        return []
    stem = path.stem.removesuffix(".delta")
    alone = to == "webui" and len(file.words) == 1
    return [Embedding(stem if alone else name, parts, "*" if alone else name) for name, parts in file.words.items()]


def _write_words(
    words: Sequence[Embedding], to: str, path: Path, inputs: Sequence[Path], *, force: bool, dry_run: bool
) -> list[Path]:
    """Each as an embedding beside the weights; returns where."""
    made = []
    for word in words:
        report = write_embeddings(
            [word], layout(to).WORDS, _folder(path), path.parent, inputs, None, force=force, dry_run=dry_run
        )
        made += [Path(each) for each in report.data["outputs"]]
    if dry_run:
        for each in made:
            check_target(each, force=force)
    return made


def _folder(path: Path) -> str:
    return f"{path.parent}/"


def _report(file: ConceptFile, to: str, outputs: Sequence[Path], nbytes: int, *, dry_run: bool) -> Report:
    report = Report("custom convert", result=[str(path) for path in outputs])
    report.data = {
        "input": str(file.path), "outputs": [str(path) for path in outputs], "from": file.layout, "to": to,
        "bytes": nbytes, "words": list(file.words), "left_out": list(file.concepts.unknown), "dry_run": dry_run,
    }  # fmt: skip
    verb = "would write" if dry_run else "wrote"
    rows = [
        [verb, f"{outputs[0]}, {size(nbytes)}"],
        ["layout", f"{file.layout} -> {to}"],
        ["words", ", ".join(f"`{word}`" for word in file.words) or "none"],
        *([verb, str(path)] for path in outputs[1:]),
    ]
    report.sections = [Section("", rows)]
    if renamed := _renamed(file.words, to):
        report.warnings.append(f"`{to}` files number their words: {renamed}")
    report.warnings += [note for note in file.notes if note.startswith("not understood")]
    return report


def _renamed(words: Mapping[str, Any], to: str) -> str:
    """Words that are called otherwise now, where only their order is kept."""
    if layout(to).WORDS != "table":
        return ""
    numbered = [(name, f"<new{number}>") for number, name in enumerate(words, start=1)]
    return ", ".join(f"`{old}` is `{new}` now" for old, new in numbered if old != new)
