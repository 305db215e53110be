"""Puts custom diffusion into a model's weights, and turns it into a LoRA; new words go along where a file has room."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sdops.core.sink import check_inputs
from sdops.errors import MismatchError, UsageError
from sdops.report import Progress, Report, Section, silent
from sdops.verbs._convert_adapter import convert_adapter
from sdops.verbs._custom_open import ConceptFile, FilePath, as_lora, check_model, open_concepts
from sdops.verbs._file_strength import Wish, with_number
from sdops.verbs._inputs import Model, Opened
from sdops.verbs.apply import Apply
from sdops.verbs.apply import apply as apply_loras


def apply(
    model: Model,
    *files: Wish,
    output: FilePath | None = None,
    dtype: str = "keep",
    jobs: int | None = None,
    force: bool = False,
    dry_run: bool = False,
    hash_inputs: bool = True,
    progress: Progress = silent,
) -> Report:
    """Write a model with the changes of custom-diffusion files added: W' = W + sum_i t_i delta_i.

    Whole weights count as the difference to this model's, so it should be the one that they were trained on. New words
    are no weights: they stay in files of their own (`sdops embed convert`).

    Args:
        model: A checkpoint of any layout.
        files: A path, `"PATH:STRENGTH"`, or path and strength.
        output: Where to write; default: a derived name in this folder.
        dtype: Of the changed tensors: keep, fp32, fp16 or bf16.
        jobs: Threads; default: one per core.
        force: Replace an existing output.
        dry_run: Check everything, write nothing.
        hash_inputs: Record the inputs' SHA-256 (remembered between runs).
        progress: Called as `progress(label, total_bytes)`.

    Raises:
        UsageError, MismatchError, FormatError, OutputError: as `sdops.apply`.
    """
    from sdops.verbs._apply_base import open_base

    if not files:
        raise UsageError("no custom-diffusion file was given", hint="`sdops custom apply MODEL FILE:STRENGTH`")
    base = open_base(model)
    opened = [(open_concepts(path), strength) for path, strength in map(with_number, files)]
    for file, _ in opened:
        check_model(file, base)
    loras = [(as_lora(file, base, words=False), strength) for file, strength in opened]
    made = apply_loras(model, lora=loras, touched_dtype=dtype, architecture=opened[0][0].family, allow_unknown=True)
    if not isinstance(made, Apply):
        raise UsageError("an apply without output is lazy")
    target = made.derived_name() if output is None else output
    check_inputs(Path(target), [path for file, _ in opened for path in file.paths])
    if dry_run:
        report = made.dry_run(target, force=force, jobs=jobs)
    else:
        report = made.save(target, jobs=jobs, force=force, hash_inputs=hash_inputs, progress=progress)
    report.verb = "custom apply"
    report.data["words"] = [name for file, _ in opened for name in file.words]
    _tell_words(report, [file for file, _ in opened])
    return report


def _tell_words(report: Report, files: Sequence[ConceptFile]) -> None:
    for file in files:
        if file.words:
            names = ", ".join(f"`{name}`" for name in file.words)
            it_is = "is a new word" if len(file.words) == 1 else "are new words"
            report.warnings.append(f"{names} {it_is}, no weights of a checkpoint: prompts need the embedding, too")
            if file.concepts.words:
                report.hints.append(f"`sdops embed convert {file.path} --to a1111` makes an embedding of each word")


def to_lora(
    file: FilePath,
    *,
    model: FilePath | None = None,
    output: FilePath | None = None,
    words: Sequence[FilePath] = (),
    rank: int | None = None,
    energy: float | None = None,
    to: str = "kohya",
    dtype: str = "keep",
    jobs: int | None = None,
    force: bool = False,
    dry_run: bool = False,
    hash_inputs: bool = True,
    progress: Progress = silent,
) -> Report:
    """Write custom diffusion as a LoRA, new words inside where the dialect has room for them.

    Factors stay what they are, bit for bit; differences become the best factors of a rank; whole weights, too, after
    the model's own are taken away.

    Args:
        file: Custom diffusion of any layout.
        model: The checkpoint that it was trained on; needed for whole weights alone.
        output: Where to write; default: `FILE.lora.safetensors` in this folder.
        words: Embeddings to take along as its words, where they lie elsewhere.
        rank: Highest rank of what is no factors yet; default: 32.
        energy: Keep this share of the squared singular values instead.
        to: The dialect: kohya, comfy, diffusers ...
        dtype: Of what is computed: keep, fp16, bf16 or fp32.
        jobs: Threads.
        force: Replace an existing output.
        dry_run: Check everything, write nothing.
        hash_inputs: Record the inputs' SHA-256.
        progress: Called as `progress(label, total_bytes)`.

    Raises:
        MismatchError: it holds whole weights, and there is no model, or one of another family.
        UsageError, FormatError, OutputError: as `sdops.convert`.
    """
    opened = open_concepts(file, words)
    base = None if model is None else _base(opened, model)
    if opened.needs_base and model is None:
        raise MismatchError(
            f"`{opened.path}` ({opened.layout}) holds whole weights: what it changes is not known without the model",
            hint="name the checkpoint that it was trained on: `--model M`",
        )
    opened.check_finite()
    path = Path(f"{opened.path.stem}.lora.safetensors" if output is None else output)
    check_inputs(path, opened.paths)
    options: dict[str, Any] = {"rank": rank, "energy": energy}
    report = convert_adapter(
        as_lora(opened, base),
        to=to,
        family="lora",
        base=model if opened.needs_base else None,
        output=path,
        dtype=dtype,
        architecture=opened.family,
        jobs=jobs,
        dry_run=dry_run,
        force=force,
        hash_inputs=hash_inputs,
        progress=progress,
        **options,
    )
    report.verb = "custom to-lora"
    report.data |= {"input": str(opened.path), "from": opened.layout, "words": list(opened.words)}
    report.sections[0] = _summary(report, opened, to)
    if not opened.has_dense:  # nothing was computed
        report.sections = report.sections[:1]
    report.warnings += [note for note in opened.notes if note.startswith("not understood")]
    return report


def _summary(report: Report, file: ConceptFile, to: str) -> Section:
    """What was written, of what."""
    kinds = Counter(edit.kind for edit in file.concepts.edits)
    how = {"factors": "factors bit for bit", "delta": "differences as factors", "whole": "whole weights as factors"}
    rows = [
        list(report.sections[0].rows[0]),
        ["layout", f"{file.layout} -> {to}"],
        ["model", file.family],
        ["layers", ", ".join(f"{number} {how[kind]}" for kind, number in kinds.items())],
        ["words", ", ".join(f"`{word}`" for word in file.words) or "none"],
    ]
    return Section("", rows)


def _base(file: ConceptFile, model: FilePath) -> Opened:
    from sdops.verbs._apply_base import open_base

    base = open_base(model)
    check_model(file, base)
    return base
