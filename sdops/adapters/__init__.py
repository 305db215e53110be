"""SHELF: families of adapters, that is, ways to write a change of a weight in few numbers. One file is one family.

Letters of the shapes: o = output, i = input channels, k = kernel (kh, kw; nothing for linear layers), r = rank,
b = block size, n = number of blocks. `shape` is the weight's, `[o, i]` or `[o, i, kh, kw]`; a convolution as a matrix
is `[o, i kh kw]`. A patch of some rows of a fused matrix has the shape of those rows.

    family   required parts             optional parts
    lora     up down                    mid lora_alpha dora_scale magnitude up_bias reshape
                                        sparse_indices sparse_values sparse_size
    lora_embedding  a b                 lora_alpha
    loha     w1_a w1_b w2_a w2_b        t1 t2 lora_alpha dora_scale magnitude
    lokr     w1 (or w1_a w1_b)          t2 lora_alpha dora_scale magnitude
             w2 (or w2_a w2_b)
    glora    a1 a2 b1 b2                bm lora_alpha
    ia3      weight on_input (or multiplier)
    oft      blocks (or vectors)        rescale constraint scaled
    boft     blocks                     rescale constraint
    full     one or more of             reshape
             diff set diff_b set_b
    tlora    q_layer p_layer lambda_layer   refused by name: such a file does not tell its own change

Their names in files: `up`, `down` = `lora_up`, `lora_down` or `lora_B`, `lora_A`; `lora_alpha` = `alpha`, but for oft
and boft, where `alpha` is the `constraint`; `dora_scale` = LyCORIS' DoRA vector, `magnitude` = PEFT's
`lora_magnitude_vector` (two parts, because `(1, N, 1, 1)` is the input axis in one and the output axis in the other);
`up_bias` = `lora_B.bias`; norms' `w_norm`, `b_norm` = `diff`, `diff_b`; `set_weight` = `set`; `reshape_weight` =
`reshape`; `oft_blocks` = `blocks`; `oft_R.weight` = `vectors`, `oft_R.scaled_oft` = `scaled`. DyLoRA and Control-LoRA
files are plain `lora`. `lora_embedding_A`, `lora_embedding_B` = `a`, `b`; `ia3_l` = `multiplier`; LyCORIS'
`bias_indices`, `bias_values`, `bias_size` = `sparse_indices` ...

Each file offers

    REQUIRED: tuple[str, ...]      parts that are always there; check() knows about alternatives
    OPTIONAL: tuple[str, ...]      parts that may be there
    NEEDS_WEIGHT: tuple[str, ...]  a patch with one of these parts depends on the base weight: `delta` needs it
    check(shapes, shape) -> Facts
        Look at the parts' shapes alone, without torch. `shape` is the base weight's, None if unknown.
        Raises FormatError (parts that do not fit each other) or MismatchError (the weight); both name the part.
    delta(parts, shape, weight=None, **settings) -> Tensor
        W' - W at strength 1, in the weight's shape: float32, or float64 if a part or the weight is. Differentiable.

and, where there is such a thing,

    factors(parts, shape, weight=None, **settings) -> tuple[Tensor, Tensor] | None
        up [o, R], down [R, i kh kw] with the scale folded in, up @ down == delta exactly; None if this patch has none.
    bias_delta(parts, shape, bias=None, **settings) -> Tensor | None
        The change of the module's bias [o]; None if this patch leaves it alone.
    fit(parts, shape, rank, **settings) -> tuple[Tensor, Tensor, float] | None
        The best LoRA of a rank without a dense matrix, and the share of the squared norm that it keeps.

`family(name)` loads one, with functions that answer None for what it does not offer; the arguments before `settings` go
by position. Files of this shelf import torch inside functions only.

Strength t is the caller's: W + t delta, also for DoRA, OFT and all others whose delta depends on W. So strength 0 is W
itself, and strengths are linear. In a stack every delta is computed from the original W, and all are summed. A weight
that `reshape` enlarges is padded first (`padded`): W' = padded(W, shape) + delta.

Settings (what is not a tensor) are keywords, the same for all families; each uses those that concern it:

    lora_alpha: float     instead of the part (PEFT's adapter_config.json)
    use_rslora: bool      scale by lora_alpha / sqrt(r) instead of lora_alpha / r
    rank: int             lora: use the first ranks only (DyLoRA). lokr: rank of PEFT's configuration, which scales full
                          factors too
    strength: float       scales inside: the additive part before DoRA's norm, as PEFT does, and the result of all other
                          families. For PEFT's DoRA semantics alone; the caller must then not scale again
    neumann_terms: int    oft: length of the Cayley-Neumann series, 0 for the exact Cayley transform; 5
    constraint_per_channel: bool   oft, boft: the constraint is multiplied by o (LyCORIS, kohya; not ComfyUI)
    on_input: bool        ia3: `multiplier` is for the inputs; where this is not given, the shape tells
    rotates_input: bool   oft: convolutions are rotated as in PEFT, not as in OneTrainer
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING, Any

from sdops.adapters._parts import Facts, Parts, Settings, Shape, Shapes, padded
from sdops.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor

FAMILIES = ("lora", "lora_embedding", "loha", "lokr", "glora", "ia3", "oft", "boft", "full", "tlora")

__all__ = ["FAMILIES", "Facts", "Family", "Parts", "Settings", "Shape", "Shapes", "family", "padded"]


@dataclass(frozen=True, slots=True)
class Family:
    """One file of the shelf, as the shelf's docstring describes it."""

    name: str
    required: tuple[str, ...]
    optional: tuple[str, ...]
    needs_weight_for: tuple[str, ...]
    check: Callable[[Shapes, Shape | None], Facts]
    delta: Callable[..., Tensor]
    factors: Callable[..., tuple[Tensor, Tensor] | None]
    bias_delta: Callable[..., Tensor | None]
    fit: Callable[..., tuple[Tensor, Tensor, float] | None]

    def needs_weight(self, parts: Collection[str]) -> bool:
        """Whether the delta of a patch with these parts depends on the base weight."""
        return any(part in parts for part in self.needs_weight_for)


@cache
def family(name: str) -> Family:
    """Load a family by name, without torch.

    Raises:
        UsageError: there is none of that name.
    """
    if name not in FAMILIES:
        raise UsageError(f"there is no adapter family `{name}`", hint=f"there are {', '.join(FAMILIES)}", family=name)
    module = import_module(f"sdops.adapters.{name}")

    def nothing(*_: Any, **__: Any) -> None:
        return None

    return Family(
        name,
        module.REQUIRED,
        module.OPTIONAL,
        module.NEEDS_WEIGHT,
        module.check,
        module.delta,
        getattr(module, "factors", nothing),
        getattr(module, "bias_delta", nothing),
        getattr(module, "fit", nothing),
    )
