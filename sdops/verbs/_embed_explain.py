"""Which words an embedding is made of: a sparse formula, and whether it could be chance."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sdops.core.pursuit import Dictionary, Formula
from sdops.embeddings._types import AMBIGUOUS, TOKENS, Embedding, Vectors
from sdops.errors import FormatError, MismatchError, UsageError
from sdops.report import Report, Section
from sdops.verbs._embed_formula import FILE_ENDINGS
from sdops.verbs._embed_open import EmbeddingFile, FilePath, choose, open_embeddings
from sdops.verbs._embed_vocabulary import Table, read_vocabulary

ATOMS = ("words", "all")


def explain(
    file: FilePath,
    *,
    model: FilePath,
    terms: int = 8,
    atoms: str = "words",
    atoms_from: Sequence[FilePath] = (),
    positive: bool = False,
    only: str | None = None,
) -> Report:
    """The sum of few words that comes nearest to each vector, with only as many terms as are better than chance.

    Args:
        file: Embeddings of any layout.
        model: A checkpoint of the same family, which gives the words' vectors.
        terms: At most so many per vector.
        atoms: `words`: whole words of three letters or more; `all`: every token.
        atoms_from: Other embeddings, or folders of them, whose vectors may be terms as well: what was it merged from?
        positive: No word may be subtracted.
        only: Just the embedding of this name or placeholder.

    Raises:
        UsageError: there is no such embedding or choice of atoms.
        MismatchError: the model has no encoder that the embedding is for, or one of another width.
    """
    if atoms not in ATOMS:
        raise UsageError(f"there are no atoms `{atoms}`", hint=f"one of {', '.join(ATOMS)}")
    if terms < 1:
        raise UsageError(f"{terms} terms explain nothing", hint="`--terms 8`")
    found = open_embeddings(file)
    vocabulary = read_vocabulary(model)
    others = _opened(atoms_from, found.paths)
    report = Report("embed explain", {"file": str(file), "model": str(model), "atoms": atoms, "embeddings": []})
    report.data["atoms_from"] = [str(other.path) for other in others]
    for one in choose(found, only):
        if one.kind != TOKENS:
            is_open = one.kind == AMBIGUOUS
            how = (
                "`embed convert --kind tokens` says that it is" if is_open else "`sdops embed inspect` shows what it is"
            )
            raise MismatchError(f"`{one.name}` ({one.kind}) is not made of words", hint=how)
        data: dict[str, Any] = {"name": one.name, "encoders": {}}
        for encoder in _encoders(one, list(vocabulary.tables)):
            known = _atoms(vocabulary.table(encoder, one.vectors[encoder].width), atoms, encoder, others)
            formulas = _formulas(one.vectors[encoder], known, terms, positive=positive)
            data["encoders"][encoder] = _facts(formulas, known)
            report.sections.append(_section(f"{one.name} for {encoder}", formulas, known))
            report.result.append(data["encoders"][encoder]["formula"] or f"{one.name}: nothing")
            report.sections.append(Section("", [[f"formula: {data['encoders'][encoder]['formula'] or 'none'}"]]))
        report.data["embeddings"].append(data)
    return report


def _encoders(one: Embedding, known: Sequence[str]) -> list[str]:
    shared = [name for name in one.vectors if name in known]
    if not shared:
        raise MismatchError(
            f"`{one.name}` is for {', '.join(one.vectors)}, the model has words for {', '.join(known)}",
            hint="give a model of the embedding's family with `--model`",
        )
    return shared


def _opened(paths: Sequence[FilePath], own: Sequence[Path]) -> list[EmbeddingFile]:
    """Embeddings that may be terms: files with one each, and those in folders; never the explained one itself.

    Raises:
        UsageError: a file holds several.
    """
    mine = {path.resolve() for path in own}
    opened = []
    for path in map(Path, paths):
        inside = sorted(each for each in path.iterdir() if each.suffix in FILE_ENDINGS) if path.is_dir() else [path]
        for each in inside:
            if each.resolve() in mine:
                continue
            try:
                found = open_embeddings(each)
            except FormatError:
                if path.is_dir():
                    continue  # folders hold other files, too
                raise
            if len(found.embeddings) == 1:
                opened.append(found)
            elif not path.is_dir():
                raise UsageError(
                    f"`{each}` holds {len(found.embeddings)} embeddings, a formula takes files with one",
                    hint=f"`sdops embed convert {each} --to a1111 -o FOLDER/` makes a file of each",
                )
    return opened


@dataclass(frozen=True)
class Atoms:
    """What may be a term of a formula.

    Attributes:
        table: The model's words, which chance is measured with.
        numbers: Those words that may be terms.
        names: Of the vectors of other embeddings, as a formula spells them.
        rows: Words and other vectors [atoms, width].
    """

    table: Table
    numbers: Sequence[int]
    names: Sequence[str]
    rows: NDArray[np.float32]

    def number(self, row: int) -> int | None:
        """The word's number; None for a vector of another embedding."""
        return self.numbers[row] if row < len(self.numbers) else None

    def shown(self, row: int) -> str:
        """For people."""
        number = self.number(row)
        return self.names[row - len(self.numbers)] if number is None else self.table.word(number)

    def spelled(self, row: int) -> str:
        """For formulas: a word that stands for just this token, else `#number`; rows of files."""
        number, words = self.number(row), self.table.words
        if number is None:
            return self.names[row - len(self.numbers)]
        return words.shown(number) if words and words.is_word(number) else f"#{number}"


