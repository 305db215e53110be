"""Multiply a model by a number."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

EXECUTION = "linear"


def scale(a: Tensor, *, alpha: float = 1.0) -> Tensor:
    """out = alpha a.

    Useful with alpha per block; "self" in supermerger, which leaves out tensors with `to_out`, `proj_out` or `norm`
    in their names. Here every tensor is scaled; exclude those by pattern to get the same.

    Source: hako-mikan/sd-webui-supermerger, "self"; ljleb/sd-mecha, `scale`.

    Args:
        alpha: Factor.
    """
    return alpha * a
