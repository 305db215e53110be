"""Several concepts of custom diffusion in one model, in closed form: no training, and a rank per token.

Every concept's words must give the keys and values that they give in its own model; what all other texts give changes
as little as can be (core.constrained). Texts come from the model's own text encoder.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from sdops import __version__, standin
from sdops.core.constrained import Constraint, constraint, independent
from sdops.core.run import default_jobs
from sdops.errors import MismatchError, UsageError
from sdops.hub import located
from sdops.report import Progress, Report, Section, silent
from sdops.text import count, duration, size
from sdops.verbs._apply_base import open_base
from sdops.verbs._captions import captions, read_captions
from sdops.verbs._custom_open import (
    ConceptFile,
    Doubles,
    FilePath,
    base_values,
    check_model,
    open_concepts,
)
from sdops.verbs._custom_write import lora_source, write_lora
from sdops.verbs._inputs import Model, Opened

if TYPE_CHECKING:
    from torch import Tensor

    from sdops.verbs._clip_text import Text

DTYPES = {"fp32": "F32", "fp16": "F16", "bf16": "BF16"}
CAPTIONS = 200
_TRAINED = (".to_k", ".to_v")


@dataclass(frozen=True, slots=True)
class Target:
    """A text whose tokens are to work as in a concept's own model.

    Attributes:
        caption: With new words.
        file: Number of the concept's file.
        start: First token that counts: what stands before the word is left out.
    """

    caption: str
    file: int
    start: int


def merge(
    *files: FilePath,
    model: Model,
    output: FilePath,
    classes: Sequence[str] = (),
    words: Sequence[FilePath] = (),
    captions_file: FilePath | None = None,
    to: str = "kohya",
    dtype: str = "fp32",
    jobs: int | None = None,
    force: bool = False,
    dry_run: bool = False,
    hash_inputs: bool = True,
    progress: Progress = silent,
) -> Report:
    """Put several concepts into one file, whose words work as in their own models.

    For each word w of class c the tokens of "w c" and "photo of a w c" ("painting in the style of w c" for art) are
    mapped as in the concept's model, exactly; 200 captions of common words as little changed as can be.

    Args:
        files: Custom diffusion of any layout, for one family, with words.
        model: The checkpoint that all were trained on.
        output: Where to write.
        classes: What each word is, e.g. `cat`: one for each file, or for each word.
        words: Embeddings of files that lie elsewhere, one for each file.
        captions_file: Other captions to be kept, one a line.
        to: A dialect of LoRA (kohya, comfy, diffusers ...), or `webui`: factors as custom-diffusion-webui has them.
        dtype: fp32, fp16 or bf16.
        jobs: Threads for writing.
        force: Replace an existing output.
        dry_run: Only work it out.
        hash_inputs: Record the inputs' SHA-256.
        progress: Called as `progress(label, total_bytes)`.

    Raises:
        UsageError: too few files, or classes that do not fit them.
        MismatchError: a file has no words, or is for another family, or the model has no text encoder.
        OutputError: the output exists or cannot be written.
    """
    if dtype not in DTYPES:
        raise UsageError(f"there is no dtype `{dtype}`", hint=f"one of {', '.join(DTYPES)}")
    if not files:
        raise UsageError("`custom merge` needs files", hint="`sdops custom merge A B --model M -o C.safetensors`")
    if words and len(words) != len(files):
        raise UsageError(
            f"there are {len(files)} files and {len(words)} of words", hint="give one each: `--words A --words B`"
        )
    begin, path, base = time.monotonic(), Path(output), open_base(model)
    concepts = [open_concepts(file, words[i : i + 1]) for i, file in enumerate(files)]
    _check(concepts, base)
    renamed = _renamed(concepts)
    _check_output(path, concepts, base, to, force=force)
    targets = _targets(concepts, classes)
    keep = captions(CAPTIONS) if captions_file is None else read_captions(standin.real(located(captions_file)))
    kept, rows, owners = _features(base, concepts, targets, keep)
    found = independent(rows)
    solved = constraint(kept, rows[found])
    factors, missed = _factors(concepts, base, solved, [owners[number] for number in found])
    report = _report(concepts, base, targets, renamed, solved, missed, kept, factors, path)
    report.data |= {"dry_run": dry_run, "to": to, "dtype": dtype}
    if dry_run:
        report.hints.append("nothing was written; leave `--dry-run` away to write it")
        return report
    source = lora_source(concepts, factors, DTYPES[dtype], path.name)
    recipe = {"version": __version__, "verb": "custom merge", "classes": list(classes), "to": to, "dtype": dtype}
    nbytes = write_lora(
        source, concepts, base, factors, recipe, to, path,
        jobs=jobs or default_jobs(), force=force, hash_inputs=hash_inputs, progress=progress,
    )  # fmt: skip
    report.data["bytes"] = nbytes
    report.sections.append(
        Section("Result", [["wrote", f"{path}, {size(nbytes)} in {duration(time.monotonic() - begin)}"]])
    )
    return report


# ------------------------------------------------------------------------------------------------------------- checks


def _check(files: Sequence[ConceptFile], base: Opened) -> None:
    for file in files:
        check_model(file, base)
        if not file.words:
            raise MismatchError(
                f"`{file.path}` has no words, neither inside nor beside it",
                hint="name the embedding that belongs to it with `--words`, one for each file",
            )
        others = [edit for edit in file.concepts.edits if not edit.layer.endswith(_TRAINED)]
        if others:
            raise MismatchError(
                f"`{file.path}` also changes queries (`{others[0].layer}`), which the closed form does not cover",
                hint="turn the files into LoRAs and merge these: `sdops custom to-lora`, then `sdops merge`",
            )


def _check_output(path: Path, files: Sequence[ConceptFile], base: Opened, to: str, *, force: bool) -> None:
    from sdops.core.sink import check_inputs, check_target
    from sdops.dialects import dialect

    if to != "webui":
        dialect(to)
    check_inputs(path, [*(p for file in files for p in file.paths), *base.files])
    check_target(path, force=force)


def _renamed(files: Sequence[ConceptFile]) -> dict[str, str]:
    """Give words that several files have names of their own: every training calls its first one <new1>.

    Returns `FILE: old` -> new.
    """
    taken: set[str] = set()
    renamed = {}
    for file in files:
        words = {}
        for name, parts in file.words.items():
            new, number = name, 1
            while new in taken:
                number += 1
                new = f"<new{number}>"
            taken.add(new)
            words[new] = parts
            if new != name:
                renamed[f"{file.path}: {name}"] = new
        file.words = words
    return renamed


def _targets(files: Sequence[ConceptFile], classes: Sequence[str]) -> list[Target]:
    """Two texts for each word.

    Raises:
        UsageError: there are neither as many classes as files nor as many as words.
    """
    owners = [(number, word) for number, file in enumerate(files) for word in file.words]
    if classes and len(classes) not in (len(files), len(owners)):
        raise UsageError(
            f"there are {count(len(files), 'file')} with {count(len(owners), 'word')} and {len(classes)} classes",
            hint="give one each: `--class cat --class chair`",
        )
    found = []
    for index, (number, word) in enumerate(owners):
        own = "" if not classes else classes[index] if len(classes) == len(owners) else classes[number]
        phrase = f"{word} {own}".strip()
        before = "painting in the style of" if "art" in own.lower().split() else "photo of a"
        found += [Target(phrase, number, 1), Target(f"{before} {phrase}", number, 1 + len(before.split()))]
    return found


# ---------------------------------------------------------------------------------------------------------- the method


def _features(
    base: Opened, files: Sequence[ConceptFile], targets: Sequence[Target], keep: Sequence[str]
) -> tuple[Doubles, Doubles, list[int]]:
    """K of the captions to be kept [N, d], K* of the targets [n, d], and each of its rows' file."""
    import torch

    from sdops.verbs._clip_text import encoders_of, features, text_of

    found = encoders_of(base, files[0].concepts.edits[0].shape[1])  # keys and values alone, of one family
    known = _vectors(files, {name: encoder.width for name, encoder in found.items()})
    texts: list[Text] = [text_of(target.caption, known) for target in targets]
    starts = [target.start for target in targets]
    others = [text_of(caption, {}) for caption in keep]
    rows = features(found, [*texts, *others])
    wanted = [row[start:] for row, start in zip(rows, starts, strict=False)]
    owners = [target.file for target, row in zip(targets, wanted, strict=True) for _ in range(len(row))]
    begins = [4 if caption.lower().startswith("photo of a ") else 1 for caption in keep]
    kept = [row[start:] for row, start in zip(rows[len(texts) :], begins, strict=True)]
    return torch.cat(kept).double().numpy(), torch.cat(wanted).double().numpy(), owners