def _atoms(table: Table, atoms: str, encoder: str, others: Sequence[EmbeddingFile]) -> Atoms:
    words = table.words
    numbers = [n for n in range(len(table.rows)) if atoms == "all" or words is None or words.is_word(n)]
    names, rows = [], [table.rows[numbers]]
    for other in others:
        part = other.embeddings[0].vectors.get(encoder)
        if part is None or part.width != table.width:
            continue
        quoted = f'"{other.path}"' if "'" in str(other.path) else f"'{other.path}'"
        names += [quoted if len(part) == 1 else f"{quoted}[{index}]" for index in range(len(part))]
        rows.append(np.nan_to_num(part.values).astype(np.float32))
    return Atoms(table, numbers, names, np.concatenate(rows))


def _formulas(vectors: Vectors, atoms: Atoms, terms: int, *, positive: bool) -> list[Formula]:
    """A formula for each vector, its rows those of the atoms."""
    dictionary = Dictionary(atoms.rows)
    chance = dictionary.chance(terms, source=atoms.table.rows, positive=positive)
    return [dictionary.explain(vector, terms, chance, positive=positive) for vector in np.nan_to_num(vectors.values)]


def written(formula: Formula, atoms: Atoms, digits: int = 6) -> str:
    """A formula as `sdops embed make` reads it; empty if there are no terms. It never begins with a minus."""
    terms = _ordered(formula)
    first = next((index for index, (coefficient, _) in enumerate(terms) if coefficient > 0), 0)
    terms = [*terms[first : first + 1], *terms[:first], *terms[first + 1 :]]
    text = " ".join(f"{'-' if c < 0 else '+'} {abs(c):.{digits}g}*{atoms.spelled(row)}" for c, row in terms)
    return f"({text})" if text.startswith("-") else text.removeprefix("+ ")


def _ordered(formula: Formula) -> list[tuple[float, int]]:
    """Coefficients and rows, the largest first."""
    return sorted(zip(formula.coefficients, formula.rows, strict=True), key=lambda term: -abs(term[0]))


def _facts(formulas: Sequence[Formula], atoms: Atoms) -> dict[str, Any]:
    texts = [written(formula, atoms) for formula in formulas]
    joined = "" if not all(texts) else texts[0] if len(texts) == 1 else f"concat({', '.join(texts)})"
    return {
        "formula": joined,
        "vectors": [
            {
                "formula": text,
                "terms": [
                    {"id": atoms.number(row), "word": atoms.shown(row), "coefficient": coefficient}
                    for coefficient, row in _ordered(formula)
                ],
                "explained": formula.explained,
                "chance": formula.chance,
                "exact": formula.exact,
                "scores": formula.scores,
            }
            for text, formula in zip(texts, formulas, strict=True)
        ],
    }


def _section(heading: str, formulas: Sequence[Formula], atoms: Atoms) -> Section:
    rows = []
    for number, formula in enumerate(formulas):
        verdict = "exact" if formula.exact else f"{max(formula.scores, default=0):.1f}"
        shown = written(formula, atoms, 3) or "nothing: no better than chance"
        rows.append([str(number), shown, f"{formula.explained:.2%}", f"{formula.chance or 0:.1%}", verdict])
    return Section(heading, rows, ("vector>", "sum of words", "explained>", "by chance>", "z>"))
