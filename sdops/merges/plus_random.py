"""Add random noise to a model."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from sdops.core.noise import Noise

EXECUTION = "elementwise"


def plus_random(a: Tensor, *, noise: Noise, alpha: float = 0.01) -> Tensor:
    """a + alpha z,   z ~ N(0, 1) independently for each weight.

    The same seed gives the same noise for any chunk size, number of workers and device. In supermerger it comes from
    an unseeded global generator, and tensors with `to_out`, `proj_out` or `norm` in their names are left out; exclude
    those by pattern to get the same.

    Source: hako-mikan/sd-webui-supermerger, "plus random".

    Args:
        alpha: Standard deviation of the noise.
    """
    return a + alpha * noise.normal(0, like=a)
