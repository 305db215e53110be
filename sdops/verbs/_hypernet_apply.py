"""Bakes hypernetworks into a U-Net: exact where they are linear."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sdops import __version__
from sdops.core.run import default_jobs
from sdops.core.sink import check_inputs
from sdops.errors import UsageError
from sdops.report import Progress, Report, Section, silent
from sdops.text import count, duration, size
from sdops.verbs._apply_base import open_base, output_of
from sdops.verbs._apply_output import INDEX, SUFFIX, is_file, is_folder, is_pipeline, is_sharded, save, sink_of, stem_of
from sdops.verbs._file_strength import Wish, with_number
from sdops.verbs._folder_model import as_single_file
from sdops.verbs._hashes import part_record
from sdops.verbs._hypernet_layers import (
    Attention,
    Maps,
    Networks,
    attentions,
    bias_change,
    check_biases,
    contexts_of,
    key_change,
    maps_of,
    of_weights,
    reached,
    value_change,
)
from sdops.verbs._hypernet_open import FilePath, HypernetFile, open_network
from sdops.verbs._inputs import Model, Opened, input_of
from sdops.verbs._provenance import RECIPE, metadata

if TYPE_CHECKING:
    from sdops.core.applied import Applied, Weights
    from sdops.core.precision import Singles

DTYPES = {"keep": "", "fp32": "F32", "fp16": "F16", "bf16": "BF16"}
FAR = 0.9  # R^2 of a fit below which it is another network


def apply(
    model: Model,
    *networks: Wish,
    output: FilePath | None = None,
    fit: bool = False,
    dtype: str = "keep",
    jobs: int | None = None,
    force: bool = False,
    dry_run: bool = False,
    hash_inputs: bool = True,
    progress: Progress = silent,
) -> Report:
    """Write a model that does by itself what it does with hypernetworks in front of its attention.

    Keys get W_k (1 + m A_k), values W_v (1 + m A_v), and the layer behind takes up what the biases add to the values.
    What they add to the keys changes nothing: softmax does not see a constant.

    Args:
        model: A path or Source with a U-Net of SD1, SD2 or SDXL.
        networks: Hypernetworks in the order in which they act: a path, `"PATH:STRENGTH"`, or path and strength.
        output: Where to write: a file, `NAME.safetensors.index.json` for shards, or, if the model is a folder of
            diffusers, a folder; default: `MODEL+NETWORK`, as the model is, in this folder.
        fit: Take the nearest linear map where a network is not linear, as far as contexts of this model go.
        dtype: Of the changed tensors: keep, fp32, fp16 or bf16.
        jobs: Threads; default: one per core.
        force: Replace an existing output.
        dry_run: Check everything, write nothing.
        hash_inputs: Record the inputs' SHA-256 (remembered between runs).
        progress: Called as `progress(label, total_bytes)`.

    Raises:
        UsageError: no network, or a malformed strength.
        MismatchError: no attention has a context of a network's width; or a network is not linear, and no `fit`.
        FormatError: a file is damaged or holds NaN.
        OutputError: the output exists, is an input, or does not fit on the disk.
    """
    if dtype not in DTYPES:
        raise UsageError(f"`dtype` cannot be `{dtype}`", hint=f"choose one of {', '.join(DTYPES)}")
    opened, base = open_networks(networks), open_base(model)
    path = Path(_derived(base, opened) if output is None else output)
    if is_pipeline(base) and is_file(path):
        base = as_single_file(base)
    found = reached(attentions(base), opened, base)
    parts = [base, *(input_of(file.source) for file, _ in opened)]
    check_inputs(path, [file for part in parts for leaf in part.leaves() for file in leaf.files])
    sink_of(base.source.specs, base, path, {RECIPE: ""}, force=force)  # checks alone
    maps = maps_of(opened, found, contexts_of(base, found) if fit else None)
    check_biases(found, maps, base)
    made = _baked(base, found, maps, DTYPES[dtype])
    report = report_of("hypernet apply", base, opened, found, maps, path)
    report.data["dry_run"] = dry_run
    if dry_run:
        report.hints.append("nothing was written; leave `--dry-run` away to apply")
        return report
    begin = time.monotonic()
    names = [base.name, *(file.path.name for file, _ in opened)]
    header = metadata(base.source.metadata, base.detection.modelspec, path.stem, names, _recipe(parts, opened))
    save(
        made, parts, path, header, jobs=jobs or default_jobs(), force=force, hash_inputs=hash_inputs, progress=progress
    )
    kept = made.adder.kept_overall()
    report.data |= {"seconds": round(time.monotonic() - begin, 3), "kept_overall": kept}
    nbytes = sum(spec.nbytes for spec in made.specs.values())
    rows = [["wrote", f"{path}, {size(nbytes)} in {duration(time.monotonic() - begin)}"]]
    if kept is not None:
        rows.append(["strength kept", f"{kept:.1%} of what was added survived the rounding"])
    report.sections.append(Section("Result", rows))
    return report


def open_networks(wishes: Sequence[Wish]) -> list[tuple[HypernetFile, float]]:
    """Networks and their strengths.

    Raises:
        UsageError: there is none, or a strength is no number.
    """
    if not wishes:
        raise UsageError("no hypernetwork was given", hint="`sdops hypernet apply MODEL FILE:STRENGTH`")
    return [(open_network(path), strength) for path, strength in map(with_number, wishes)]


def _derived(model: Opened, networks: Networks) -> str:
    parts = [f"{file.path.stem}{'' if strength == 1 else f'{strength:g}'}" for file, strength in networks]
    return "+".join([stem_of(model), *parts]) + ("" if is_folder(model) else INDEX if is_sharded(model) else SUFFIX)


def _baked(model: Opened, found: Sequence[Attention], maps: Mapping[int, Maps], dtype: str) -> Applied:
    """The result as a Source."""
    from sdops.core.applied import Dense
    from sdops.verbs._apply_changes import Changes

    changes = Changes(model, [], peft_dora=False)
    for each in found:
        changes.terms[each.keys] = [Dense(partial(_dense, key_change, each, maps))]
        changes.terms[each.values] = [Dense(partial(_dense, value_change, each, maps))]
        if maps[each.width].v.offset.any():
            changes.terms[f"{each.out}.bias"] = [Dense(partial(_dense, bias_change, each, maps))]
    return output_of(model, model.source, changes, ("", dtype), sequential=False, seed=None)


def _recipe(parts: Sequence[Opened], networks: Networks) -> dict[str, Any]:
    """Everything needed to make the file again."""
    records = [part_record("model", parts[0])]
    for number, (part, (_, strength)) in enumerate(zip(parts[1:], networks, strict=True), start=1):
        records.append(part_record(f"hypernet{number}", part) | {"strength": strength})
    return {"version": __version__, "verb": "hypernet apply", "inputs": records}


def _dense(change: Any, each: Attention, maps: Mapping[int, Maps], weights: Weights) -> Singles:
    """A change as core.applied wants it: a matrix, a bias as one column."""
    found: Singles = change(each, maps, of_weights(weights)).astype(np.float32)
    return found.reshape(len(found), -1)


def report_of(
    verb: str, model: Opened, networks: Networks, found: Sequence[Attention], maps: Mapping[int, Maps], path: Path
) -> Report:
    """What is done to which layers, and how well, with warnings about all that is not exact."""
    rows, facts = [], []
    for width, each in maps.items():
        here = [a for a in found if a.width == width]
        cross = sum(a.is_cross for a in here)
        linear = all(f.network.is_linear for f, _ in networks if width in f.network.pairs)
        r2 = {"k": each.k.explained, "v": each.v.explained}
        facts.append({"width": width, "attn1": len(here) - cross, "attn2": cross, "exact": linear, "explained": r2})
        how = "exact" if linear else f"fit, R^2 {r2['k']:.3f} for keys, {r2['v']:.3f} for values"
        offset = f"{np.linalg.norm(each.v.offset):.3g}"
        rows.append([str(width), f"{len(here) - cross}", f"{cross}", how, offset])
    report = Report(verb, result=[os.fspath(path)])
    report.data = {
        "output": str(path),
        "family": model.detection.family,
        "networks": [{"file": str(f.path), "name": f.network.name, "strength": s} for f, s in networks],
        "contexts": facts,
    }
    top = [["model", f"{model.name}  ({model.detection.title})"]]
    top += [["hypernetwork", f"{f.path}, strength {s:g}"] for f, s in networks]
    columns = ("context>", "attn1>", "attn2>", "how", "offset of values>")
    report.sections = [Section(str(path), top), Section("Layers", rows, columns)]
    report.warnings = _warnings(networks, found, facts)
    return report


def _warnings(networks: Networks, found: Sequence[Attention], facts: Sequence[Mapping[str, Any]]) -> list[str]:
    warnings = [f"`{file.path}`: {note}" for file, _ in networks for note in file.notes]
    reach = {each.width for each in found}
    for file, _ in networks:
        if idle := [str(width) for width in file.network.pairs if width not in reach]:
            warnings.append(f"`{file.path}` also has chains for {', '.join(idle)}, which this model has no contexts of")
    fitted = [fact for fact in facts if not fact["exact"]]
    if fitted:
        least = min(value for fact in fitted for value in fact["explained"].values())
        warnings.append(
            f"the network is not linear: its nearest linear map stands for it, which explains {least:.1%} of what it "
            f"does where it fits worst ({count(len(fitted), 'context width')})"
            + ("; that is far from it" if least < FAR else "")
        )
    return warnings
