"""Merge fine-tunes and give every direction of the common change the same strength."""

from __future__ import annotations

import torch
from torch import Tensor

from sdops.merges._deltas import deltas, onto

EXECUTION = "tensor"


def iso_c(base: Tensor, *models: Tensor, alpha: float = 1.0) -> Tensor:
    """base + alpha s U V^T,   sum_i (x_i - base) = U S V^T,   s = mean of the singular values S.

    Convolutions are matrices (out, in kh kw); vectors and single numbers take the mean of the x_i - base instead.
    Directions in which nothing changed (singular values that float32 cannot tell from 0) stay unchanged and do not
    count in the mean: their U and V would be arbitrary.

    Source: Marczak et al., No Task Left Behind: Isotropic Model Merging with Common and Task-Specific Subspaces, 2025,
    Iso-C.

    Args:
        alpha: Factor of the merged change.
    """
    changes = torch.stack(deltas(base, models))  # (T, m, n) or (T, n)
    if base.ndim < 2 or base.numel() == 0:
        return onto(base, changes.mean(0), alpha)
    u, sizes, vh = torch.linalg.svd(changes.sum(0), full_matrices=False)
    present = sizes > max(u.shape[0], vh.shape[1]) * torch.finfo(torch.float32).eps * sizes[0]
    mean = sizes[present].mean() if present.any() else 0.0
    return onto(base, mean * (u[:, present] @ vh[present]), alpha)
