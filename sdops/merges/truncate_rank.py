"""Keep only the strongest directions of what a model learnt."""

from __future__ import annotations

import torch
from torch import Tensor

from sdops.errors import UsageError

EXECUTION = "tensor"


def truncate_rank(base: Tensor, a: Tensor, *, rank: int = 64) -> Tensor:
    """base + D_r,   D = a - base,   D_r = the matrix of rank r nearest to D (its r largest singular values).

    Convolutions are matrices (out, in kh kw). Vectors and single numbers have no rank: they keep all of D.
    D_r = D V V^T (or U U^T D) with the r leading eigenvectors of D^T D (or D D^T, if smaller) in float64: the same as
    by a singular value decomposition (Eckart and Young, 1936) in a fraction of the time.

    Source: ljleb/sd-mecha, `truncate_rank` (which approximates by a random basis); as kohya's LoRA extraction.

    Args:
        rank (0 or more): Number of singular values kept; 0 is the base.

    Raises:
        UsageError: the rank is negative.
    """
    if rank < 0:
        raise UsageError(f"`rank` is {rank}", hint="choose `rank` 0 or more", knob="rank", value=rank)
    if a.ndim < 2 or a.numel() == 0 or rank >= min(a.shape[0], a[0].numel()):
        return a
    difference = (a.double() - base.double()).flatten(1)  # (m, n)
    rows, columns = difference.shape
    if rows < columns:
        leading = _leading(difference @ difference.T, rank)  # (m, r)
        truncated = leading @ (leading.T @ difference)
    else:
        leading = _leading(difference.T @ difference, rank)  # (n, r)
        truncated = (difference @ leading) @ leading.T
    return (base.double() + truncated.reshape(a.shape)).to(a.dtype)


def _leading(square: Tensor, rank: int) -> Tensor:
    """Eigenvectors (n, r) of the r largest eigenvalues of a symmetric matrix."""
    vectors: Tensor = torch.linalg.eigh(square).eigenvectors  # ascending
    return vectors[:, len(square) - rank :]
