"""Give the layers of a LoRA other ranks: the best that each rank allows, worked out on the factors alone.

sdops.resize("style.safetensors", rank=8, output="small.safetensors")
sdops.resize("style.safetensors", budget=20_000_000)
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdops import __version__
from sdops.core.accel import check_device
from sdops.core.patch import Adapter, Patch
from sdops.core.run import default_jobs
from sdops.core.spec import DTYPE_BITS
from sdops.dialects import dialect
from sdops.errors import MismatchError, UsageError
from sdops.report import Progress, Report, silent
from sdops.text import size
from sdops.verbs._adapter_metadata import carried, with_recipe
from sdops.verbs._adapter_path import adapter_path, shown, workplace
from sdops.verbs._adapters import AdapterFile, name_of, open_adapter, patch_bytes, spelled
from sdops.verbs._rank_rules import checked, rule_for, words

if TYPE_CHECKING:
    from torch import Tensor

    from sdops.core.patch import Target
    from sdops.core.ranks import Rule
    from sdops.verbs._adapter_changes import Change
    from sdops.verbs._adapter_output import Pieces

DTYPES = ("keep", "fp16", "bf16", "fp32")
_ENTRY = 160  # bytes that one tensor's entry in the header takes at most, its name aside
_RECIPE = 2000  # bytes that the header says about how the file was made
_ROUNDING = 1e-12  # of the energy: no loss


@dataclass(frozen=True, slots=True)
class Layer:
    """What became of a patch.

    Attributes:
        patch: What it was.
        before: Its rank as the file has it; None for families without.
        after: The rank now; None if it was kept as it is.
        energy: ||delta||_F^2.
        error: ||delta - result||_F, with the rounded factors.
        is_product: Whether it is low-rank by its family; the others are not looked at.
    """

    patch: Patch
    before: int | None
    after: int | None
    energy: float
    error: float
    is_product: bool = True

    @property
    def relative(self) -> float:
        """||delta - result||_F / ||delta||_F."""
        return self.error / math.sqrt(self.energy) if self.energy else 0.0


def resize(
    lora: AdapterFile,
    *,
    output: str | os.PathLike[str] | None = None,
    rank: int | None = None,
    conv_rank: int | None = None,
    te_rank: int | None = None,
    energy: float | None = None,
    frobenius: float | None = None,
    ratio: float | None = None,
    absolute: float | None = None,
    quantile: float | None = None,
    budget: int | None = None,
    max_rank: int | None = None,
    to: str | None = None,
    dtype: str = "keep",
    strip_training_metadata: bool = False,
    allow_unknown: bool = False,
    architecture: str | None = None,
    device: str = "cpu",
    jobs: int | None = None,
    dry_run: bool = False,
    force: bool = False,
    hash_inputs: bool = True,
    progress: Progress = silent,
) -> Report:
    """Lower the ranks of a LoRA with the least error that the new ranks allow.

    up = Q_u R_u, down^T = Q_d R_d; the singular values of up down are those of R_u R_d^T, which has the size of the
    rank (core.lowrank.of_product). LoHa, LoKr and Tucker patches become LoRA where that is smaller than what they are.
    What is not low-rank by itself (DoRA, OFT, norms, biases, differences) stays as it is.

    Args:
        lora: The file, of any dialect, or a PEFT folder.
        output: Where to write; default: `LORA.resized.safetensors` in this folder.
        rank: No layer gets a higher rank.
        conv_rank: Another one for convolutions larger than 1x1.
        te_rank: Another one for text encoders.
        energy: Keep this share of the squared singular values of each layer.
        frobenius: Keep this share of each layer's Frobenius norm.
        ratio: Keep singular values above this share of the layer's largest.
        absolute: Keep singular values above this.
        quantile: Keep this share of the sum of the singular values, as LyCORIS does.
        budget: Bytes of the file, spread over the layers so that the error of the whole is least.
        max_rank: No layer gets more, whatever the rule says.
        to: The dialect; default: the input's.
        dtype: Of new factors: keep, fp16, bf16 or fp32.
        strip_training_metadata: Leave out tags, folders and settings of the training.
        allow_unknown: Leave out tensors that are not understood.
        architecture: What it was made for (sd1, sdxl, flux1 ...), where the file does not tell.
        device: cpu, or cuda: factors are decomposed on a GPU, many layers at once.
        jobs: Threads; default: one per core.
        dry_run: Check everything, write nothing.
        force: Replace an existing output.
        hash_inputs: Record the input's SHA-256.
        progress: Called as `progress(label, total_bytes)`.

    Returns:
        A report: rank before and after and the error of every layer, measured with the rounded factors.

    Raises:
        UsageError: the request makes no sense.
        FormatError: the file is no adapter, is damaged, or holds NaN.
        MismatchError: the dialect cannot hold the result, or the budget is too small.
        OutputError: the output exists, is the input, or does not fit on the disk.
    """
    wishes = checked(
        rank=rank,
        conv_rank=conv_rank,
        te_rank=te_rank,
        energy=energy,
        frobenius=frobenius,
        ratio=ratio,
        absolute=absolute,
        quantile=quantile,
        budget=budget,
        max_rank=max_rank,
    )
    if dtype not in DTYPES:
        raise UsageError(f"`dtype` cannot be `{dtype}`", hint=f"choose one of {', '.join(DTYPES)}")
    if device != "cpu":
        check_device(device)
    if to is not None:
        dialect(to)
    adapter = open_adapter(lora, allow_unknown=allow_unknown, architecture=architecture)
    try:
        to = to or adapter.dialect
        return _resized(
            adapter,
            adapter_path(f"{Path(name_of(lora)).stem}.resized.safetensors", output, to),
            wishes,
            to,
            dtype,
            strip=strip_training_metadata,
            device=device,
            jobs=jobs or default_jobs(),
            dry_run=dry_run,
            force=force,
            hash_inputs=hash_inputs,
            progress=progress,
        )
    finally:
        adapter.source.close()


def _resized(
    adapter: Adapter,
    path: Path,
    wishes: dict[str, float],
    to: str,
    dtype: str,
    *,
    strip: bool,
    device: str,
    jobs: int,
    dry_run: bool,
    force: bool,
    hash_inputs: bool,
    progress: Progress,
) -> Report:
    from sdops.verbs._adapter_output import Pieces
    from sdops.verbs._adapter_save import check_output, opened, save
    from sdops.verbs._hashes import part_record
    from sdops.verbs._resize_report import report

    begin, part = time.monotonic(), opened(adapter)
    check_output(path, [part], (), force=force)
    with Pieces(workplace(path), adapter.source.name) as pieces:
        with progress("resizing", sum(patch_bytes(adapter, patch) for patch in adapter.patches)) as advance:
            layers = _work(adapter, pieces, wishes, dtype, device, jobs, advance)
        pieces.keep_extras(adapter)
        if not pieces.patches:
            raise MismatchError(
                f"nothing of `{adapter.source.name}` is left at these ranks",
                hint="keep more: `--rank 4`, `--energy 0.9`",
            )
        ranks = [layer.after or layer.before for layer in layers]
        convolutions = [_kind(adapter, layer.patch) == "conv" for layer in layers]
        header = carried(
            adapter,
            [r for r, conv in zip(ranks, convolutions, strict=True) if r and not conv],
            [r for r, conv in zip(ranks, convolutions, strict=True) if r and conv],
            strip=strip,
        )
        made = {"version": __version__, "verb": "resize", **wishes, "dtype": dtype, "to": to}
        record = {**made, "inputs": [part_record("a", part)]}
        result = spelled(pieces.adapter(adapter, with_recipe(header, record)), to)
        check_output(path, [part], result.companions, force=force)
        if dry_run:  # tensors beside tensors: the header is not known yet
            before, after = (
                sum(spec.nbytes for spec in each.specs.values()) for each in (adapter.source, result.source)
            )
        else:
            before = sum(map(os.path.getsize, part.files))
            after = save(result, path, [part], jobs=jobs, force=force, hash_inputs=hash_inputs, progress=progress)
    facts: dict[str, Any] = {"output": str(shown(path)), "bytes": after, "dry_run": dry_run, "dialect": to}
    facts |= {"bytes_before": before, "settings": dict(wishes), "rule": words(wishes)}
    return report(adapter, layers, facts, time.monotonic() - begin)


# --------------------------------------------------------------------------------------------------------- the work


def _work(
    adapter: Adapter,
    pieces: Pieces,
    wishes: dict[str, float],
    dtype: str,
    device: str,
    jobs: int,
    advance: Callable[[int], None],
) -> list[Layer]:
    """Reduce all patches, in the file's order, and put them among the pieces."""
    import torch

    from sdops.core.ranks import fixed

    torch.set_num_threads(1)  # our own threads share the cores
    layers = []
    with ThreadPoolExecutor(jobs) as pool:
        rules = [rule_for(_kind(adapter, patch), wishes) for patch in adapter.patches]
        if "budget" in wishes and (limit := _numbers_left(adapter, int(wishes["budget"]), dtype)) is not None:
            ranks = _within_budget(adapter, rules, limit, device, pool)
            rules = [fixed(rank) for rank in ranks]
        most = [_most(_kind(adapter, patch), wishes) for patch in adapter.patches]
        make = partial(_reduced, adapter, dtype, _reader(adapter, most, device))
        for layer, product in pool.map(make, adapter.patches, rules, most):
            if product is not None:
                pieces.add_factors(*product)
            elif layer.after is None:
                pieces.keep(adapter, layer.patch)
            layers.append(layer)
            advance(patch_bytes(adapter, layer.patch))
    return layers


