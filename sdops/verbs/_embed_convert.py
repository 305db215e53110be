"""Embeddings from any layout to any other, bit for bit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from sdops.core.sink import check_inputs
from sdops.embeddings import layout
from sdops.embeddings._types import OUT, TOKENS, Embedding
from sdops.errors import MismatchError, UsageError
from sdops.hub import is_reference
from sdops.report import Report, Section
from sdops.text import count, suggest
from sdops.verbs._embed_open import EmbeddingFile, FilePath, choose, open_embeddings, partner
from sdops.verbs._embed_write import DTYPES, check_kinds, check_layout, plan_paths, save


def convert(
    file: FilePath,
    *,
    to: str,
    output: FilePath | None = None,
    only: str | None = None,
    encoder: str | None = None,
    name: str | None = None,
    kind: str | None = None,
    lora: FilePath | None = None,
    dtype: str | None = None,
    alone: bool = False,
    force: bool = False,
    dry_run: bool = False,
) -> Report:
    """Write the embeddings of a file in another layout, their values unchanged; both halves of a DreamArtist pair.

    Args:
        file: Any layout: an embedding, a LoRA or a checkpoint that holds some, a picture.
        to: The layout: a1111, diffusers, diffusers_sdxl, kohya, encoders, onetrainer, bundle, png ...
        output: A file, or a folder; default: beside the input, called after the embedding.
        only: Take just the embedding of this name or placeholder.
        encoder: Take just the vectors for this text encoder.
        name: Call the embedding so.
        kind: Settles what one row of 768 is: `tokens` or `clip-image`.
        lora: A LoRA that `bundle` puts the embeddings into; it stays as it is, the output has both.
        dtype: Round to `fp32`, `fp16` or `bf16`; default: as stored.
        alone: Leave the other half of a pair (`X.pt` and `X-neg.pt`) where it is.
        force: Replace existing files.
        dry_run: Only say what would be written.

    Raises:
        UsageError: no such layout, embedding, encoder or dtype.
        MismatchError: the layout cannot hold the embedding.
        OutputError: the output exists or cannot be written.
    """
    to = check_layout(to)
    wish = check_dtype(dtype)
    found = open_embeddings(file, kind)
    embeddings = [_part(one, encoder) for one in choose(found, only)]
    if name is not None:
        embeddings = [_renamed(embeddings, name)]
    check_kinds(embeddings)
    other = None if alone or only is not None else _other_half(found)
    if other is not None:
        embeddings[0] = _as_half(embeddings[0], found.path)
        embeddings.append(_as_partner(_part(other.embeddings[0], encoder), embeddings[0], other.path))
        found.paths += other.paths
    if lora is not None:
        report = _bundled(embeddings, to, Path(lora), output, wish, force=force, dry_run=dry_run)
    else:
        folder = Path() if is_reference(file) else Path(file).parent
        target = _pair_target(output, to) if other is not None else output
        report = write(embeddings, to, target, folder, found.paths, wish, force=force, dry_run=dry_run)
    report.verb = "embed convert"
    report.data |= {"input": str(file), "from": found.layout, "notes": found.notes}
    return report


def _other_half(found: EmbeddingFile) -> EmbeddingFile | None:
    """The file that DreamArtist trains together with this one: the same encoders, one embedding each."""
    path = partner(found.path)
    if len(found.embeddings) != 1 or found.embeddings[0].kind != TOKENS or not path.is_file():
        return None
    other = open_embeddings(path)
    fits = len(other.embeddings) == 1 and set(other.embeddings[0].vectors) == set(found.embeddings[0].vectors)
    return other if fits else None


def _as_half(one: Embedding, path: Path) -> Embedding:
    """A half under a name that tells which: `-neg` in the file's name is often missing in its own."""
    is_short = path.stem.endswith("-neg") and not one.name.endswith("-neg")
    return replace(one, name=f"{one.name}-neg") if is_short else one


def _as_partner(other: Embedding, first: Embedding, path: Path) -> Embedding:
    """The other half under a name that belongs to the first's: some files of a pair have one name for both."""
    base = first.name.removesuffix("-neg")
    name = f"{base}-neg" if path.stem.endswith("-neg") else base
    placeholder = "*" if other.placeholder == first.placeholder else other.placeholder
    return replace(other, name=name, placeholder=placeholder)


def _pair_target(output: FilePath | None, to: str) -> FilePath | None:
    """Where both halves go: two files need a folder, unless one file holds both."""
    if output is not None and Path(output).suffix and not Path(output).is_dir() and not layout(to).HOLDS_MANY:
        raise UsageError(
            "the file is half of a pair, whose halves are converted together",
            hint=f"name a folder: `-o {Path(output).parent}/`; `--alone` converts this half",
        )
    return output


