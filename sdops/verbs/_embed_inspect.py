"""What embeddings are: family, vectors, neighbours in the vocabulary, health, and how files relate to each other."""

from __future__ import annotations

import os
from collections.abc import Sequence
from itertools import combinations
from typing import Any

from sdops.archs.detect import UNKNOWN
from sdops.embeddings._types import AMBIGUOUS, CLIP_IMAGE, NULL_TEXT, OUT, TOKENS, Embedding, Vectors
from sdops.report import HEAT, Report, Section
from sdops.text import count
from sdops.verbs._each import each_file
from sdops.verbs._embed_facts import USUAL_NORMS, Figures, checksum, direction_cosine, figures, health, multiple
from sdops.verbs._embed_open import EmbeddingFile, FilePath, open_embeddings
from sdops.verbs._embed_vocabulary import Neighbour, Table, Vocabulary, read_vocabulary

_FAMILIES = {  # files have the encoders in any order
    frozenset(encoders.split()): name
    for encoders, name in {
        "clip_l": "sd1", "clip_h": "sd2", "clip_g": "sdxl", "clip_l clip_g": "sdxl", "clip_l clip_g t5xxl": "sd3",
        "clip_l t5xxl": "flux1", "t5xxl": "T5",
    }.items()
}  # fmt: skip
_SHOWN = 24  # vectors of an embedding that are listed without `-v`
_MATRIX = 24  # embeddings in a matrix of similarities
_KINDS = {
    TOKENS: "words' vectors", CLIP_IMAGE: "CLIP image vector (aesthetic); stands for no word",
    NULL_TEXT: "null texts, one a step",
}  # fmt: skip


def inspect(
    *files: FilePath, model: FilePath | None = None, near: int = 3, kind: str | None = None, matrix: bool = True
) -> Report:
    """Family, vectors, name, origin and checksum of embeddings, in files of any layout; what is odd about them.

    Args:
        files: Paths.
        model: A checkpoint whose words the vectors are compared with.
        near: So many nearest words of each vector, by cosine and by distance.
        kind: Settles what one row of 768 is: `tokens` or `clip-image`.
        matrix: Compare the embeddings with each other.

    Raises:
        SdopsError: the only file cannot be read, or the model.
    """
    vocabulary = read_vocabulary(model) if model is not None else None
    opened: list[EmbeddingFile] = []

    def look(path: FilePath) -> Report:
        found = open_embeddings(path, kind)
        opened.append(found)
        return _file(found, vocabulary, near)

    report = each_file("embed inspect", files, look)
    plain = [file.path.name for file in opened]
    names = plain if len(set(plain)) == len(plain) else [str(file.path) for file in opened]
    embeddings = [
        (name if len(file.embeddings) == 1 else f"{name}: {one.name}", one)
        for name, file in zip(names, opened, strict=True)
        for one in file.embeddings
    ]
    if matrix and len(embeddings) > 1:
        _compare(embeddings, report)
    return report


def family(one: Embedding) -> str:
    """The model family that an embedding is for."""
    if one.kind == CLIP_IMAGE:
        return "CLIP ViT-L/14"
    if one.kind == AMBIGUOUS:
        return "sd1, or CLIP ViT-L/14"
    return _FAMILIES.get(frozenset(name.removesuffix(OUT) for name in one.vectors), UNKNOWN)


def _file(file: EmbeddingFile, vocabulary: Vocabulary | None, near: int) -> Report:
    report = Report("embed inspect")
    report.data = {
        "file": str(file.path),
        "bytes": sum(os.path.getsize(path) for path in file.paths),
        "layout": file.layout,
        "container": file.container,
        "paths": [str(path) for path in file.paths],
        "notes": file.notes,
        "embeddings": [],
    }
    for one in file.embeddings:
        _embedding(report, file, one, vocabulary, near)
    return report