def _reader(adapter: Adapter, most: Sequence[int | None], device: str) -> Callable[[Patch], Change]:
    """What reads the change of a patch; on a GPU many are decomposed at once."""
    from sdops.verbs._adapter_changes import change_of

    if device != "cpu":
        from sdops.verbs._resize_device import Decomposed

        return Decomposed(adapter, most, device)
    limits = {id(patch): limit for patch, limit in zip(adapter.patches, most, strict=True)}
    return lambda patch: change_of(adapter, patch, most=limits[id(patch)])


def _reduced(
    adapter: Adapter, dtype: str, read: Callable[[Patch], Change], patch: Patch, rule: Rule, most: int | None
) -> tuple[Layer, tuple[Target, tuple[int, ...], Tensor, Tensor, str] | None]:
    """A patch at the rank that a rule chooses; as it is where that takes no more room and loses nothing."""
    from sdops.verbs._adapter_changes import distance, has_factors, reduced
    from sdops.verbs._adapter_output import dtype_of, rounded

    before = _rank(adapter, patch)
    if not has_factors(patch):
        return Layer(patch, before, None, 0.0, 0.0, is_product=False), None
    change, stored = read(patch), dtype_of(adapter, patch, dtype)
    found = reduced(change, rule)
    energy, rank = found.spectrum.energy, found.rank
    if energy == 0 and most is not None and most < (before or 0):  # what changes nothing still has a rank
        up, down = (part.float() for part in change.factors)
        layer = Layer(patch, before, most, 0.0, 0.0)
        return layer, (change.target, change.shape, up[:, :most], down[:most], stored)
    lost = max(energy - float(found.spectrum.values[:rank].square().sum()), 0.0)  # orthogonal to what is kept
    numbers = rank * (change.shape[0] + prod(change.shape[1:]))
    if lost <= _ROUNDING * energy and (numbers >= _numbers(adapter, patch) or energy == 0):
        return Layer(patch, before, None, energy, 0.0), None
    if rank == 0:
        return Layer(patch, before, 0, energy, math.sqrt(energy)), None
    up, down = rounded(patch.target, found.up, stored), rounded(patch.target, found.down, stored)
    error = math.hypot(math.sqrt(lost), distance((found.up, found.down), (up, down)))
    layer = Layer(patch, before, rank, energy, error)
    return layer, (change.target, change.shape, up, down, stored)


