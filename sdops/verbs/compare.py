"""Compare two LoRAs layer by layer: how large, in which direction, on which inputs and outputs.

print(sdops.compare("style.safetensors", "face.safetensors"))
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from sdops.core.patch import Adapter
from sdops.core.run import default_jobs
from sdops.errors import MismatchError
from sdops.report import HEAT, Progress, Report, Section, silent
from sdops.text import count
from sdops.verbs._adapter_blocks import Blocks
from sdops.verbs._adapters import open_alike, patch_bytes

if TYPE_CHECKING:
    from sdops.verbs._adapter_measures import Likeness
    from sdops.verbs._merge_adapters_work import Group

_BOUNDS = (0.02, 0.1, 0.3, 0.7)  # |cosine| and overlap -> shade of report.HEAT
_ROWS = 40


def compare(
    a: str | os.PathLike[str],
    b: str | os.PathLike[str],
    *,
    base: str | os.PathLike[str] | None = None,
    jobs: int | None = None,
    progress: Progress = silent,
) -> Report:
    """Cosine and overlap of two adapters, per layer, per block and as a whole, whatever their dialects and families.

    With D = up_a down_a and E = up_b down_b: cosine = <D, E> / (|D| |E|), where <D, E> = sum((up_a^T up_b) *
    (down_a down_b^T)) in O((o + i) r^2). Overlap = |P^T Q|^2 / min(r_a, r_b) of orthonormal bases of the inputs that
    both react to, and of the outputs that both change (as in section 7.2 of the LoRA paper, arXiv:2106.09685).

    Args:
        a: A LoRA-like file of any dialect.
        b: Another one.
        base: The checkpoint that they are for: for DoRA and others whose change depends on it; else they are left out.
        jobs: Threads; default: one per core.
        progress: Called as `progress(label, total)`.

    Raises:
        FormatError: a file is no adapter, is damaged, or holds NaN.
        MismatchError: they are for different models, or have no layer in common.
    """
    one, other = open_alike([a, b])
    try:
        return _compared(one, other, base, jobs or default_jobs(), progress)
    finally:
        one.source.close()
        other.source.close()


def _compared(
    one: Adapter, other: Adapter, base: str | os.PathLike[str] | None, jobs: int, progress: Progress
) -> Report:
    import torch

    from sdops.verbs._adapter_base import Base
    from sdops.verbs._adapter_changes import change_of, joined
    from sdops.verbs._adapter_measures import likeness
    from sdops.verbs._merge_adapters_work import check_shapes, groups

    pair = one, other
    weights = None if base is None else Base(base, one)
    every = groups(pair)
    shared = [group for group in every if len(group.patches) == 2]
    todo = [group for group in shared if weights or not _needs_base(group)]
    if not todo:
        raise MismatchError(
            f"`{one.source.name}` and `{other.source.name}` have no layer in common that can be compared",
            hint="`--base` is needed for DoRA, OFT and the like" if shared else "`sdops inspect` shows their layers",
        )
    torch.set_num_threads(1)  # our own threads share the cores

    def work(group: Group) -> Likeness:
        changes = [
            joined(group.target, [change_of(pair[index], patch, weights) for patch in patches])
            for index, patches in sorted(group.patches.items())
        ]
        check_shapes(group.target, list(zip(pair, changes, strict=True)))
        return likeness(changes[0], changes[1])

    found: dict[str, Likeness] = {}
    sizes = {g.target: sum(patch_bytes(pair[i], p) for i, ps in g.patches.items() for p in ps) for g in todo}
    with progress("comparing", sum(sizes.values())) as advance, ThreadPoolExecutor(jobs) as pool:
        for group, each in zip(todo, pool.map(work, todo), strict=True):
            found[str(group.target)] = each
            advance(sizes[group.target])
    alone = [sum(list(group.patches) == [index] for group in every) for index in (0, 1)]
    blocks = Blocks(one)
    rows = {str(group.target): blocks.row(group.target) for group in todo}
    return _report(pair, found, rows, blocks.slots, alone, len(shared) - len(todo))


def _needs_base(group: Group) -> bool:
    from sdops import adapters

    patches = [patch for patches in group.patches.values() for patch in patches]
    return any(adapters.family(patch.family).needs_weight(patch.parts) for patch in patches)


# ---------------------------------------------------------------------------------------------------------- the report


def _report(
    pair: tuple[Adapter, Adapter],
    found: Mapping[str, Likeness],
    rows: Mapping[str, str],
    slots: Sequence[str],
    alone: Sequence[int],
    skipped: int,
) -> Report:
    from sdops.verbs._adapter_measures import cosine_of

    whole = cosine_of(found)
    names = [adapter.source.name for adapter in pair]
    report = Report("compare", result=["none" if whole is None else f"{whole:.6f}"])
    report.data = {
        "a": names[0],
        "b": names[1],
        "architecture": pair[0].architecture,
        "cosine": whole,
        "norms": [_norm(found, 0), _norm(found, 1)],
        "layers": {name: _facts(each) for name, each in found.items()},
        "blocks": {block: _summary(cells) for block, cells in _by_block(found, rows, slots).items()},
        "only_a": alone[0],
        "only_b": alone[1],
        "skipped": skipped,
    }
    lines = [
        ("cosine", "unknown: one of them is zero" if whole is None else f"{whole:+.4f}"),
        ("size", f"{_norm(found, 0):.4g} and {_norm(found, 1):.4g} in the layers that both change"),
        ("layers", f"{len(found):,} in both, {alone[0]:,} only in A, {alone[1]:,} only in B"),
    ]
    report.sections = [Section(f"{names[0]} and {names[1]}", lines), _heat_map(report.data["blocks"]), _each(found)]
    if skipped:
        report.warnings.append(f"{count(skipped, 'layer')} not compared: their change depends on the base")
        report.hints.append("`--base CHECKPOINT` compares them too")
    return report


def _norm(found: Mapping[str, Likeness], side: int) -> float:
    return math.sqrt(math.fsum(each.norms[side] ** 2 for each in found.values()))


def _facts(each: Likeness) -> dict[str, Any]:
    return {
        "norms": list(each.norms),
        "cosine": each.cosine,
        "overlap_in": each.overlap_in,
        "overlap_out": each.overlap_out,
        "chance": each.chance,
    }


def _by_block(
    found: Mapping[str, Likeness], rows: Mapping[str, str], slots: Sequence[str]
) -> dict[str, dict[str, Likeness]]:
    """Blocks in the model's order, components behind."""
    grid: dict[str, dict[str, Likeness]] = {slot: {} for slot in slots}
    for name, each in found.items():
        grid.setdefault(rows[name], {})[name] = each
    return {block: cells for block, cells in grid.items() if cells}


