"""Extract a LoRA: the difference of a fine-tune to its base, as factors of low rank.

sdops.extract("tuned.safetensors", base="base.safetensors", output="style.safetensors")
sdops.extract("tuned.safetensors", base="base.safetensors", rank=32)
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from sdops.core.accel import check_device
from sdops.core.run import default_jobs
from sdops.core.sink import check_inputs
from sdops.errors import MismatchError, UsageError
from sdops.report import Progress, Report, silent
from sdops.verbs._adapter_path import adapter_path, check_place, shown, workplace
from sdops.verbs._adapter_save import save
from sdops.verbs._adapters import spelled
from sdops.verbs._extract_output import adapter, check_dialect, metadata, recipe
from sdops.verbs._extract_pairs import Pair, Pairs, pairs
from sdops.verbs._extract_report import done_report, dry_report
from sdops.verbs._hashes import Hashes
from sdops.verbs._inputs import Model, Opened, check_families, open_model
from sdops.verbs._traits import prediction

if TYPE_CHECKING:
    from sdops.core.lowrank import Engine
    from sdops.verbs._extract_factors import Layer, Wish

DTYPES = {"fp16": "F16", "bf16": "BF16", "fp32": "F32"}
ENGINES = ("auto", "exact", "gram", "krylov")
RULES = ("rank", "energy", "ratio", "absolute", "quantile", "noise_floor", "budget")  # of which one may be given
MOST = 128  # ranks without a rule: a full fine-tune may change above rounding in nearly all directions
_SHARES = ("energy", "ratio", "quantile")


def extract(
    tuned: Model,
    *,
    base: Model,
    output: str | os.PathLike[str] | None = None,
    rank: int | None = None,
    conv_rank: int | None = None,
    te_rank: int | None = None,
    energy: float | None = None,
    ratio: float | None = None,
    absolute: float | None = None,
    quantile: float | None = None,
    noise_floor: bool = False,
    budget: int | None = None,
    max_rank: int | None = None,
    svd: str = "auto",
    to: str = "kohya",
    dtype: str = "fp16",
    norms: bool = False,
    bias: bool = False,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    seed: int = 0,
    jobs: int | None = None,
    device: str = "cpu",
    dry_run: bool = False,
    force: bool = False,
    hash_inputs: bool = True,
    progress: Progress = silent,
) -> Report:
    """Write the difference of a fine-tune to its base as a LoRA.

    Every layer's difference D [o, i kh kw] becomes up @ down with the least ||D - up @ down||_F that its rank allows
    (Eckart and Young), without any clamping. Without a rule for the ranks, singular values are kept that stand above
    what rounding the checkpoint to its dtype makes of itself (core.ranks.noise_floor), at most 128 per layer. Layers
    where factors would be larger than the difference are kept as they are.

    Args:
        tuned: Path or Source of the fine-tune.
        base: What it was made from; its prefixes and layout may differ.
        output: Where to write; default: `TUNED.lora.safetensors` in this folder.
        rank: The same rank everywhere.
        conv_rank: Another one for convolutions larger than 1x1.
        te_rank: Another one for text encoders.
        energy: Keep this share of the squared singular values.
        ratio: Keep singular values above this share of the largest.
        absolute: Keep singular values above this.
        quantile: Keep this share of the sum of the singular values, as LyCORIS does.
        noise_floor: Keep all that stands above rounding noise, without the limit of 128.
        budget: Bytes for all factors together, spread so that the error of the whole is least.
        max_rank: No layer gets more.
        svd: auto (core.lowrank.decompose), exact, gram or krylov.
        to: The dialect, see the shelf `dialects`.
        dtype: Of the factors: fp16, bf16 or fp32.
        norms: Keep the differences of norms.
        bias: Keep the differences of biases.
        include: Only layers that match one of these patterns.
        exclude: Not those that match one of these.
        seed: Of the random start of krylov.
        jobs: Threads; default: one per core.
        device: cpu, or cuda: layers of one shape are factored together on a GPU. Needs `rank`.
        dry_run: Check everything, report what would be done, write nothing.
        force: Replace an existing output.
        hash_inputs: Record the inputs' SHA-256 (remembered between runs).
        progress: Called as `progress(label, total_bytes)`.

    Returns:
        A report: rank and captured energy of every layer, measured with the rounded factors.

    Raises:
        UsageError: the request makes no sense.
        MismatchError: the models do not fit each other, do not differ, or the dialect cannot hold a layer.
        FormatError: an input is damaged, or holds NaN.
        OutputError: the output exists, is an input, or does not fit on the disk.
    """
    wishes = _wishes(
        rank=rank,
        conv_rank=conv_rank,
        te_rank=te_rank,
        energy=energy,
        ratio=ratio,
        absolute=absolute,
        quantile=quantile,
        noise_floor=noise_floor or None,
        budget=budget,
        max_rank=max_rank,
    )
    for option, value, allowed in (("svd", svd, ENGINES), ("dtype", dtype, DTYPES)):
        if value not in allowed:
            raise UsageError(f"`{option}` cannot be `{value}`", hint=f"choose one of {', '.join(allowed)}")
    if device != "cpu":
        check_device(device)
        if rank is None:
            raise UsageError("`--device cuda` needs a fixed rank", hint="add e.g. `--rank 32`, or leave out `--device`")
    first, second = open_model(tuned), open_model(base)
    check_families(first, [second])
    found = pairs(first, second, include, exclude)
    found.warnings += _suspicions(first, second)
    vectors = [pair for pair in found.vectors if {"norm": norms, "bias": bias}[pair.kind]]
    found.left_out.update(pair.kind for pair in found.vectors if pair not in vectors)
    path = adapter_path(f"{Path(first.name).stem}.lora.safetensors", output, to)
    check_inputs(path, [file for part in (first, second) for leaf in part.leaves() for file in leaf.files])
    check_place(path, check_dialect([*found.layers, *vectors], first, to), force=force)
    if dry_run:
        return dry_report(shown(path), found, vectors, wishes, to)
    settings = wishes | {"svd": svd, "dtype": dtype} | ({"seed": seed} if seed else {})
    from sdops.verbs._extract_factors import Wish  # torch

    wish = Wish(**wishes, engine=cast("Engine", svd), dtype=DTYPES[dtype], seed=seed)
    return _save(
        path,
        (first, second),
        found,
        vectors,
        wish,
        settings,
        to,
        jobs=jobs or default_jobs(),
        device=device,
        force=force,
        hash_inputs=hash_inputs,
        progress=progress,
    )


def _wishes(**given: float | None) -> dict[str, Any]:
    """The rank rules that were given.

    Raises:
        UsageError: they exclude each other, or are out of range.
    """
    wishes = {name: value for name, value in given.items() if value is not None}
    rules = [name for name in RULES if name in wishes]
    if len(rules) > 1:
        first, second = (f"`--{name.replace('_', '-')}`" for name in rules[:2])
        raise UsageError(f"{first} and {second} exclude each other", hint="give one rule for the ranks")
    for name, value in wishes.items():
        if name in _SHARES and not 0 <= value <= 1:
            raise UsageError(f"`{name}` is a share from 0 to 1, not {value:g}", hint=f"e.g. `--{name} 0.9`")
        if "rank" in name and value < 1:
            raise UsageError(f"`{name.replace('_', '-')}` must be at least 1, not {value:g}", hint="e.g. `--rank 32`")
        if name in ("absolute", "budget") and value < 0:
            raise UsageError(f"`{name}` cannot be negative", hint=f"`sdops extract --help` explains `--{name}`")
    if not rules:
        wishes.setdefault("max_rank", max(MOST, wishes.get("conv_rank", 0), wishes.get("te_rank", 0)))
    wishes.pop("noise_floor", None)
    return wishes


def _suspicions(tuned: Opened, base: Opened) -> list[str]:
    """What headers and a few small tensors say against comparing the two."""
    found = [
        f"`{model.name}` also holds a moving average (EMA) of its weights; its plain weights are compared"
        for model in (tuned, base)
        if "ema" in model.detection.junk
    ]
    said = [prediction(model.source, model.detection) for model in (tuned, base)]
    if all(said) and _word(said[0][0]) != _word(said[1][0]):
        found.append(
            f"`{tuned.name}` predicts {said[0][0]}, `{base.name}` {said[1][0]}: the LoRA would turn the one "
            "into the other"
        )
    return found


def _word(said: str) -> str:
    """`likely v (spread of a bias)` -> v."""
    word = said.removeprefix("likely ").split(" (", 1)[0].lower()
    return {"v_prediction": "v", "eps": "epsilon"}.get(word, word)


def _save(
    path: Path,
    models: tuple[Opened, Opened],
    found: Pairs,
    vectors: Sequence[Pair],
    wish: Wish,
    settings: Mapping[str, Any],
    to: str,
    *,
    jobs: int,
    device: str,
    force: bool,
    hash_inputs: bool,
    progress: Progress,
) -> Report:
    """Do the work and write the file."""
    from sdops.verbs._extract_factors import factorise, patches, small
    from sdops.verbs._extract_store import Store
    from sdops.verbs._extract_words import add_words, tell_words

    begin = time.monotonic()
    tuned, base = models
    with (
        closing(Store(workplace(path), tuned.name)) as store,
        Hashes(models, enabled=hash_inputs) as hashes,
    ):
        with progress("extracting", sum(pair.nbytes for pair in found.layers)) as advance:
            if device == "cpu":
                layers = factorise(found.layers, wish, store, jobs, advance)
            else:
                from sdops.verbs._extract_device import factorise_on_device

                layers = factorise_on_device(found.layers, wish, store, jobs, advance, device)
        layers += small(vectors, wish, store)
        _check_not_empty(tuned, base, layers)
        words = add_words(store, tuned, base)
        made = spelled(
            adapter(store, patches(layers, wish, store), tuned, words),
            to,
            metadata(path, tuned, layers, recipe(tuned, base, settings, to)),
        )
        nbytes = save(
            made, path, models, jobs=jobs, force=force, hash_inputs=hash_inputs, progress=progress, hashes=hashes
        )
    report = done_report(shown(path), nbytes, time.monotonic() - begin, layers, found, settings)
    tell_words(report, words, made.left_out, to)
    return report


def _check_not_empty(tuned: Opened, base: Opened, layers: Sequence[Layer]) -> None:
    """An adapter that changes nothing helps nobody.

    Raises:
        MismatchError: no layer is kept.
    """
    if any(layer.rank for layer in layers):
        return
    if not any(layer.energy for layer in layers):
        raise MismatchError(
            f"`{tuned.name}` and `{base.name}` have the same weights: there is nothing to extract",
            hint=f"`sdops diff {base.name} {tuned.name}` compares all tensors",
        )
    raise MismatchError(
        f"`{tuned.name}` differs from `{base.name}` by no more than rounding, or the rule keeps nothing",
        hint="`--rank 16` extracts the difference regardless",
    )