def _most(kind: str, wishes: Mapping[str, float]) -> int | None:
    """No more ranks than this will be kept of a layer; None if its values must be seen first."""
    special = {"conv": "conv_rank", "te": "te_rank"}.get(kind, "")
    rank = wishes.get(special, wishes.get("rank"))
    limits = [int(limit) for limit in (rank, wishes.get("max_rank") if rank else None) if limit is not None]
    return min(limits, default=None)


def _numbers_left(adapter: Adapter, nbytes: int, dtype: str) -> int | None:
    """How many numbers all new factors together may have for the file to have at most so many bytes.

    None if the file has no more than that as it is.

    Raises:
        MismatchError: what cannot be cut is larger than that.
    """
    from sdops.verbs._adapter_changes import has_factors
    from sdops.verbs._adapter_output import dtype_of

    whole = sum(spec.nbytes for spec in adapter.source.specs.values())
    other = sum(len(key) + len(text.encode()) + 8 for key, text in adapter.source.metadata.items()) + _RECIPE
    other += sum(3 * (_ENTRY + len(str(patch.target))) for patch in adapter.patches)
    if whole + other <= nbytes:
        return None
    other += sum(patch_bytes(adapter, patch) for patch in adapter.patches if not has_factors(patch))
    other += sum(adapter.source.specs[key].nbytes for key in adapter.extras)
    if nbytes < other:
        raise MismatchError(
            f"what of `{adapter.source.name}` cannot be made smaller takes {size(other)}",
            hint=f"`--budget {size(2 * other).replace(' ', '')}` leaves room for the layers",
        )
    width = max(DTYPE_BITS[dtype_of(adapter, patch, dtype)] for patch in adapter.patches) // 8
    return (nbytes - other) // width


