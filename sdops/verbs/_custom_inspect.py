"""What custom-diffusion files change, by how much, and which words they bring."""

from __future__ import annotations

import os
from collections import Counter
from typing import Any

import numpy as np

from sdops.custom_diffusion._types import Edit
from sdops.report import Report, Section
from sdops.text import size
from sdops.verbs._custom_open import ConceptFile, Doubles, FilePath, base_values, check_model, open_concepts
from sdops.verbs._each import each_file
from sdops.verbs._embed_facts import USUAL_NORMS
from sdops.verbs._inputs import Model, Opened, open_model

_HOW = {
    "whole": "whole weights",
    "delta": "differences, which are added to a model's weights",
    "factors": "factors of differences, which are added to a model's weights",
}


def inspect(*files: FilePath, model: Model | None = None, words: tuple[FilePath, ...] = ()) -> Report:
    """Layers, kinds, ranks and words of custom-diffusion files of all layouts.

    Args:
        files: Paths, or folders that diffusers' training wrote.
        model: The checkpoint that they were trained on: how large the changes are beside its weights.
        words: Embeddings to show as their words, where they lie elsewhere.

    Raises:
        SdopsError: the only file cannot be read, or the model.
    """
    base = None if model is None else open_model(model)

    def look(path: FilePath) -> Report:
        file = open_concepts(path, words)
        try:
            if base is not None:
                check_model(file, base)
            return report_of(file, base)
        finally:
            file.source.close()

    return each_file("custom inspect", files, look)


def report_of(file: ConceptFile, base: Opened | None = None) -> Report:
    """The report on an opened file."""
    kinds = Counter(edit.kind for edit in file.concepts.edits)
    report = Report("custom inspect", result=[f"{file.path}: custom diffusion for {file.family}, {_named(file)}"])
    layers = [_layer(file, edit, base) for edit in file.concepts.edits]
    report.data = {
        "file": str(file.path),
        "bytes": sum(os.path.getsize(path) for path in file.paths),
        "paths": [str(path) for path in file.paths],
        "layout": file.layout,
        "family": file.family,
        "kinds": dict(kinds),
        "layers": layers,
        "words": [_word(file, name) for name in file.words],
        "unknown": list(file.concepts.unknown),
        "notes": file.notes,
    }
    rows = [
        ["kind", "custom diffusion"],
        ["family", file.family],
        ["layout", f"{file.layout}, {size(report.data['bytes'])}"],
        ["changes", f"{_parameters(file)}, as {' and '.join(_HOW[kind] for kind in kinds)}"],
        ["words", _named(file)],
        *(
            [["note", "what whole weights change shows beside their model: `--model M`"]]
            if file.needs_base and base is None
            else []
        ),
        *(["note", note] for note in file.notes),
    ]
    report.sections = [Section(str(file.path), rows), _words(report.data["words"]), *_tables(layers, base)]
    return report


def _named(file: ConceptFile) -> str:
    return ", ".join(f"`{name}`" for name in file.words) or "no words inside or beside it"


def _parameters(file: ConceptFile) -> str:
    counts = Counter(f"{edit.layer.split('.attn2.')[1]} {edit.parameter}" for edit in file.concepts.edits)
    return ", ".join(f"{number} x {name.removesuffix(' weight')}" for name, number in counts.items())


def _word(file: ConceptFile, name: str) -> dict[str, Any]:
    parts = file.words[name]
    return {
        "name": name,
        "encoders": {encoder: [len(part), part.width] for encoder, part in parts.items()},
        "norms": {encoder: np.linalg.norm(part.values, axis=1).tolist() for encoder, part in parts.items()},
    }


def _words(words: list[dict[str, Any]]) -> Section:
    rows = []
    for word in words:
        for encoder, (number, width) in word["encoders"].items():
            norms = ", ".join(f"{norm:.3g}" for norm in word["norms"][encoder])
            usual = USUAL_NORMS.get(encoder)
            rows.append([word["name"], f"{encoder} {number} x {width}", norms, f"{usual:g}" if usual else ""])
    return Section("Words", rows, ("word", "vectors", "norms", "a word's usually"))


def _layer(file: ConceptFile, edit: Edit, base: Opened | None) -> dict[str, Any]:
    """An edit's facts: norms of the change where it is known."""
    parts = file.values(edit)
    weight = None
    if base is not None and edit.parameter == "weight":
        weight = base_values(base, file.target(edit))
    change = _change(edit, parts, weight)
    return {
        "layer": edit.layer,
        "parameter": edit.parameter,
        "kind": edit.kind,
        "shape": list(edit.shape),
        "rank": parts[0].shape[1] if edit.kind == "factors" else None,
        "norm": None if change is None else float(np.linalg.norm(change)),
        "relative": _relative(change, weight),
    }


def _change(edit: Edit, parts: list[Doubles], weight: Doubles | None) -> Doubles | None:
    if edit.kind == "factors":
        return np.asarray(parts[0] @ parts[1])
    if edit.kind == "delta":
        return parts[0]
    return None if weight is None else np.asarray(parts[0] - weight)


def _relative(change: Doubles | None, weight: Doubles | None) -> float | None:
    if change is None or weight is None:
        return None
    return float(np.linalg.norm(change) / max(float(np.linalg.norm(weight)), 1e-300))


def _tables(layers: list[dict[str, Any]], base: Opened | None) -> list[Section]:
    """Largest changes first; all of them with `-v`."""
    known = [layer for layer in layers if layer["norm"] is not None]
    if not known:
        return []
    columns = ["layer", "shape", "rank>", "norm>", *(["of the weight>"] if base else [])]
    ordered = sorted(known, key=lambda layer: -(layer["relative"] or layer["norm"]))
    rows = [_row(layer, base) for layer in ordered]
    total = sum(layer["norm"] ** 2 for layer in known) ** 0.5
    heading = f"Changes, the largest first; {total:.4g} together"
    return [Section(heading, rows[:8], columns), Section("Further changes", rows[8:], columns, detail=True)]


def _row(layer: dict[str, Any], base: Opened | None) -> list[str]:
    shape = " x ".join(map(str, layer["shape"]))
    own = f"{layer['relative']:.2%}" if layer["relative"] is not None else ""
    return [layer["layer"], shape, str(layer["rank"] or ""), f"{layer['norm']:.4g}", *([own] if base else [])]
