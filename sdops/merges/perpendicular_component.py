"""What of one model is not along another."""

from __future__ import annotations

import torch
from torch import Tensor

EXECUTION = "gram"
INPUTS = "a, b"


def perpendicular_component(gram: Tensor) -> Tensor:
    """a - b <a, b> / <b, b>,   whole tensors as vectors; a if b is zero.

    Source: ljleb/sd-mecha, `perpendicular_component`.
    """
    (_, ab), (_, bb) = gram.tolist()
    return torch.tensor([1.0, -ab / bb if bb else 0.0], dtype=torch.float64)