def _within_budget(
    adapter: Adapter, rules: Sequence[Rule], numbers: int, device: str, pool: ThreadPoolExecutor
) -> list[int]:
    """The rank of every patch, so that the squared error of the whole is least; 0 for those that are no product."""
    from sdops.core.ranks import Budget
    from sdops.verbs._adapter_changes import has_factors, reduced

    read = _reader(adapter, [None] * len(adapter.patches), device)

    def look(item: tuple[Patch, Rule]) -> tuple[list[float], int]:
        patch, rule = item
        if not has_factors(patch):
            return [], 1
        change = read(patch)
        found = reduced(change, rule)
        cost = change.shape[0] + prod(change.shape[1:])
        useful = min(found.rank, max(_numbers(adapter, patch) // cost, 1))  # no more than what the patch has now
        return found.spectrum.values[:useful].tolist(), cost

    budget = Budget(numbers)
    for values, cost in pool.map(look, zip(adapter.patches, rules, strict=True)):
        budget.add(values, cost)
    return budget.ranks()


def _kind(adapter: Adapter, patch: Patch) -> str:
    """What rules call the layer."""
    if patch.target.component not in ("unet", "transformer"):
        return "te"
    from sdops.verbs._adapter_changes import kernel_shape

    shapes = adapter.shapes(patch)
    down = shapes.get("down") or shapes.get("w2") or shapes.get("w2_b") or shapes.get("w1_b") or (1, 1)
    kernel = kernel_shape(patch.target, prod(down[1:]), shapes)[1:]
    return "conv" if prod(kernel) > 1 else "linear"


def _rank(adapter: Adapter, patch: Patch) -> int | None:
    from sdops import adapters

    return adapters.family(patch.family).check(adapter.shapes(patch), None).rank


def _numbers(adapter: Adapter, patch: Patch) -> int:
    """Of the factors: alpha is not counted."""
    return sum(spec.numel for key in patch.parts.values() if (spec := adapter.source.specs[key]).numel > 1)