def _vectors(files: Sequence[ConceptFile], encoders: Mapping[str, int]) -> dict[str, list[dict[str, Tensor]]]:
    """Word -> for each of its vectors, encoder -> vector. The model's encoders are given with their widths.

    Raises:
        MismatchError: a word lacks an encoder of the model, or its vectors have another width.
    """
    import torch

    known: dict[str, list[dict[str, Tensor]]] = {}
    for file in files:
        for word, parts in file.words.items():
            if lacking := [name for name in encoders if name not in parts]:
                raise MismatchError(
                    f"the word `{word}` of `{file.path}` has no vectors for {', '.join(lacking)}",
                    hint="name an embedding that has with `--words`",
                )
            for name, width in encoders.items():
                if parts[name].width != width:
                    raise MismatchError(
                        f"the word `{word}` of `{file.path}` has {parts[name].width} numbers for {name}, "
                        f"the words of the model {width}",
                        hint="name an embedding that has as many with `--words`",
                    )
            rows = {name: torch.from_numpy(parts[name].values.astype(np.float32)) for name in encoders}
            known[word] = [{name: rows[name][i] for name in encoders} for i in range(len(next(iter(rows.values()))))]
    return known


def _factors(
    files: Sequence[ConceptFile], base: Opened, solved: Constraint, owners: Sequence[int]
) -> tuple[dict[str, tuple[Doubles, Doubles]], float]:
    """Layer -> up [o, n], down [n, d], balanced; and by how much the constraints are missed, relative."""
    import torch

    from sdops.core.lowrank import of_product
    from sdops.core.ranks import fixed

    edits = [{edit.layer: edit for edit in file.concepts.edits} for file in files]
    layers = {file.target(edit).module: edit.layer for file in files for edit in file.concepts.edits}
    found, error, total = {}, 0.0, 0.0
    owned = np.array(owners)
    for module in layers:
        missing = None
        for number, file in enumerate(files):
            edit = next((e for e in edits[number].values() if file.target(e).module == module), None)
            if edit is None:
                continue
            parts = file.values(edit)
            own = parts[0] @ parts[1] if edit.kind == "factors" else parts[0]
            if edit.kind == "whole":
                own = own - base_values(base, file.target(edit))
            if missing is None:
                missing = np.zeros((len(own), len(owned)))
            missing[:, owned == number] = own @ solved.rows[owned == number].T
        if missing is None:
            continue
        up = solved.up(missing)
        change = of_product(torch.from_numpy(up), torch.from_numpy(solved.down), fixed(len(owned)))
        found[module] = change.up.numpy(), change.down.numpy()
        error += float(np.square(found[module][0] @ (found[module][1] @ solved.rows.T) - missing).sum())
        total += float(np.square(missing).sum())
    return found, (error / total) ** 0.5 if total else 0.0