def _embedding(report: Report, file: EmbeddingFile, one: Embedding, vocabulary: Vocabulary | None, near: int) -> None:
    """Add one embedding's facts to the report."""
    heading = str(file.path) if len(file.embeddings) == 1 else f"{file.path}: {one.name}"
    data: dict[str, Any] = {
        "name": one.name,
        "placeholder": one.placeholder,
        "kind": one.kind,
        "family": family(one),
        "vectors": one.rows,
        "encoders": {name: {"width": part.width, "dtype": part.dtype} for name, part in one.vectors.items()},
        "step": one.step,
        "checkpoint": one.checkpoint,
        "checkpoint_name": one.checkpoint_name,
        "checksum": checksum(one) if one.kind == TOKENS else None,
        "rows": {},
        "health": [],
    }
    sections = [Section(heading, _summary(file, one, data))]
    for name, part in one.vectors.items() if one.kind != NULL_TEXT else ():
        sections += _rows(name, part, data, _table_of(vocabulary, name, part.width), near)
    if data["health"]:
        sections.append(Section("Health", [[line] for line in data["health"]]))
    report.data["embeddings"].append(data)
    report.sections += sections
    report.result.append(f"{heading}: {data['family']}, {count(one.rows, 'vector')}")


def _table_of(vocabulary: Vocabulary | None, encoder: str, width: int) -> Table | None:
    """The model's words, if it has that encoder at all."""
    return vocabulary.table(encoder, width) if vocabulary and encoder in vocabulary.tables else None


def _summary(file: EmbeddingFile, one: Embedding, data: dict[str, Any]) -> list[list[str]]:
    parts = ", ".join(
        f"{name} {' x '.join(map(str, part.values.shape))} {part.dtype}" for name, part in one.vectors.items()
    )
    checkpoint = " ".join(filter(None, [one.checkpoint_name, one.checkpoint and f"[{one.checkpoint}]"]))
    rows = [
        ["family", data["family"]],
        ["kind", _KINDS.get(one.kind, "a word's vector, or a CLIP image vector (aesthetic): `--kind` settles it")],
        ["layout", f"{file.layout} in {file.container}"],
        ["vectors", parts],
        ["name", one.name],
        ["placeholder", "" if one.placeholder == "*" else one.placeholder],
        ["step", "" if one.step is None else f"{one.step:,}"],
        ["trained on", checkpoint],
        ["checksum", data["checksum"] or ""],
        *(["note", note] for note in file.notes),
    ]
    return [row for row in rows if row[1]]


def _rows(name: str, part: Vectors, data: dict[str, Any], table: Table | None, near: int) -> list[Section]:
    """The table of one encoder's vectors; their facts go to `data`."""
    found = figures(part)
    usual = table.usual if table else USUAL_NORMS.get(name)
    data["health"] += [f"{name}: {line}" for line in health(part, found, usual if data["kind"] == TOKENS else None)]
    neighbours = table.near(part.values, near) if table and near else []
    data["rows"][name] = {
        "usual_norm": usual,
        "mean_cosine": found.cosine,
        "directions": _finite(found.directions),
        "each": [_row_facts(found, number, neighbours) for number in range(len(part))],
    }
    rows = [_row(found, number, table, neighbours) for number in range(len(part))]
    columns = ["vector>", "norm>", *(["x word>"] if table else []), "spread>", "lowest>", "highest>"]
    columns += ["nearest by cosine", "nearest by distance"] if neighbours else []
    sections = [Section(f"Vectors for {name}", rows[:_SHOWN], columns)]
    if len(rows) > _SHOWN:
        sections.append(Section(f"Further vectors for {name}", rows[_SHOWN:], columns, detail=True))
    if found.cosine is not None:
        line = f"{len(part)} vectors carry about {found.directions:.1f} directions; mean cosine {found.cosine:.2f}"
        sections.append(Section("", [[line]]))
    return sections