def _bundled(
    embeddings: Sequence[Embedding],
    to: str,
    lora: Path,
    output: FilePath | None,
    dtype: str | None,
    *,
    force: bool,
    dry_run: bool,
) -> Report:
    from sdops.verbs._embed_bundle import add_to_lora

    if to != "bundle" or output is None:
        raise UsageError("`--lora` makes a file with both", hint="`--to bundle --lora LORA -o OUTPUT.safetensors`")
    path = Path(output)
    check_inputs(path, [lora])
    if not dry_run:
        add_to_lora(embeddings, lora, path, force=force, dtype=dtype)
    return _report(embeddings, to, "safetensors", [path], dtype, dry_run=dry_run)


def check_dtype(dtype: str | None) -> str | None:
    """The safetensors name of a dtype as users write it.

    Raises:
        UsageError: there is none.
    """
    if dtype is None or dtype == "keep":
        return None
    if dtype not in DTYPES:
        raise UsageError(f"there is no dtype `{dtype}`", hint=f"one of {', '.join(DTYPES)}")
    return DTYPES[dtype]


def _part(one: Embedding, encoder: str | None) -> Embedding:
    if encoder is None:
        return one
    if encoder not in one.vectors:
        close = suggest(encoder, one.vectors)
        raise UsageError(
            f"`{one.name}` has no vectors for `{encoder}`",
            hint=f"did you mean `{close}`?" if close else f"it has {', '.join(one.vectors)}",
        )
    return replace(one, vectors={encoder.removesuffix(OUT): one.vectors[encoder]})


def _renamed(embeddings: Sequence[Embedding], name: str) -> Embedding:
    if len(embeddings) != 1:
        raise UsageError(
            f"`--name` is for one embedding, here are {len(embeddings)}", hint="take one with `--only NAME`"
        )
    return replace(embeddings[0], name=name, placeholder="*")


def write(
    embeddings: Sequence[Embedding],
    to: str,
    output: FilePath | None,
    folder: Path,
    inputs: Sequence[Path],
    dtype: str | None,
    *,
    force: bool,
    dry_run: bool,
) -> Report:
    """Write embeddings in a layout; the report says where.

    Args:
        embeddings: At least one.
        to: The layout.
        output: A file or a folder; None: in `folder`, called after the embeddings.
        folder: See there.
        inputs: Files that must not be overwritten.
        dtype: Safetensors name; None: as stored.
        force: Replace existing files.
        dry_run: Write nothing.

    Raises:
        MismatchError: the layout cannot hold them.
        OutputError: an output exists or cannot be written.
    """
    container, groups = plan_paths(to, embeddings, output, folder)
    files, paths = [], []
    for path, group in groups:
        for file in layout(to).write(group):
            files.append(file)
            paths.append(path.with_name(path.stem + file.suffix + path.suffix) if file.suffix else path)
    if len(set(paths)) != len(paths):
        raise MismatchError("two embeddings would have one file name", hint="take one at a time with `--only NAME`")
    for path in paths:
        check_inputs(path, inputs)
    if not dry_run:
        save(files, paths, container, force=force, dtype=dtype)
    return _report(embeddings, to, container, paths, dtype, dry_run=dry_run)


def _report(
    embeddings: Sequence[Embedding], to: str, container: str, paths: Sequence[Path], dtype: str | None, *, dry_run: bool
) -> Report:
    rows: list[list[str]] = [
        [
            one.label,
            ", ".join(f"{name} {' x '.join(map(str, part.values.shape))}" for name, part in one.vectors.items()),
        ]
        for one in embeddings
    ]
    data: dict[str, Any] = {
        "outputs": [str(path) for path in paths],
        "layout": to,
        "container": container,
        "dtype": dtype or "keep",
        "dry_run": dry_run,
        "embeddings": [
            {
                "name": one.name,
                "placeholder": one.placeholder,
                "kind": one.kind,
                "encoders": {name: [len(part), part.width] for name, part in one.vectors.items()},
            }
            for one in embeddings
        ],
    }
    heading = f"{'would write' if dry_run else 'wrote'} {count(len(paths), 'file')} ({to})"
    sections = [Section(heading, [[str(path)] for path in paths]), Section("Embeddings", rows)]
    report = Report("embed convert", data, sections, result=[str(path) for path in paths])
    if to == "diffusers" and len(embeddings) > len(paths):
        report.hints.append("diffusers itself loads one word from a file: `--only NAME` writes a file for one of them")
    return report
