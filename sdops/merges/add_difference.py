"""Add to a model what another one learnt since a third."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

EXECUTION = "linear"


def add_difference(a: Tensor, b: Tensor, c: Tensor, *, alpha: float = 1.0) -> Tensor:
    """a + alpha (b - c).

    c is the model that b was trained from. With a = an inpainting model and c = its base, b becomes an inpainting
    model. The diffusers community pipeline multiplies by 1 - alpha instead.

    Source: AUTOMATIC1111/stable-diffusion-webui, "Add difference".

    Args:
        alpha: How much of the difference to add.
    """
    return a + alpha * (b - c)