def _row_facts(
    found: Figures, number: int, neighbours: Sequence[tuple[list[Neighbour], list[Neighbour]]]
) -> dict[str, Any]:
    facts: dict[str, Any] = {
        "norm": _finite(found.norms[number]),
        "spread": _finite(found.spreads[number]),
        "lowest": _finite(found.lowest[number]),
        "highest": _finite(found.highest[number]),
    }
    if neighbours:
        for purpose, near in zip(("cosine", "distance"), neighbours[number], strict=True):
            facts[purpose] = [{"id": one.number, "word": one.word, purpose: _finite(one.value)} for one in near]
    return facts


def _row(
    found: Figures,
    number: int,
    table: Table | None,
    neighbours: Sequence[tuple[list[Neighbour], list[Neighbour]]],
) -> list[str]:
    row = [str(number), f"{found.norms[number]:.4g}"]
    if table:
        row.append(f"{found.norms[number] / table.usual:.2f}")
    row += [f"{values[number]:.4g}" for values in (found.spreads, found.lowest, found.highest)]
    if neighbours:
        row += [", ".join(f"{one.word} {one.value:.2f}" for one in near) for near in neighbours[number]]
    return row


def _finite(number: float) -> float | None:
    return float(number) if abs(float(number)) < float("inf") else None


def _compare(embeddings: list[tuple[str, Embedding]], report: Report) -> None:
    """Add the matrix of similarities, and which embeddings are multiples of each other."""
    relations = []
    related: set[int] = set()  # embeddings that are a multiple of an earlier one
    pairs: dict[tuple[int, int], float] = {}
    for (i, (name_a, a)), (j, (name_b, b)) in combinations(enumerate(embeddings), 2):
        shared = next((name for name in a.vectors if name in b.vectors and a.kind == b.kind != NULL_TEXT), None)
        if shared is None or a.vectors[shared].width != b.vectors[shared].width:
            continue
        pairs[i, j] = direction_cosine(a.vectors[shared], b.vectors[shared])
        scale = None if i in related or j in related else _scale(a, b)
        if scale is not None:
            related.add(j)
            relations.append(f"`{name_b}` is {_times(scale)} `{name_a}`")
    names = [name for name, _ in embeddings]
    report.data["similarity"] = [[names[i], names[j], cosine] for (i, j), cosine in pairs.items()]
    report.data["relations"] = relations
    if pairs and len(names) <= _MATRIX:
        report.sections.append(_matrix(names, pairs))
    elif pairs:
        report.hints.append(f"{len(names)} embeddings are too many for a matrix of similarities here; `--json` has it")
    report.sections.append(Section("Relations", [[line] for line in relations]))


def _scale(a: Embedding, b: Embedding) -> float | None:
    """The number that makes b of a, the same for all encoders."""
    if set(a.vectors) != set(b.vectors):
        return None
    scales = [multiple(part, b.vectors[name]) for name, part in a.vectors.items()]
    known = [scale for scale in scales if scale is not None]
    return known[0] if len(known) == len(scales) and max(known) - min(known) < 1e-3 * abs(known[0]) else None


def _times(scale: float) -> str:
    if abs(scale - 1) < 1e-6:
        return "the same as"
    return "the negative of" if abs(scale + 1) < 1e-6 else f"{scale:.4g} times"


def _matrix(names: Sequence[str], pairs: dict[tuple[int, int], float]) -> Section:
    """Cosines of the mean vectors, as a triangle."""
    rows = []
    for j, name in enumerate(names):
        cells = [f"{_shade(pairs[i, j])} {pairs[i, j]:+.2f}" if (i, j) in pairs else "" for i in range(j)]
        rows.append([str(j), name, *cells])
    columns = ["", "cosine of the mean vectors", *map(str, range(len(names) - 1))]
    return Section("Similarity", rows, columns, heat=True)


def _shade(cosine: float) -> str:
    return HEAT[min(int(abs(cosine) * len(HEAT)), len(HEAT) - 1)] * 2
