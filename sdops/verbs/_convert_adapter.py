"""Convert an adapter to another dialect, or to another family. `sdops.convert` comes here with adapters.

convert_adapter("style.safetensors", to="diffusers")               renamed: every number stays, bit for bit
convert_adapter("lokr.safetensors", family="lora", rank=32)        the best LoRA of that rank
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdops import __version__
from sdops.core.patch import Adapter
from sdops.core.run import default_jobs
from sdops.dialects import dialect
from sdops.errors import UsageError
from sdops.report import Progress, Report, Section, silent
from sdops.text import count, duration, size
from sdops.verbs._adapter_lists import written
from sdops.verbs._adapter_metadata import carried, stripped, with_recipe
from sdops.verbs._adapter_path import adapter_path, shown, workplace
from sdops.verbs._adapter_source import check_finite
from sdops.verbs._adapters import AdapterFile, Spelled, name_of, open_adapter, patch_bytes, spelled
from sdops.verbs._rank_rules import checked

if TYPE_CHECKING:
    from sdops.verbs._convert_family import Layer

FAMILIES = ("lora", "full")
DTYPES = ("keep", "fp16", "bf16", "fp32")


def convert_adapter(
    file: AdapterFile,
    *,
    to: str | None = None,
    family: str | None = None,
    rank: int | None = None,
    energy: float | None = None,
    base: str | os.PathLike[str] | None = None,
    architecture: str | None = None,
    output: str | os.PathLike[str] | None = None,
    dtype: str = "keep",
    allow_unknown: bool = False,
    strip_training_metadata: bool = False,
    jobs: int | None = None,
    dry_run: bool = False,
    force: bool = False,
    hash_inputs: bool = True,
    progress: Progress = silent,
) -> Report:
    """Write an adapter in another dialect, or as another family.

    Between dialects tensors get other names, and where one fuses what another splits, rows are moved; no number is
    rounded, unless the new dialect has no place for alphas, which then go into `up`.

    To LoRA: LoHa exactly, with rank r^2; Tucker exactly; LoKr exactly or as the best LoRA of a rank, from two small
    decompositions; GLoRA exactly, with its base; DoRA, OFT, BOFT, (IA)^3 and replaced weights with their base, and
    differences, as the best LoRA of a rank. Norms and biases stay differences.

    Args:
        file: A LoRA-like file of any dialect, or a PEFT folder.
        to: The dialect; default: as it is.
        family: lora, or full (plain differences); default: as it is.
        rank: Highest rank of converted layers; default: what is exact, or where nothing is, that of the layer or 32.
        energy: Keep this share of the squared singular values of converted layers instead.
        base: The checkpoint that it was made for.
        architecture: The family that it was made for, where the file does not tell.
        output: Where to write; default: `FILE.DIALECT.safetensors`, for peft the folder `FILE.peft`, in this folder.
        dtype: Of what is computed: keep, fp16, bf16 or fp32.
        allow_unknown: Leave out tensors that are not understood.
        strip_training_metadata: Leave out tags, folders and settings of the training.
        jobs: Threads; default: one per core.
        dry_run: Check everything, write nothing.
        force: Replace an existing output.
        hash_inputs: With `family`, record the inputs' SHA-256.
        progress: Called as `progress(label, total_bytes)`.

    Raises:
        UsageError: there is no such dialect, family or architecture.
        MismatchError: the dialect cannot hold it, or the base is needed or does not fit.
        FormatError: the file is no adapter, is damaged, or holds NaN.
        OutputError: the output exists, is the input, or does not fit on the disk.
    """
    wishes = checked(rank=rank, energy=energy)
    for option, value, allowed in (("family", family, FAMILIES), ("dtype", dtype, DTYPES)):
        if value is not None and value not in allowed:
            raise UsageError(f"`{option}` cannot be `{value}`", hint=f"choose one of {', '.join(allowed)}")
    if family is None and (wishes or base is not None or dtype != "keep"):
        raise UsageError(
            "ranks, a base and a dtype are for conversions to another family",
            hint="`--family lora` makes LoRA of other families; `sdops resize --dtype fp16` changes ranks and dtypes",
        )
    if to is not None:
        dialect(to)
    adapter = open_adapter(file, allow_unknown=allow_unknown, architecture=architecture)
    try:
        to = to or adapter.dialect
        stem = Path(name_of(file)).stem
        path = adapter_path(f"{stem}.peft" if to == "peft" else f"{stem}.{to}.safetensors", output, to)
        common: dict[str, Any] = {
            "jobs": jobs or default_jobs(),
            "dry_run": dry_run,
            "force": force,
            "progress": progress,
        }
        if family is None:
            check_finite(adapter)
            header = stripped(adapter.source.metadata, strip_training_metadata)
            return _renamed(adapter, spelled(adapter, to, header), path, to, **common)
        made = {"family": family, **wishes, "dtype": dtype, "to": to}
        strip = strip_training_metadata
        return _changed(adapter, made, wishes, base, path, strip=strip, hash_inputs=hash_inputs, **common)
    finally:
        adapter.source.close()


def _renamed(
    adapter: Adapter,
    made: Spelled,
    path: Path,
    to: str,
    *,
    jobs: int,
    dry_run: bool,
    force: bool,
    progress: Progress,
) -> Report:
    begin = time.monotonic()
    nbytes = _write(made, path, [adapter], jobs=jobs, dry_run=dry_run, force=force, hash_inputs=None, progress=progress)
    return _report(adapter, made, path, to, nbytes, (), time.monotonic() - begin, dry_run=dry_run)


def _changed(
    adapter: Adapter,
    settings: dict[str, Any],
    wishes: dict[str, float],
    base: str | os.PathLike[str] | None,
    path: Path,
    *,
    strip: bool,
    hash_inputs: bool,
    jobs: int,
    dry_run: bool,
    force: bool,
    progress: Progress,
) -> Report:
    """To another family."""
    from sdops.verbs._adapter_base import Base
    from sdops.verbs._adapter_output import Pieces
    from sdops.verbs._adapter_save import opened
    from sdops.verbs._convert_family import converted
    from sdops.verbs._hashes import part_record

    begin = time.monotonic()
    weights = None if base is None else Base(base, adapter)
    records = [part_record("a", opened(adapter)), *([part_record("base", weights.model)] if weights else [])]
    with Pieces(workplace(path), adapter.source.name) as pieces:
        with progress("converting", sum(patch_bytes(adapter, patch) for patch in adapter.patches)) as advance:
            layers = converted(adapter, settings["family"], wishes, weights, settings["dtype"], pieces, jobs, advance)
        pieces.keep_extras(adapter)
        ranks = [layer.rank for layer in layers if layer.rank]
        recipe = {"version": __version__, "verb": "convert", **settings, "inputs": records}
        header = with_recipe(carried(adapter, ranks, (), strip=strip), recipe)
        made = spelled(pieces.adapter(adapter, header), settings["to"])
        inputs: Sequence[Any] = [adapter, *([weights] if weights else [])]
        nbytes = _write(
            made, path, inputs, jobs=jobs, dry_run=dry_run, force=force, hash_inputs=hash_inputs, progress=progress
        )
    return _report(adapter, made, path, settings["to"], nbytes, layers, time.monotonic() - begin, dry_run=dry_run)


def _write(
    made: Spelled,
    path: Path,
    inputs: Sequence[Any],
    *,
    jobs: int,
    dry_run: bool,
    force: bool,
    hash_inputs: bool | None,
    progress: Progress,
) -> int:
    """Save unless it is only a trial; returns the size."""
    from sdops.verbs._adapter_save import check_output, opened, save

    parts = [opened(each) if isinstance(each, Adapter) else each.model for each in inputs]
    check_output(path, parts, made.companions, force=force)
    if dry_run:
        return sum(spec.nbytes for spec in made.source.specs.values())
    return save(made, path, parts, jobs=jobs, force=force, hash_inputs=hash_inputs, progress=progress)


def _report(
    adapter: Adapter,
    made: Spelled,
    path: Path,
    to: str,
    nbytes: int,
    layers: Sequence[Layer],
    seconds: float,
    *,
    dry_run: bool,
) -> Report:
    from sdops.verbs._convert_family_report import add_layers

    place = shown(path)
    names = [str(place), *map(str, written(path, made.source.specs)[1:])]
    report = Report("convert", result=names)
    report.data = {
        "output": str(place),
        "files": names,
        "bytes": nbytes,
        "dry_run": dry_run,
        "from": adapter.dialect,
        "to": to,
        "architecture": adapter.architecture,
        "tensors": len(made.source.specs),
        "left_out": [*made.left_out, *adapter.unknown],
    }
    verb, took = ("would write", "") if dry_run else ("wrote", f" in {duration(seconds)}")
    rows = [
        (verb, f"{', '.join(names)}, {size(nbytes)}{took}"),
        ("dialect", adapter.dialect if adapter.dialect == to else f"{adapter.dialect} -> {to}"),
        ("model", adapter.architecture),
        ("layers", f"{len(adapter.patches):,}"),
    ]
    report.sections = [Section("", rows)]
    report.warnings = list(adapter.notes)
    if made.left_out:
        report.warnings.append(f"`{to}` has no place for {', '.join(f'`{key}`' for key in made.left_out)}: left out")
    if adapter.unknown:
        report.warnings.append(f"{count(len(adapter.unknown), 'tensor')} not understood and left out")
    if layers:
        add_layers(report, layers)
    return report
