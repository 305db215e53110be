"""Merge LoRAs and their relatives into one. `sdops.merge` comes here when all its models are adapters.

sdops.merge("style.safetensors", "face.safetensors", weights=(0.7, -0.3), output="both.safetensors")
sdops.merge("a.safetensors", "b.safetensors", method="svd", rank=16, output="both.safetensors")
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdops import __version__
from sdops.core.accel import check_device
from sdops.core.patch import Adapter
from sdops.core.run import default_jobs
from sdops.dialects import dialect
from sdops.errors import MismatchError
from sdops.report import Progress, Report, Section, silent
from sdops.text import duration, size
from sdops.verbs._adapter_metadata import union, with_recipe
from sdops.verbs._adapter_path import adapter_path, shown, workplace
from sdops.verbs._adapters import AdapterFile, name_of, open_alike, patch_bytes, spelled
from sdops.verbs._merge_adapters_wish import METHODS, Wish, checked

if TYPE_CHECKING:
    from sdops.verbs._merge_adapters_work import Layer

_LONGEST_NAME = 200  # bytes of a derived name


def merge_adapters(
    files: Sequence[AdapterFile],
    *,
    method: str = "concat",
    weights: Sequence[float] = (),
    blocks: Sequence[str] = (),
    rank: int | None = None,
    density: float | None = None,
    base: str | os.PathLike[str] | None = None,
    output: str | os.PathLike[str] | None = None,
    to: str | None = None,
    dtype: str = "keep",
    strip_training_metadata: bool = False,
    seed: int = 0,
    device: str = "cpu",
    jobs: int | None = None,
    dry_run: bool = False,
    force: bool = False,
    hash_inputs: bool = True,
    progress: Progress = silent,
) -> Report:
    """Merge adapters of any families, ranks, alphas and dialects into one.

    Their changes are merged, never their factors: D = sum_i w_i b_i D_i for `concat`, where b_i is a block weight. The
    formulas of the others are in verbs/_adapter_methods.py. Ranks that are zero to float32 are left out.

    Args:
        files: Two or more; one is merged with nothing, which is good for scaling it.
        method: One of METHODS.
        weights: One per file, also negative; default: 1 for each.
        blocks: Block weights as dials (`IN00-IN05=0.2, MID=0`), presets or lists as sd-webui-lora-block-weight takes
            them: one for all files, or one for each.
        rank: No layer gets more; of `svd` the default is the highest rank among its LoRAs.
        density: Share of the numbers that ties, knots (default 0.2) and dare (0.5) keep.
        base: The checkpoint that they are for: for DoRA, OFT and others whose change depends on it.
        output: Where to write; default: a derived name, in this folder.
        to: The dialect; default: the first file's.
        dtype: Of the factors: keep (as the first that changes a layer), fp32, fp16 or bf16.
        strip_training_metadata: Leave out tags, folders and settings of the training.
        seed: Of dare.
        device: Where the algebra of the factors is done: cpu, or cuda.
        jobs: Threads; default: one per core.
        dry_run: Work everything out, write nothing.
        force: Replace an existing output.
        hash_inputs: Record the inputs' SHA-256.
        progress: Called as `progress(label, total_bytes)`.

    Raises:
        UsageError: the request makes no sense.
        MismatchError: the files are for different models, shapes differ, the base is needed, or the dialect cannot
            hold the result.
        FormatError: a file is no adapter, is damaged, or holds NaN.
        OutputError: the output exists, is an input, or does not fit on the disk.
    """
    wish = checked(len(files), method, weights, blocks, rank, density, dtype, seed)
    if device != "cpu":
        check_device(device)
    if to is not None:
        dialect(to)
    adapters: list[Adapter] = []
    try:
        adapters += open_alike(files)
        to = to or adapters[0].dialect
        return _merge(
            adapters,
            wish,
            adapter_path(_derived_name(files, wish.method), output, to),
            to,
            base=base,
            strip=strip_training_metadata,
            device=device,
            jobs=jobs or default_jobs(),
            dry_run=dry_run,
            force=force,
            hash_inputs=hash_inputs,
            progress=progress,
        )
    finally:
        for adapter in adapters:
            adapter.source.close()


def _derived_name(files: Sequence[AdapterFile], method: str) -> str:
    """`a+b.concat.safetensors`."""
    stems = "+".join(Path(name_of(file)).stem for file in files)
    return f"{stems[: _LONGEST_NAME - len(method)]}.{method}.safetensors"


def _merge(
    adapters: Sequence[Adapter],
    wish: Wish,
    path: Path,
    to: str,
    *,
    base: str | os.PathLike[str] | None,
    strip: bool,
    device: str,
    jobs: int,
    dry_run: bool,
    force: bool,
    hash_inputs: bool,
    progress: Progress,
) -> Report:
    from sdops.verbs._adapter_base import Base
    from sdops.verbs._adapter_output import Pieces
    from sdops.verbs._adapter_save import check_output, opened, save
    from sdops.verbs._hashes import part_record
    from sdops.verbs._merge_adapters_work import Work

    begin, first = time.monotonic(), adapters[0]
    inputs = [opened(adapter) for adapter in adapters]
    weights = Base(base, first) if base is not None else None
    parts = [*inputs, *([weights.model] if weights else [])]
    check_output(path, parts, (), force=force)
    work = Work(adapters, wish, to, weights, device)
    with Pieces(workplace(path), path.name) as pieces:
        sizes = {
            g.target: sum(patch_bytes(adapters[i], p) for i, own in g.patches.items() for p in own) for g in work.groups
        }
        layers = []
        with progress("merging", sum(sizes.values())) as advance:
            for layer in work.run(pieces, jobs):
                layers.append(layer)
                advance(sizes.pop(layer.target, 0))
        doubled = [what for adapter in adapters for what in pieces.keep_extras(adapter)]
        if not pieces.patches and not pieces.extras:
            raise MismatchError("nothing is left: the weights are 0, or the LoRAs cancel out", hint="check `--weights`")
        conv = {layer.target for layer in layers if work.is_convolution(layer.target)}
        header = union(
            adapters,
            [layer.rank for layer in layers if layer.rank and layer.target not in conv],
            [layer.rank for layer in layers if layer.rank and layer.target in conv],
            shown(path).stem,
            strip=strip,
        )
        roles = [chr(ord("a") + i) if i < 26 else f"model{i + 1}" for i in range(len(inputs))]
        records = [part_record(role, part) for role, part in zip(roles, inputs, strict=True)]
        records += [part_record("base", weights.model)] if weights else []
        made = {"version": __version__, "verb": "merge", "method": wish.method, **_settings(wish), "to": to}
        result = spelled(pieces.adapter(first, with_recipe(header, {**made, "inputs": records})), to)
        nbytes = sum(spec.nbytes for spec in result.source.specs.values())
        check_output(path, parts, result.companions, force=force)
        if not dry_run:
            nbytes = save(result, path, parts, jobs=jobs, force=force, hash_inputs=hash_inputs, progress=progress)
    facts = {"output": str(shown(path)), "bytes": nbytes, "dry_run": dry_run, "dialect": to, "method": wish.method}
    return _report(adapters, layers, facts | _settings(wish), doubled, time.monotonic() - begin)


def _settings(wish: Wish) -> dict[str, Any]:
    """For the recipe; what has its default is left out."""
    said: dict[str, Any] = {"weights": list(wish.weights)}
    said |= {"blocks": list(wish.blocks)} if any(wish.blocks) else {}
    said |= {"rank": wish.rank} if wish.rank else {}
    said |= {"density": wish.density} if wish.method in ("ties", "dare", "knots") else {}
    said |= {"seed": wish.seed} if wish.method == "dare" else {}
    return said | ({"dtype": wish.dtype} if wish.dtype != "keep" else {})


# ---------------------------------------------------------------------------------------------------------- the report


def _report(
    adapters: Sequence[Adapter],
    layers: Sequence[Layer],
    facts: Mapping[str, Any],
    doubled: Sequence[str],
    seconds: float,
) -> Report:
    energy = math.fsum(layer.energy for layer in layers)
    error = math.sqrt(math.fsum(layer.lost for layer in layers) / energy) if energy else 0.0
    report = Report("merge", result=[str(facts["output"])])
    report.data = {
        **facts,
        "inputs": [adapter.source.name for adapter in adapters],
        "error": error,
        "layers": [
            {
                "layer": str(layer.target),
                "inputs": list(layer.sources),
                "rank": layer.rank,
                "error": math.sqrt(layer.lost / layer.energy) if layer.energy else 0.0,
            }
            for layer in layers
        ],
    }
    verb = "would write" if facts["dry_run"] else "wrote"
    took = "" if facts["dry_run"] else f" in {duration(seconds)}"
    shared = sum(len(layer.sources) > 1 for layer in layers)
    ranks = [layer.rank for layer in layers if layer.rank]
    rows = [
        (verb, f"{facts['output']}, {size(facts['bytes'])}{took}"),
        ("method", f"{facts['method']}: {METHODS[facts['method']]}"),
        ("weights", ", ".join(f"{weight:g}" for weight in facts["weights"])),
        ("layers", f"{len(layers):,}, {shared:,} of them changed by several LoRAs"),
        ("ranks", f"{min(ranks)} to {max(ranks)}" if ranks else "none"),
    ]
    if error > 1e-6:
        rows.append(("error", f"{error:.2%} of the merged change is left out by the rank"))
    each = [(str(layer.target), " ".join(str(i + 1) for i in layer.sources), str(layer.rank or "")) for layer in layers]
    report.sections = [Section("", rows), Section("Layers", each, ("layer", "from", "rank>"), detail=True)]
    report.warnings = [note for adapter in adapters for note in adapter.notes]
    report.warnings += [f"several files bring {what}; the first is kept" for what in doubled]
    return report
