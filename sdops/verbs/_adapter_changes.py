"""What the patches of an adapter do to their layers: factors or a dense difference, whatever the family."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sdops import adapters
from sdops.core.lowrank import Factors, of_product
from sdops.core.patch import Adapter, Patch, Target
from sdops.core.ranks import Rule, Spectrum, ratio
from sdops.errors import MismatchError
from sdops.verbs._adapters import check_fits, read_parts
from sdops.verbs._inputs import FIRST_LAYERS

if TYPE_CHECKING:
    from sdops.verbs._adapter_base import Base

NOTHING = 1e-7  # of the largest singular value: float32 cannot tell less from zero
LOSSLESS: Rule = ratio(NOTHING)

# Layers of the U-Nets that are convolutions; their families may keep kernels flattened into the columns.
_KERNELS = re.compile(r"in_layers\.2|out_layers\.3|input_blocks\.\d+\.0\.op|.*\.conv|input_blocks\.0\.0|out\.2")
_POINTS = re.compile(r".*skip_connection")


@dataclass(frozen=True, slots=True)
class Change:
    """What happens to a layer, or to some rows of it, at strength 1.

    Attributes:
        target: The rows, in the order of the weight: never swapped.
        shape: Of these rows of the weight, [o, i], [o, i, kh, kw], or [o] of a norm.
        up: [o, r], with the scale folded in; None if the change is dense or only the bias changes.
        down: [r, i kh kw].
        is_svd: Whether columns of `up` and rows of `down` are orthogonal and in descending order.
        rest: Squared norm of what the factors leave out, orthogonal to them.
        dense: The change in `shape`.
        bias: The change of the bias, [o].
    """

    target: Target
    shape: tuple[int, ...]
    up: Tensor | None = None
    down: Tensor | None = None
    is_svd: bool = False
    rest: float = 0.0
    dense: Tensor | None = None
    bias: Tensor | None = None

    @property
    def factors(self) -> tuple[Tensor, Tensor]:
        """`up` and `down`, of rank 0 if there are none."""
        if self.up is None or self.down is None:
            device = None if self.bias is None else self.bias.device
            return torch.zeros(self.shape[0], 0, device=device), torch.zeros(0, prod(self.shape[1:]), device=device)
        return self.up, self.down

    @property
    def matrix(self) -> Tensor:
        """The change of the weight as a dense matrix [o, i kh kw]."""
        if self.dense is not None:
            return self.dense.reshape(self.shape[0], -1)
        up, down = self.factors
        return up @ down

    def to(self, device: str) -> Change:
        """The same on a device."""
        up, down, dense, bias = (
            None if part is None else part.to(device) for part in (self.up, self.down, self.dense, self.bias)
        )
        return replace(self, up=up, down=down, dense=dense, bias=bias)

    def scaled(self, weight: float) -> Change:
        """The change at another strength; signs go to `up`."""
        return replace(
            self,
            up=None if self.up is None else self.up * weight,
            dense=None if self.dense is None else self.dense * weight,
            bias=None if self.bias is None else self.bias * weight,
            is_svd=False,
        )


def has_factors(patch: Patch) -> bool:
    """Whether a patch is low-rank by its family, and that without its base weight."""
    is_product = patch.family in ("lora", "lora_embedding", "loha", "lokr") and "sparse_values" not in patch.parts
    return is_product and not adapters.family(patch.family).needs_weight(patch.parts)


def change_of(adapter: Adapter, patch: Patch, base: Base | None = None, most: int | None = None) -> Change:
    """Read a patch.

    Args:
        adapter: Where it is.
        patch: The patch.
        base: The weights it was made for; needed if its family's change depends on them.
        most: More ranks than this are not asked for, where leaving them out saves work (`Change.rest`).

    Raises:
        MismatchError: it depends on the base, and there is none, or none that fits.
        FormatError: a tensor holds NaN.
    """
    family, parts, target = adapters.family(patch.family), read_parts(adapter, patch), patch.target
    facts = family.check(adapter.shapes(patch), None)
    if base is None and family.needs_weight(parts):
        raise _needs_base(adapter, patch)
    shape = _shape(adapter, patch, parts, facts, base)
    weight = bias = None
    if base is not None and family.needs_weight(parts):
        weight = base.tensor(target) if facts.weight else None
        with_bias = facts.bias or (facts.bias_if_any and base.shape(target, "bias") is not None)
        bias = base.tensor(target, "bias") if with_bias else None
    moved = family.bias_delta(parts, shape, bias, **patch.settings) if facts.bias or bias is not None else None
    plain = replace(target, swapped=False)
    change = Change(plain, shape, bias=_turned(moved, target))
    if not facts.weight:
        return change
    found = family.fit(parts, shape, _most(parts, shape, most), **patch.settings) if len(shape) > 1 else None
    if found is not None:
        up, down, captured = found
        rest = float(up.double().norm(dim=0).mul(down.double().norm(dim=1)).square().sum()) * (1 / captured - 1)
        return replace(change, up=_turned(up, target), down=down, is_svd=True, rest=rest)
    product = family.factors(parts, shape, weight, **patch.settings)
    if product is not None:
        return replace(change, up=_turned(product[0], target), down=product[1])
    return replace(change, dense=_turned(family.delta(parts, shape, weight, **patch.settings), target))


def _most(parts: Mapping[str, Tensor], shape: tuple[int, ...], most: int | None) -> int:
    """How many singular values a Kronecker product can have that are not zero, or how many are wanted."""
    possible = prod(
        min(*parts[f"w{side}"].flatten(1).shape) if f"w{side}" in parts else len(parts[f"w{side}_b"])
        for side in "12"
        if f"w{side}" in parts or f"w{side}_b" in parts
    )
    return min(possible, shape[0], prod(shape[1:]), *([] if most is None else [most]))


def _turned(rows: Tensor | None, target: Target) -> Tensor | None:
    """Rows in the order of the weight."""
    return torch.cat(rows.chunk(2)[::-1]) if rows is not None and target.swapped else rows


def _shape(
    adapter: Adapter, patch: Patch, parts: Mapping[str, Tensor], facts: adapters.Facts, base: Base | None
) -> tuple[int, ...]:
    """The shape of the target's rows of the weight, as far as it can be told.

    Raises:
        MismatchError: it cannot, or the base's weight has another one.
    """
    if "reshape" in parts:
        return tuple(int(size) for size in parts["reshape"].reshape(-1))
    known = None if base is None else base.shape(patch.target, "weight" if facts.weight else "bias")
    if known is not None and not (_is_first(patch.target) and facts.columns not in (None, prod(known[1:]))):
        check_fits(adapter, patch, known)
        return known
    if patch.family == "full":
        return tuple(parts[next(part for part in ("diff", "set", "diff_b", "set_b") if part in parts)].shape)
    rows, columns = facts.rows, facts.columns
    if rows is None or columns is None:
        raise MismatchError(
            f"the shape of `{patch.target}` cannot be told from {patch.family}",
            hint="name the checkpoint that it was made for with `--base`",
            target=patch.target,
        )
    return rows, *kernel_shape(patch.target, columns, adapter.shapes(patch))


def _is_first(target: Target) -> bool:
    """Whether it is the layer whose inputs models for inpainting and control have more of."""
    return f"{target.module}.weight" in FIRST_LAYERS


def kernel_shape(target: Target, columns: int, shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, ...]:
    """Columns as [i] or [i, kh, kw], from the parts' shapes, or else from the layer's name."""
    for part in ("mid", "t1", "t2", "bm", "down", "w2"):
        if len(shapes.get(part, ())) == 4:
            kernel = shapes[part][2:]
            return columns // prod(kernel), *kernel
    if target.component == "unet":
        name = target.module
        if _KERNELS.fullmatch(name) or _KERNELS.fullmatch(name.split(".", 3)[-1]):
            return (columns // 9, 3, 3) if columns % 9 == 0 else (columns,)
        if _POINTS.fullmatch(name):
            return columns, 1, 1
    return (columns,)


def _needs_base(adapter: Adapter, patch: Patch) -> MismatchError:
    what = "DoRA" if {"dora_scale", "magnitude"} & patch.parts.keys() else patch.family
    return MismatchError(
        f"`{patch.target}` of `{adapter.source.name}` is {what}, which depends on the weights it was made for",
        hint="name the checkpoint with `--base`",
        target=patch.target,
        family=patch.family,
    )


# ------------------------------------------------------------------------------------------------------- low-rank work


def reduced(change: Change, rule: Rule = LOSSLESS) -> Factors:
    """The best approximation of a change that has factors, of the rank that a rule chooses; float64."""
    up, down = (part.double() for part in change.factors)
    if not change.is_svd:
        return of_product(up, down, rule)
    values = up.norm(dim=0) * down.norm(dim=1)
    short = min(up.shape[0], down.shape[1])
    known = values if change.rest else torch.nn.functional.pad(values, (0, short - len(values)))
    spectrum = Spectrum(known, float(values.square().sum()) + change.rest, (up.shape[0], down.shape[1]))
    wanted = rule(spectrum)
    rank = len(values) if wanted is None else min(wanted, len(values))
    return Factors(up[:, :rank], down[:rank], spectrum)


def joined(target: Target, changes: Sequence[Change]) -> Change:
    """The sum of changes of one module, exact: factors side by side, dense parts added.

    Args:
        target: The module, or the rows of it that the result speaks of; all changes lie within.
        changes: One or more, of any rows within the target.
    """
    wide = [spread(change, target) for change in changes]
    shape = max((change.shape for change in wide), key=len)  # a bias alone does not know the weight's
    weights = [change for change in wide if change.up is not None or change.dense is not None]
    biases = [change.bias for change in wide if change.bias is not None]
    bias = torch.stack(biases).sum(0) if biases else None
    if any(change.dense is not None for change in weights):
        dense = torch.stack([change.matrix.double() for change in weights]).sum(0).reshape(shape)
        return Change(target, shape, dense=dense, bias=bias)
    if len(weights) == 1:
        return replace(weights[0], bias=bias)
    if not weights:
        return Change(target, shape, bias=bias)
    pairs = [change.factors for change in weights]
    return Change(
        target, shape, torch.cat([up.double() for up, _ in pairs], 1), torch.cat([down.double() for _, down in pairs]),
        bias=bias,
    )  # fmt: skip


def spread(change: Change, target: Target) -> Change:
    """The same change on more rows: zeros where it does nothing."""
    own, wanted = change.target.share or (0, 1, 1), target.share or (0, 1, 1)
    if own == wanted:
        return change
    rows = change.shape[0] * own[2] // (own[1] - own[0])  # of the whole module
    first, last = rows * wanted[0] // wanted[2], rows * wanted[1] // wanted[2]
    top, bottom = rows * own[0] // own[2] - first, last - rows * own[1] // own[2]

    def padded(part: Tensor | None) -> Tensor | None:
        if part is None:
            return None
        zeros = [part.new_zeros(count, *part.shape[1:]) for count in (top, bottom)]
        return torch.cat([zeros[0], part, zeros[1]])

    return replace(
        change,
        target=target,
        shape=(last - first, *change.shape[1:]),
        up=padded(change.up),
        dense=padded(change.dense),
        bias=padded(change.bias),
    )


def distance(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> float:
    """||up_1 down_1 - up_2 down_2||_F, measured in float64 without building either.

    The norm of a product [up_1, -up_2] [down_1; down_2] is that of R_u R_d^T, from the triangular factors of both.
    """
    up = torch.cat([one[0].double(), -other[0].double()], dim=1)
    down = torch.cat([one[1].double(), other[1].double()])
    if up.shape[1] == 0:
        return 0.0
    if up.shape[1] >= min(up.shape[0], down.shape[1]):
        return float(torch.linalg.norm(up @ down))
    first = torch.linalg.qr(up, mode="r").R
    second = torch.linalg.qr(down.T, mode="r").R
    return float(torch.linalg.norm(first @ second.T))


def norm_of(change: Change) -> float:
    """||change of the weight||_F."""
    if change.dense is not None:
        return float(torch.linalg.norm(change.dense.double()))
    up, down = change.factors
    squared = ((up.double().T @ up.double()) * (down.double() @ down.double().T)).sum()
    return math.sqrt(max(float(squared), 0.0))
