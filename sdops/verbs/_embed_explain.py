"""Which words an embedding is made of: a sparse formula, and whether it could be chance."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from sdops.core.pursuit import Dictionary, Formula
from sdops.embeddings._types import TOKENS, Embedding, Vectors
from sdops.errors import MismatchError, UsageError
from sdops.report import Report, Section
from sdops.verbs._embed_open import FilePath, choose, open_embeddings
from sdops.verbs._embed_vocabulary import Table, read_vocabulary

ATOMS = ("words", "all")


def explain(
    file: FilePath,
    *,
    model: FilePath,
    terms: int = 8,
    atoms: str = "words",
    positive: bool = False,
    only: str | None = None,
) -> Report:
    """The sum of few words that comes nearest to each vector, with only as many terms as are better than chance.

    Args:
        file: Embeddings of any layout.
        model: A checkpoint of the same family, which gives the words' vectors.
        terms: At most so many per vector.
        atoms: `words`: whole words of three letters or more; `all`: every token.
        positive: No word may be subtracted.
        only: Just the embedding of this name or placeholder.

    Raises:
        UsageError: there is no such embedding or choice of atoms.
        MismatchError: the model has no encoder that the embedding is for.
    """
    if atoms not in ATOMS:
        raise UsageError(f"there are no atoms `{atoms}`", hint=f"one of {', '.join(ATOMS)}")
    if terms < 1:
        raise UsageError(f"{terms} terms explain nothing", hint="`--terms 8`")
    found = open_embeddings(file)
    vocabulary = read_vocabulary(model)
    report = Report("embed explain", {"file": str(file), "model": str(model), "atoms": atoms, "embeddings": []})
    for one in choose(found, only):
        if one.kind != TOKENS:
            raise MismatchError(
                f"`{one.name}` ({one.kind}) is not made of words", hint="`--kind` of `embed convert` settles it"
            )
        data: dict[str, Any] = {"name": one.name, "encoders": {}}
        for encoder in _encoders(one, list(vocabulary.tables)):
            table = vocabulary.table(encoder)
            formulas = _formulas(one.vectors[encoder], table, _numbers(table, atoms), terms, positive=positive)
            data["encoders"][encoder] = _facts(formulas, table)
            report.sections.append(_section(f"{one.name} for {encoder}", formulas, table))
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


def _numbers(table: Table, atoms: str) -> list[int]:
    """The rows that may be terms."""
    words = table.words
    if atoms == "all" or words is None:
        return list(range(len(table.rows)))
    return [number for number in range(len(table.rows)) if words.is_word(number)]


def _formulas(vectors: Vectors, table: Table, numbers: Sequence[int], terms: int, *, positive: bool) -> list[Formula]:
    """A formula for each vector, its rows numbered as the table's."""
    dictionary = Dictionary(table.rows[list(numbers)])
    chance = dictionary.chance(terms * 3, source=table.rows, positive=positive)
    formulas = []
    for vector in np.nan_to_num(vectors.values):
        formula = dictionary.explain(vector, terms, chance, positive=positive)
        rows = [numbers[row] for row in formula.rows]
        formulas.append(
            Formula(rows, formula.coefficients, formula.explained, formula.exact, formula.scores, formula.chance)
        )
    return formulas


def written(formula: Formula, table: Table, digits: int = 6) -> str:
    """A formula as `sdops embed make` reads it; empty if there are no terms. It never begins with a minus."""
    terms = _ordered(formula)
    first = next((index for index, (coefficient, _) in enumerate(terms) if coefficient > 0), 0)
    terms = [*terms[first : first + 1], *terms[:first], *terms[first + 1 :]]
    text = " ".join(f"{'-' if c < 0 else '+'} {abs(c):.{digits}g}*{_spelled(row, table)}" for c, row in terms)
    return f"({text})" if text.startswith("-") else text.removeprefix("+ ")


def _ordered(formula: Formula) -> list[tuple[float, int]]:
    """Coefficients and rows, the largest first."""
    return sorted(zip(formula.coefficients, formula.rows, strict=True), key=lambda term: -abs(term[0]))


def _spelled(number: int, table: Table) -> str:
    """A word that stands for just this token, else `#number`."""
    words = table.words
    return words.shown(number) if words and words.is_word(number) else f"#{number}"


def _facts(formulas: Sequence[Formula], table: Table) -> dict[str, Any]:
    texts = [written(formula, table) for formula in formulas]
    joined = "" if not all(texts) else texts[0] if len(texts) == 1 else f"concat({', '.join(texts)})"
    return {
        "formula": joined,
        "vectors": [
            {
                "formula": text,
                "terms": [
                    {"id": number, "word": table.word(number), "coefficient": coefficient}
                    for coefficient, number in _ordered(formula)
                ],
                "explained": formula.explained,
                "chance": formula.chance,
                "exact": formula.exact,
                "scores": formula.scores,
            }
            for text, formula in zip(texts, formulas, strict=True)
        ],
    }


def _section(heading: str, formulas: Sequence[Formula], table: Table) -> Section:
    rows = []
    for number, formula in enumerate(formulas):
        verdict = "exact" if formula.exact else f"{max(formula.scores, default=0):.1f}"
        shown = written(formula, table, 3) or "nothing: no better than chance"
        rows.append([str(number), shown, f"{formula.explained:.2%}", f"{formula.chance or 0:.1%}", verdict])
    return Section(heading, rows, ("vector>", "sum of words", "explained>", "by chance>", "z>"))
