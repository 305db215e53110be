"""Fused matrices and their parts: cut a patch to some rows of its module, join patches of several rows. Exact.

Cutting a LoRA takes rows of `up` and shares `down`; joining puts the `up`s below each other where all else is equal
(files that were split before), and block-diagonally where it is not, with the `down`s below each other and the ranks
added up.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import pairwise

from sdops.core.patch import Patch, Share
from sdops.core.spec import Spec
from sdops.dialects._recipes import (
    Recipe,
    Values,
    cut_columns,
    cut_rows,
    matrix,
    number,
    placed,
    scaled,
    swapped,
    whole,
)
from sdops.dialects._suffixes import ROWS
from sdops.errors import MismatchError

ALL: Share = (0, 1, 1)
_ZERO_ROWS = ("lora", "loha", "lokr", "full")  # families in which rows of zeros mean that these rows do not change


@dataclass(frozen=True, slots=True)
class Draft:
    """A patch on its way into a file: what its tensors will be made of.

    Attributes:
        name: For messages.
        family, settings: As the patch's.
        share: The rows of the canonical module that it changes.
        swapped: Whether these rows are stored with their halves exchanged.
        parts: Part -> how to make it.
    """

    name: str
    family: str
    share: Share
    swapped: bool
    parts: Mapping[str, Recipe]
    settings: Mapping[str, float | int | bool | str]

    @property
    def reach(self) -> tuple[Fraction, Fraction]:
        """First and last row as a part of the module's rows."""
        start, stop, total = self.share
        return Fraction(start, total), Fraction(stop, total)


def draft(patch: Patch, specs: Mapping[str, Spec]) -> Draft:
    """A patch as it is."""
    parts = {part: whole(key, specs) for part, key in patch.parts.items()}
    share = patch.target.share or ALL
    return Draft(str(patch.target), patch.family, share, patch.target.swapped, parts, patch.settings)


def scale(item: Draft, values: Values) -> float:
    """What a LoRA's `up @ down` is multiplied by: lora_alpha / r, or / sqrt(r) for rsLoRA; 1 without an alpha."""
    rank = rank_of(item)
    alpha = alpha_of(item, values)
    if alpha is None:
        return 1.0
    return float(alpha / rank**0.5) if item.settings.get("use_rslora") else alpha / rank


def rank_of(item: Draft) -> int:
    """Of a LoRA, on a layer or on a table of embeddings."""
    return item.parts["a" if item.family == "lora_embedding" else "down"].spec.shape[0]


def alpha_of(item: Draft, values: Values) -> float | None:
    """The alpha in the file or in its settings."""
    if "lora_alpha" in item.parts:
        return item.parts["lora_alpha"].number(values)
    return float(item.settings["lora_alpha"]) if "lora_alpha" in item.settings else None


def overlap(item: Draft, share: Share) -> Fraction:
    """Which part of the module's rows lies in a patch and in a share."""
    start, stop = Fraction(share[0], share[2]), Fraction(share[1], share[2])
    return max(Fraction(0), min(item.reach[1], stop) - max(item.reach[0], start))


def fitted(items: Sequence[Draft], share: Share, is_swapped: bool, values: Values) -> Draft:
    """The one patch that changes `share` as all these patches together do.

    Raises:
        MismatchError: the family cannot be cut or joined by rows.
    """
    if len(items) == 1 and _same(items[0].share, share):
        return turned(items[0], is_swapped)
    pieces = [cut(turned(item, False), share, values) for item in items]
    one = len(pieces) == 1 and _same(pieces[0].share, share)
    return turned(pieces[0] if one else join(pieces, share, values), is_swapped)


def is_idle(item: Draft, values: Values) -> bool:
    """Whether a LoRA's `up` is zero throughout, as that of rows which were put in to fill a fused matrix."""
    if item.family != "lora" or "dora_scale" in item.parts or "magnitude" in item.parts or "up_bias" in item.parts:
        return False
    return all(values.nonzero_columns(b.key, b.rows) == (0, 0) for b in item.parts["up"].blocks)


def turned(item: Draft, is_swapped: bool) -> Draft:
    """With the halves of its rows in the wanted order."""
    if item.swapped == is_swapped:
        return item
    rows = _row_parts(item)
    parts = {part: swapped(recipe) if part in rows else recipe for part, recipe in item.parts.items()}
    return replace(item, parts=parts, swapped=is_swapped)


