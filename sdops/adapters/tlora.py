"""T-LoRA (LyCORIS 4): known by name, and refused.

    delta = P diag(l) Q - P0 diag(l0) Q0

P0, l0 and Q0 are singular vectors and values of the very weights that the file was trained on, which it does not hold,
and how they were chosen is not written either. So the file does not tell its own change.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NoReturn

from sdops.adapters._parts import Parts, Shape, Shapes
from sdops.errors import FormatError

if TYPE_CHECKING:
    from torch import Tensor

REQUIRED = ("q_layer", "p_layer", "lambda_layer")
OPTIONAL = ("lora_alpha",)
NEEDS_WEIGHT = REQUIRED


def check(_shapes: Shapes, shape: Shape | None) -> NoReturn:
    """Refuse.

    Raises:
        FormatError: always.
    """
    raise _refusal(shape)


def delta(_parts: Parts, shape: Shape, _weight: Tensor | None = None, **_settings: Any) -> NoReturn:
    """Refuse.

    Raises:
        FormatError: always.
    """
    raise _refusal(shape)


def _refusal(shape: Shape | None) -> FormatError:
    return FormatError(
        "part `lambda_layer` is T-LoRA's, whose change depends on a decomposition that its file does not hold",
        hint="merge it into its base with LyCORIS, then make a LoRA of the result with `sdops extract`",
        part="lambda_layer",
        shape=shape,
    )
