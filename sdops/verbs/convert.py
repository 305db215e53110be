"""Convert a model file to another container, layout or dtype.

sdops.convert("model.safetensors", to="diffusers")                    a folder that diffusers loads
sdops.convert("folder", to="original", output="model.safetensors")    and back, byte for byte
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from sdops.core.source import Source
from sdops.errors import UsageError
from sdops.hub import located
from sdops.report import Progress, Report, silent
from sdops.verbs._convert_wish import CONTAINERS, Wish, check, parse_dtypes

if TYPE_CHECKING:
    from sdops.verbs._convert_checkpoint import Conversion

FilePath = str | os.PathLike[str]
Model = FilePath | Source
_WITH_MORE_THAN_TENSORS = {"embedding": "embed", "hypernetwork": "hypernet"}  # family -> the verb that knows its files


def convert(
    file: Model,
    *,
    to: str | None = None,
    output: FilePath | None = None,
    dtype: str | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    components: Sequence[str] = (),
    ema: str = "keep",
    prune: bool = False,
    unet: Model | None = None,
    vae: Model | None = None,
    text_encoder: Model | Sequence[Model] | None = None,
    tokenizer: FilePath | None = None,
    unknown: str = "refuse",
    prefix: bool | None = None,
    shard: int | None = None,
    reference: FilePath | None = None,
    family: str | None = None,
    rank: int | None = None,
    energy: float | None = None,
    base: FilePath | None = None,
    architecture: str | None = None,
    strip_training_metadata: bool = False,
    strict: bool = False,
    seed: int | None = None,
    jobs: int | None = None,
    dry_run: bool = False,
    force: bool = False,
    progress: Progress = silent,
) -> Report:
    """Convert a checkpoint, or a LoRA.

    Between layouts nothing but ranges of bytes is copied; numbers change only with `dtype`.

    Args:
        file: A model file of any format, one of several shards, or a folder of diffusers.
        to: safetensors, ckpt or gguf (another container, the same layout), diffusers (a folder), original (a single
            file as the model's authors spell it). Of LoRAs and their relatives the dialect: kohya, diffusers, peft,
            comfy, bfl, xlabs, cloneofsimo, lycoris, onetrainer (verbs/_convert_adapter.py explains their options).
            None keeps a folder a folder and makes safetensors of files.
        output: Where to write; default: a derived name in this folder.
        dtype: fp16, bf16, fp32, fp64, fp8_e4m3 or fp8_e5m2, also by component: `fp16,vae=fp32`; of GGUF files also
            q8_0, q5_1, q5_0, q4_1 or q4_0; fp8_scaled gives every fp8 weight a scale (fp8_scaled_old: as ComfyUI
            spelled it before). Rounds to nearest even and clamps. Integers and markers stay.
        include: Cast only tensors that match one of these patterns.
        exclude: Do not cast tensors that match one of these.
        components: Convert only these: `unet`, `vae`, `clip_l` ..., `text_encoder` for all of them.
        ema: keep, drop, or use the moving average in place of the U-Net.
        prune: Leave out the average, noise schedules and left-overs of training.
        unet: A file whose U-Net or transformer is taken in place of the model's own; it tells what is predicted.
        vae: A file whose VAE is taken likewise, or added where there is none.
        text_encoder: A file whose text encoders are taken likewise, or several.
        tokenizer: Of folders: T5's `tokenizer.json` or `spiece.model`, which does not come with sdops, or a folder
            that has one.
        unknown: What to do with tensors that a layout has no place for and nobody knows: refuse, keep or drop.
        prefix: Whether a component that is alone keeps what stands before its names in a whole model.
        shard: Largest size of a file in bytes.
        reference: A folder of diffusers whose configurations and tokenizers are taken over.
        family: Of LoRAs: lora makes LoRA of other families, full plain differences.
        rank, energy: Of LoRAs that come to be: their highest rank, the energy to keep.
        base: Of LoRAs: the checkpoint that it was made for.
        architecture: Of LoRAs: the family that it was made for (sd1, sdxl, flux1 ...), where the file does not tell.
        strip_training_metadata: Of LoRAs: leave out tags, folders and settings of the training.
        strict: Refuse to clamp values that are too large for the dtype.
        seed: Round at random instead of to nearest.
        jobs: Threads; default: one per core.
        dry_run: Check everything, report what would be done, write nothing.
        force: Replace an existing output.
        progress: Called as `progress(label, total_bytes)`.

    Returns:
        A report that accounts for every tensor: copied, reshaped, cast, set aside, dropped, invented.

    Raises:
        UsageError: the request makes no sense for this file.
        MismatchError: tensors are unknown, missing, or do not fit the layout.
        FormatError: the file is damaged, or quantised.
        OutputError: the output exists, is an input, or does not fit on the disk.
    """
    if (family or (to and to not in CONTAINERS)) and _is_adapter(file):
        from sdops.verbs._convert_adapter import convert_adapter

        return convert_adapter(
            file,
            to=to,
            family=family,
            rank=rank,
            energy=energy,
            base=base,
            architecture=architecture,
            output=output,
            dtype=dtype or "keep",
            allow_unknown=unknown == "drop",
            strip_training_metadata=strip_training_metadata,
            jobs=jobs,
            dry_run=dry_run,
            force=force,
            progress=progress,
        )
    if family or rank or energy or base or architecture or strip_training_metadata:
        raise UsageError("`--family` and what belongs to it are for LoRAs", hint="`sdops convert FILE --to diffusers`")
    conversion = planned(
        file,
        to=to,
        output=output,
        dtype=dtype,
        include=include,
        exclude=exclude,
        components=components,
        ema=ema,
        prune=prune,
        unet=unet,
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unknown=unknown,
        prefix=prefix,
        shard=shard,
        reference=reference,
        strict=strict,
        seed=seed,
        force=force,
    )
    try:
        report = conversion.dry_run() if dry_run else conversion.save(jobs=jobs, progress=progress)
        if verb := _WITH_MORE_THAN_TENSORS.get(conversion.detection.family):
            report.hints.append(f"`sdops {verb} convert` writes all layouts of these, and keeps what is no tensor")
        return report
    finally:
        conversion.close()


def planned(
    file: Model,
    *,
    to: str | None,
    output: FilePath | None,
    dtype: str | None,
    include: Sequence[str],
    exclude: Sequence[str],
    components: Sequence[str],
    ema: str,
    prune: bool,
    unet: Model | None,
    vae: Model | None,
    text_encoder: Model | Sequence[Model] | None,
    tokenizer: FilePath | None,
    unknown: str,
    prefix: bool | None,
    shard: int | None,
    reference: FilePath | None,
    strict: bool,
    seed: int | None,
    force: bool,
) -> Conversion:
    """The conversion of a checkpoint, not begun; the caller closes it.

    Args and raises as `convert`.
    """
    if to is None:
        changes = (dtype, include, exclude, components, ema != "keep", prune, unet, vae, text_encoder, shard)
        path = located(file) if isinstance(file, str | os.PathLike) else Path(file.name)
        to = _own_form(path, changed=any(changes))
    from sdops.verbs._convert_checkpoint import Conversion, open_all

    check(to, ema, shard)
    dtypes, gguf_type, scaled = parse_dtypes(dtype, to)
    wish = Wish(
        to,
        dtypes,
        gguf_type,
        scaled,
        tuple(include),
        tuple(exclude),
        tuple(components),
        ema,
        prune,
        unknown,
        prefix,
        shard or 0,
        None if reference is None else located(reference),
        strict,
        seed,
        None if tokenizer is None else located(tokenizer),
        dtype or "",
    )
    if unet is not None and ema == "use":
        raise UsageError("`--ema use` is for a model's own U-Net", hint="take the average out of the other file first")
    given = {"unet": unet, "vae": vae, "text_encoder": text_encoder}
    donors = [(role, path) for role, one in given.items() for path in _all(one)]
    origin, opened = open_all(file, donors)
    return Conversion(origin, opened, None if output is None else Path(output), wish, force=force)


def _is_adapter(file: Model) -> bool:
    from sdops.verbs._adapter_peek import is_adapter

    return is_adapter(file)


def _all(given: Model | Sequence[Model] | None) -> list[Model]:
    """One file, several, or none."""
    if given is None:
        return []
    if isinstance(given, str) or not isinstance(given, Sequence):
        return [given]
    return list(given)


def _own_form(path: Path, *, changed: bool) -> str:
    """What a file becomes when nobody says: the form that it has, or one safetensors file of pickles, GGUF and shards.

    Raises:
        UsageError: that would be the same file again.
    """
    from sdops.formats.sharded import SHARD

    if path.is_dir():
        form = "diffusers" if (path / "model_index.json").is_file() else "safetensors"
    else:
        one_file = path.name.endswith(".safetensors") and not SHARD.fullmatch(path.name)
        form, changed = "safetensors", changed or not one_file
    if not changed and path.exists():
        raise UsageError("what to convert to is not said", hint="`--to diffusers`; `sdops convert --help` lists all")
    return form