def cut(item: Draft, share: Share, values: Values) -> Draft:
    """The rows of a patch that lie in `share`."""
    start = max(item.reach[0], Fraction(share[0], share[2]))
    stop = min(item.reach[1], Fraction(share[1], share[2]))
    if (start, stop) == item.reach:
        return item
    first, last = item.reach
    relative = ((start - first) / (last - first), (stop - first) / (last - first))
    rows = _row_parts(item)
    parts = {}
    for part, recipe in item.parts.items():
        parts[part] = _cut_part(item, part, recipe, relative) if part in rows else recipe
    total = start.denominator * stop.denominator
    reduced = replace(item, parts=parts, share=(int(start * total), int(stop * total), total))
    return _without_idle_ranks(reduced, values) if item.family == "lora" else reduced


def _cut_part(item: Draft, part: str, recipe: Recipe, relative: tuple[Fraction, Fraction]) -> Recipe:
    count = recipe.spec.shape[0]
    start, stop = relative[0] * count, relative[1] * count
    if start.denominator != 1 or stop.denominator != 1:
        raise MismatchError(
            f"`{item.name}` cannot be split: its `{part}` has {count} rows, which do not divide as the layers do",
            hint="convert it to plain LoRA first",
            target=item.name,
            part=part,
        )
    return cut_rows(recipe, (int(start), int(stop)))


def _without_idle_ranks(item: Draft, values: Values) -> Draft:
    """Drop ranks whose `up` is zero in all rows left, as in a block that was joined before."""
    up, down, rank = item.parts["up"], item.parts["down"], item.parts["down"].spec.shape[0]
    (block,) = up.blocks
    columns = values.nonzero_columns(block.key, block.rows)
    width = columns[1] - columns[0]
    if width in (0, rank) or "mid" in item.parts or up.matrix[1] != rank:
        return item
    parts = {**item.parts, "up": cut_columns(up, columns), "down": cut_rows(down, columns)}
    alpha, settings = alpha_of(item, values), dict(item.settings)
    if alpha:
        parts["lora_alpha"] = number(scale(item, values) * width)
        settings = {key: value for key, value in settings.items() if key not in ("lora_alpha", "use_rslora")}
    return replace(item, parts=parts, settings=settings)


def join(items: Sequence[Draft], share: Share, values: Values) -> Draft:
    """One patch of `share`, whose rows these patches have between them; rows that none has do not change.

    Raises:
        MismatchError: the family has no such thing.
    """
    items = sorted(items, key=lambda item: item.reach)
    covered = sum((item.reach[1] - item.reach[0] for item in items), Fraction(0))
    complete = covered == Fraction(share[1] - share[0], share[2])
    if any(first.reach[1] > second.reach[0] for first, second in pairwise(items)):
        raise _refusal(items, "two patches change the same rows")
    _check_joinable(items, complete)
    if _differ_in_rows_alone(items, values):
        return _stacked(items, share)
    if items[0].family == "lora" and all("mid" not in item.parts for item in items):
        return _block_diagonal(items, share, values)
    raise _refusal(items, f"{items[0].family} patches with different factors make no {items[0].family} patch together")


def _check_joinable(items: Sequence[Draft], complete: bool) -> None:
    family = items[0].family
    if len({frozenset(item.parts.keys() - {"lora_alpha", "up_bias"}) for item in items}) > 1:
        raise _refusal(items, "they do not have the same parts")
    if complete:
        return
    if family not in _ZERO_ROWS or {"dora_scale", "magnitude", "set", "set_b"} & items[0].parts.keys():
        raise _refusal(items, "rows between them are missing, and nothing stands for rows without change")


def _differ_in_rows_alone(items: Sequence[Draft], values: Values) -> bool:
    """Whether everything but the row parts is the same in all."""
    first, rows = items[0], _row_parts(items[0])
    if any(item.settings != first.settings or item.parts.keys() != first.parts.keys() for item in items):
        return False
    others = first.parts.keys() - rows
    return all(_equal(item.parts[part], first.parts[part], values) for item in items[1:] for part in others)


def _equal(one: Recipe, other: Recipe, values: Values) -> bool:
    if one.spec.shape != other.spec.shape or one.value != other.value:
        return False
    if one.copied is None or other.copied is None:
        return one == other
    return one.copied == other.copied or values.equal(one.copied, other.copied)