def _summary(cells: Mapping[str, Likeness]) -> dict[str, Any]:
    """Of one block: the cosine of all its layers together, the mean overlaps."""
    from sdops.verbs._adapter_measures import cosine_of

    inputs = [each.overlap_in for each in cells.values() if each.overlap_in is not None]
    outputs = [each.overlap_out for each in cells.values() if each.overlap_out is not None]
    return {
        "layers": len(cells),
        "norms": [_norm(cells, 0), _norm(cells, 1)],
        "cosine": cosine_of(cells),
        "overlap_in": sum(inputs) / len(inputs) if inputs else None,
        "overlap_out": sum(outputs) / len(outputs) if outputs else None,
    }


def _heat_map(blocks: Mapping[str, Mapping[str, Any]]) -> Section:
    rows = []
    for block, cells in blocks.items():
        measures = [cells[name] for name in ("cosine", "overlap_in", "overlap_out")]
        shown = [text for value in measures for text in (_shade(value), _number(value))]
        rows.append((block, *shown, f"{cells['norms'][0]:.3g}", f"{cells['norms'][1]:.3g}", f"{cells['layers']:,}"))
    titles = ("block", "", "cosine>", "", "inputs>", "", "outputs>", "|A|>", "|B|>", "layers>")
    return Section("Likeness and overlap by block", rows, titles, heat=True)


def _shade(value: float | None) -> str:
    return "" if value is None else HEAT[sum(abs(value) > bound for bound in _BOUNDS)] * 2


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _each(found: Mapping[str, Likeness]) -> Section:
    order = sorted(found.items(), key=lambda item: -abs(item[1].cosine or 0.0))
    rows = [(name, _number(e.cosine), _number(e.overlap_in), _number(e.overlap_out)) for name, e in order[:_ROWS]]
    return Section("Most alike", rows, ("layer", "cosine>", "inputs>", "outputs>"), detail=True)