def _report(
    files: Sequence[ConceptFile],
    base: Opened,
    targets: Sequence[Target],
    renamed: Mapping[str, str],
    solved: Constraint,
    missed: float,
    kept: Doubles,
    factors: Mapping[str, tuple[Doubles, Doubles]],
    path: Path,
) -> Report:
    """What is merged, how exactly the words are kept, and how little the rest changes."""
    rank = len(solved.rows)
    moved = _moved(base, files, kept, factors)
    report = Report("custom merge", result=[str(path)])
    report.data = {
        "output": str(path),
        "family": files[0].family,
        "inputs": [str(file.path) for file in files],
        "words": [word for file in files for word in file.words],
        "renamed": dict(renamed),
        "targets": [target.caption for target in targets],
        "rank": rank,
        "layers": len(factors),
        "captions": len(kept),
        "missed": missed,
        "moved": moved,
    }
    rows = [
        ["model", f"{base.name}  ({base.detection.title})"],
        ["concepts", ", ".join(f"{file.path.name} ({', '.join(file.words)})" for file in files)],
        ["layers", f"{len(factors)}, each of rank {rank}: one for each token of the targets"],
        ["words", f"work as in their own models: missed by {missed:.1e} of what they change"],
        ["other texts", f"keys and values of {len(kept):,} tokens of captions move by {moved:.2%}"],
    ]
    report.sections = [Section(str(path), rows), Section("Targets", [[target.caption] for target in targets])]
    for old, new in renamed.items():
        report.warnings.append(f"`{old}` is called `{new}` now, as another file has a word of that name")
    return report


def _moved(
    base: Opened, files: Sequence[ConceptFile], kept: Doubles, factors: Mapping[str, tuple[Doubles, Doubles]]
) -> float:
    """|(W' - W) K^T| / |W K^T| over all layers."""
    gram = kept.T @ kept
    change = whole = 0.0
    edits = {file.target(edit).module: file.target(edit) for file in files for edit in file.concepts.edits}
    for module, (up, down) in factors.items():
        weight = base_values(base, edits[module])
        change += float(np.einsum("ij,ji->", (up.T @ up) @ down @ gram, down.T))
        whole += float(np.einsum("ij,ij->", weight @ gram, weight))
    return (max(change, 0.0) / whole) ** 0.5 if whole else 0.0