def _stacked(items: Sequence[Draft], share: Share) -> Draft:
    """Row parts below each other, everything else once."""
    parts = dict(items[0].parts)
    for part in _row_parts(items[0]):
        parts[part] = _column([(item, item.parts[part]) for item in items], share)
    return replace(items[0], share=share, parts=parts)


def _block_diagonal(items: Sequence[Draft], share: Share, values: Values) -> Draft:
    """up = diag(s_1 up_1, s_2 up_2, ...) / s, down = the downs below each other, s = the first patch's scale."""
    scales = [scale(item, values) for item in items]
    ranks = [item.parts["down"].spec.shape[0] for item in items]
    total = sum(ranks)
    lefts = [sum(ranks[:index]) for index in range(len(items))]
    ups = [scaled(item.parts["up"], own / scales[0]) for item, own in zip(items, scales, strict=True)]
    downs = [item.parts["down"] for item in items]
    parts = dict(items[0].parts)
    parts["up"] = _column(list(zip(items, ups, strict=True)), share, lefts, total)
    parts["down"] = placed(
        [(d, (top, 0)) for d, top in zip(downs, lefts, strict=True)], (total, *downs[0].spec.shape[1:])
    )
    parts["lora_alpha"] = number(scales[0] * total)
    biased = [
        (i, scaled(i.parts["up_bias"], s / scales[0]))
        for i, s in zip(items, scales, strict=True)
        if "up_bias" in i.parts
    ]
    for part in _row_parts(items[0]) - {"up", "up_bias"}:
        parts[part] = _column([(item, item.parts[part]) for item in items], share)
    if biased:
        parts["up_bias"] = _column(biased, share)
    settings = {key: value for key, value in items[0].settings.items() if key not in ("lora_alpha", "use_rslora")}
    return replace(items[0], share=share, parts=parts, settings=settings)


def _column(
    items: Sequence[tuple[Draft, Recipe]], share: Share, lefts: Sequence[int] = (), width: int | None = None
) -> Recipe:
    """Recipes below each other at the rows that their drafts change, zeros where there is none."""
    start, stop = Fraction(share[0], share[2]), Fraction(share[1], share[2])
    item, recipe = items[0]
    per_module = recipe.spec.shape[0] / (item.reach[1] - item.reach[0])  # rows of the whole module
    count = per_module * (stop - start)
    tops = [(other.reach[0] - start) * per_module for other, _ in items]
    fits = all(each.spec.shape[0] == per_module * (other.reach[1] - other.reach[0]) for other, each in items)
    if not fits or count.denominator != 1 or any(top.denominator != 1 for top in tops):
        raise _refusal([other for other, _ in items], "their rows do not add up to the layer")
    tail = recipe.spec.shape[1:] if width is None else (width, *recipe.spec.shape[2:])
    places = [(int(top), lefts[index] if lefts else 0) for index, top in enumerate(tops)]
    return placed([(each, place) for (_, each), place in zip(items, places, strict=True)], (int(count), *tail))


def _row_parts(item: Draft) -> frozenset[str]:
    """The parts along whose dim 0 the weight's rows run.

    Raises:
        MismatchError: the family, or this patch's form of it, cannot be cut by rows.
    """
    rows = ROWS.get(item.family, {})
    found = frozenset(part for part in item.parts if part in rows)
    odd = {part for part in item.parts if part in ("t1", "t2", "reshape") or part.startswith("sparse_")}
    if item.family == "lokr":
        odd.discard("t2")
    if "dora_scale" in item.parts and matrix(item.parts["dora_scale"].spec.shape)[1] != 1:
        odd.add("dora_scale")  # one number per input channel: the norms couple all rows
    if item.family == "glora" and item.parts["b1"].spec.shape[1] != item.parts["b2"].spec.shape[0]:
        odd.add("b1")  # the early form, with its factors the other way round
    if not found or odd:
        what = f"`{min(odd)}`" if odd else f"a patch of family `{item.family}`"
        raise MismatchError(
            f"`{item.name}` cannot be split or joined by rows: {what} does not allow it",
            hint="convert it to plain LoRA first, with `--base`",
            target=item.name,
        )
    return found


def _same(one: Share, other: Share) -> bool:
    return one[0] * other[2] == other[0] * one[2] and one[1] * other[2] == other[1] * one[2]


def _refusal(items: Sequence[Draft], why: str) -> MismatchError:
    return MismatchError(
        f"{', '.join(f'`{item.name}`' for item in items)} cannot be joined: {why}",
        hint="convert them to plain LoRA first",
        targets=[item.name for item in items],
    )
