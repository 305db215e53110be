"""Embeddings made of words and other embeddings by a formula."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from sdops.embeddings._types import OUT, TOKENS, Embedding, Vectors
from sdops.errors import MismatchError, UsageError
from sdops.report import Report
from sdops.verbs._embed_algebra import Rows
from sdops.verbs._embed_convert import check_dtype, write
from sdops.verbs._embed_formula import Meaning, evaluate, files_in, has_words
from sdops.verbs._embed_open import FilePath, open_embeddings
from sdops.verbs._embed_vocabulary import Table, Vocabulary, read_vocabulary
from sdops.verbs._embed_write import check_layout


def make(
    formula: str,
    *,
    output: FilePath,
    model: FilePath | None = None,
    to: str | None = None,
    name: str | None = None,
    dtype: str | None = None,
    force: bool = False,
    dry_run: bool = False,
) -> Report:
    """Make an embedding by a formula of words and files, for every text encoder that all of them have.

    Args:
        formula: E.g. "0.7*painting + 0.3*ink - photo"; `_embed_formula` has the language.
        output: Where to write.
        model: A checkpoint that gives the words' vectors; only needed if the formula has words.
        to: The layout; default: a1111 for one encoder (diffusers with the ending `.safetensors`), else encoders.
        name: The embedding's own name; default: the output's.
        dtype: Round to `fp32` (default), `fp16` or `bf16`.
        force: Replace an existing output.
        dry_run: Only work it out.

    Raises:
        UsageError: the formula makes no sense, or has words without a model.
        MismatchError: its parts do not fit each other.
        OutputError: the output exists or cannot be written.
    """
    wish = check_dtype(dtype)
    layout = check_layout(to) if to else None
    files = {file: open_embeddings(file) for file in files_in(formula)}
    if has_words(formula) and model is None:
        raise UsageError(
            "the formula has words, whose vectors a model gives", hint=f'`sdops embed make "{formula}" --model M`'
        )
    vocabulary = read_vocabulary(model) if model is not None and has_words(formula) else None
    read = {file: _one(found.embeddings, file) for file, found in files.items()}
    encoders = _encoders(vocabulary, read)
    for encoder in encoders:
        _check_widths(encoder, vocabulary, read)
    vectors = {
        encoder: Vectors(evaluate(formula, _meaning(encoder, vocabulary, read)).astype(np.float32))
        for encoder in encoders
    }
    counts = {len(part) for part in vectors.values()}
    if len(counts) > 1:
        raise MismatchError(
            "the formula gives different numbers of vectors for the encoders",
            hint="`prune` looks at each encoder for itself; choose rows with brackets: `x[0,2]`",
        )
    one = Embedding(name or Path(output).stem, vectors)
    layout = layout or usual_layout(one, Path(output))
    inputs = [path for found in files.values() for path in found.paths]
    report = write([one], layout, output, Path(), inputs, wish, force=force, dry_run=dry_run)
    report.verb = "embed make"
    report.data |= {"formula": formula, "model": None if model is None else str(model)}
    return report


def usual_layout(one: Embedding, output: Path) -> str:
    """The layout that most programs read."""
    if one.kind != TOKENS:
        return one.kind.replace("-", "_")
    if len(one.vectors) > 1 or output.suffix == ".pti":
        return "encoders"
    return {".safetensors": "kohya", ".png": "png"}.get(output.suffix, "a1111")


def _one(embeddings: list[Embedding], file: str) -> Embedding:
    if len(embeddings) != 1:
        raise UsageError(
            f"`{file}` holds {len(embeddings)} embeddings, a formula takes files with one",
            hint=f"`sdops embed convert {file} --to a1111 --only {embeddings[0].name!r}`",
        )
    return embeddings[0]


def _encoders(vocabulary: Vocabulary | None, files: Mapping[str, Embedding]) -> list[str]:
    """The encoders that words and all files have in common."""
    sets = [set(one.vectors) for one in files.values()]
    if vocabulary:
        sets.append({name for name, table in vocabulary.tables.items() if table.words})
    if not sets:
        raise UsageError("the formula has neither words nor files", hint="`0.7*painting + 0.3*ink`")
    common = set.intersection(*sets)
    if not common:
        raise MismatchError(
            "the parts of the formula are for different text encoders: "
            + "; ".join(", ".join(sorted(names)) for names in sets),
            hint="`sdops embed inspect` shows which model family a file is for",
        )
    order = list(vocabulary.tables) if vocabulary else list(next(iter(files.values())).vectors)
    return [name for name in order if name in common]


def _check_widths(encoder: str, vocabulary: Vocabulary | None, files: Mapping[str, Embedding]) -> None:
    """Refuse vectors of different widths.

    Raises:
        MismatchError: names every file and the model, with their widths.
    """
    widths = {file: one.vectors[encoder].width for file, one in files.items()}
    if vocabulary and (table := vocabulary.tables.get(encoder.removesuffix(OUT))):
        widths[vocabulary.name] = table.width
    if len(set(widths.values())) > 1:
        told = ", ".join(f"{width} in `{name}`" for name, width in widths.items())
        raise MismatchError(
            f"vectors for {encoder} have different numbers: {told}",
            hint="give a model of the embeddings' family with `--model`; `sdops embed inspect` shows which that is",
        )


def _meaning(encoder: str, vocabulary: Vocabulary | None, files: Mapping[str, Embedding]) -> Meaning:
    table = vocabulary.tables.get(encoder.removesuffix(OUT)) if vocabulary else None

    def words(text: str) -> Rows:
        known = _known(table)
        numbers = known.words.numbers(text) if known.words else []
        if not numbers:
            raise UsageError(f"`{text}` has no tokens", hint="give a word")
        return _picked(known, numbers)

    return Meaning(
        words,
        lambda number: _picked(_known(table), [number]),
        {file: one.vectors[encoder].values.astype(np.float64) for file, one in files.items()},
        table.usual if table else None,
    )


def _known(table: Table | None) -> Table:
    if table is None:
        raise UsageError("the formula has words, whose vectors a model gives", hint="`--model M`")
    return table


def _picked(table: Table, numbers: list[int]) -> Rows:
    if max(numbers) >= len(table.rows):
        raise UsageError(f"the model has no word #{max(numbers)}", hint=f"it has #0 to #{len(table.rows) - 1}")
    return table.rows[numbers].astype(np.float64)
