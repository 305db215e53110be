"""Several embeddings as one: joined, averaged, added or turned into each other; or side by side in one file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from sdops.embeddings._types import NULL_TEXT, TOKENS, Embedding, Vectors
from sdops.errors import MismatchError, UsageError
from sdops.report import Report
from sdops.text import suggest
from sdops.verbs import _embed_algebra as algebra
from sdops.verbs._embed_algebra import Rows
from sdops.verbs._embed_convert import check_dtype, write
from sdops.verbs._embed_make import usual_layout
from sdops.verbs._embed_open import FilePath, open_embeddings
from sdops.verbs._embed_write import check_kinds, check_layout

MODES = ("join", "average", "sum", "slerp", "collect")


def merge(
    *files: FilePath,
    output: FilePath,
    mode: str = "join",
    weights: Sequence[float] | None = None,
    rows: Sequence[int] | None = None,
    prune: float | None = None,
    to: str | None = None,
    name: str | None = None,
    kind: str | None = None,
    dtype: str | None = None,
    force: bool = False,
    dry_run: bool = False,
) -> Report:
    """Make one embedding of several, or put several into one file; with one file: prune or reorder its vectors.

    Args:
        files: Embeddings of any layout for the same text encoders; files may hold several.
        output: Where to write.
        mode: join: all vectors behind each other. average, sum: vector by vector, with weights. slerp: of two, at
            weights[0] of the way. collect: separate embeddings in one file (diffusers, rinongal, bundle).
        weights: One per embedding; for slerp one number from 0 to 1 (0.5).
        rows: Keep only these vectors of the result, in this order.
        prune: Drop vectors whose cosine with an earlier one is above this, and empty ones.
        to: The layout; default as `make`.
        name: The embedding's own name; default: the output's.
        kind: Settles what one row of 768 is: `tokens` or `clip-image`.
        dtype: Round to `fp32`, `fp16` or `bf16`; default: the values' own where all agree, else fp32.
        force: Replace an existing output.
        dry_run: Only work it out.

    Raises:
        UsageError: no such mode, or weights that do not fit it.
        MismatchError: the embeddings do not fit each other or the layout.
        OutputError: the output exists or cannot be written.
    """
    _check(mode, files)
    wish = check_dtype(dtype)
    opened = [open_embeddings(file, kind) for file in files]
    embeddings = [one for file in opened for one in file.embeddings]
    check_kinds(embeddings)
    if mode == "collect":
        made, layout = embeddings, check_layout(to or "diffusers")
    else:
        one = _merged(embeddings, mode, weights)
        made = [replace(_selected(one, rows, prune), name=name or Path(output).stem)]
        layout = check_layout(to) if to else usual_layout(made[0], Path(output))
    inputs = [path for file in opened for path in file.paths]
    report = write(made, layout, output, Path(), inputs, wish, force=force, dry_run=dry_run)
    report.verb = "embed merge"
    report.data |= {"inputs": [str(path) for path in inputs], "mode": mode}
    return report


def _check(mode: str, files: Sequence[FilePath]) -> None:
    if not files:
        raise UsageError("`embed merge` needs at least one file", hint="`sdops embed merge A B -o C`")
    if mode not in MODES:
        close = suggest(mode, MODES)
        hint = f"did you mean `{close}`?" if close else f"one of {', '.join(MODES)}"
        raise UsageError(f"there is no mode `{mode}`", hint=hint)


def _merged(embeddings: Sequence[Embedding], mode: str, weights: Sequence[float] | None) -> Embedding:
    """One embedding of all, encoder by encoder."""
    first = embeddings[0]
    for other in embeddings[1:]:
        if set(other.vectors) != set(first.vectors) or other.kind != first.kind:
            raise MismatchError(
                f"`{first.name}` is for {', '.join(first.vectors)} ({first.kind}), "
                f"`{other.name}` for {', '.join(other.vectors)} ({other.kind})",
                hint="`sdops embed convert --encoder NAME` takes the vectors for one encoder",
            )
    if first.kind == NULL_TEXT:
        raise MismatchError("null texts belong to one picture and are not merged", hint="`--mode collect` keeps them")
    vectors = {}
    for encoder in first.vectors:
        parts = [one.vectors[encoder] for one in embeddings]
        if len({part.width for part in parts}) > 1:
            raise MismatchError(
                f"vectors for {encoder} have {' and '.join(sorted({str(part.width) for part in parts}))} numbers",
                hint="`sdops embed inspect` shows them",
            )
        dtypes = {part.dtype for part in parts}
        combined = _combined([part.values.astype(np.float64) for part in parts], mode, weights)
        dtype = dtypes.pop() if len(dtypes) == 1 else "F32"
        vectors[encoder] = Vectors(combined if dtype == "F64" else combined.astype(np.float32), dtype)
    return Embedding(first.name, vectors, kind=first.kind)


def _combined(parts: Sequence[Rows], mode: str, weights: Sequence[float] | None) -> Rows:
    if mode == "join":
        if weights is not None:
            raise UsageError("vectors that are joined have no weights", hint="`--mode average` or `--mode sum`")
        return algebra.concat(parts)
    if mode == "slerp":
        t = 0.5 if weights is None else weights[0]
        if len(parts) != 2 or (weights is not None and len(weights) != 1):
            raise UsageError("`slerp` takes two embeddings and one weight", hint="`--weights 0.3`")
        return algebra.slerp(parts[0], parts[1], t)
    weights = [1.0] * len(parts) if weights is None else weights
    if len(weights) != len(parts):
        raise UsageError(
            f"there are {len(parts)} embeddings and {len(weights)} weights", hint="give one each: `--weights 0.7,0.3`"
        )
    return algebra.average(parts, weights) if mode == "average" else algebra.add(parts, weights)


def _selected(one: Embedding, rows: Sequence[int] | None, prune: float | None) -> Embedding:
    """Some of the vectors, the same for all encoders."""
    numbers = list(range(one.rows)) if rows is None else list(rows)
    if not numbers or any(not -one.rows <= number < one.rows for number in numbers):
        raise UsageError(f"there are {one.rows} vectors", hint=f"`--rows` takes numbers from 0 to {one.rows - 1}")
    if prune is not None and one.kind == TOKENS:
        alls = np.concatenate([part.values[numbers].astype(np.float64) for part in one.vectors.values()], axis=1)
        numbers = [numbers[number] for number in algebra.distinct(alls, prune)]
    if not numbers:
        raise MismatchError("nothing is left: all vectors are zeros", hint="leave `--prune` out")
    return replace(one, vectors={name: Vectors(part.values[numbers], part.dtype) for name, part in one.vectors.items()})
