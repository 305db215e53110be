"""LoRA on a table of embeddings, as PEFT writes it: [v, d], a row for every token or position.

delta = s (b a)^T = s a^T b^T,   s = alpha / r, alpha / sqrt(r) under rsLoRA, 1 without an alpha

a    [r, v], `lora_embedding_A`
b    [d, r], `lora_embedding_B`
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sdops.adapters._parts import (
    Facts,
    Parts,
    Settings,
    Shape,
    Shapes,
    check_names,
    check_shape,
    check_weight,
    refused,
    scale_of,
    working,
)

if TYPE_CHECKING:
    from torch import Tensor

REQUIRED = ("a", "b")
OPTIONAL = ("lora_alpha",)
NEEDS_WEIGHT = ()


def check(shapes: Shapes, shape: Shape | None) -> Facts:
    """Check the parts' shapes against each other and the table's.

    Raises:
        FormatError: the parts do not fit each other.
        MismatchError: they do not fit the table.
    """
    check_names(shapes, REQUIRED, OPTIONAL)
    a, b = shapes["a"], shapes["b"]
    for part in REQUIRED:
        if len(shapes[part]) != 2:
            raise refused(part, shapes[part], "it should have two dimensions")
    check_shape("b", b, (b[0], a[0]))
    wrong = "a" if shape is not None and shape[0] != a[1] else "b"
    return check_weight(Facts(a[0], a[1], b[0]), shape, wrong, shapes[wrong])


def delta(parts: Parts, shape: Shape, _weight: Tensor | None = None, **settings: Any) -> Tensor:
    """The change in the table's shape."""
    up, down = factors(parts, shape, None, **settings)
    return (up @ down).reshape(shape)


def factors(parts: Parts, _shape: Shape, _weight: Tensor | None = None, **settings: Any) -> tuple[Tensor, Tensor]:
    """Up [v, r] with the scale, down [r, d]."""
    floats, chosen = working(parts)[0], Settings(**settings)
    scale = chosen.strength * scale_of(parts, len(parts["a"]), chosen)
    return floats["a"].T * scale, floats["b"].T
