"""Merge fine-tunes by their leading singular directions, made orthogonal to each other."""

from __future__ import annotations

import torch
from torch import Tensor

from sdops.merges._deltas import deltas, onto

EXECUTION = "tensor"


def tsv_m(base: Tensor, *models: Tensor, alpha: float = 1.0) -> Tensor:
    """base + alpha P(U) S P(V)^T,   U = [U_1 .. U_T], S = diag(S_1 .. S_T), V = [V_1 .. V_T].

    U_i, S_i, V_i: the first rank / T (at least 1) singular triplets of D_i = x_i - base; P(X) = the matrix with
    orthonormal columns nearest to X (the orthogonal Procrustes problem). Convolutions are matrices (out, in kh kw);
    vectors and single numbers take the mean of the D_i instead. One model alone gives base + alpha D_1.

    Source: Gargiulo et al., Task Singular Vectors: Reducing Task Interference in Model Merging, 2024, TSV-Merge.

    Args:
        alpha: Factor of the merged change.
    """
    changes = deltas(base, models)  # T x (m, n), or T x (n,)
    if base.ndim < 2 or base.numel() == 0:
        return onto(base, torch.stack(changes).mean(0), alpha)
    kept = max(1, min(changes[0].shape) // len(models))
    triplets = [torch.linalg.svd(change, full_matrices=False) for change in changes]
    left = _orthonormal(torch.cat([u[:, :kept] for u, _, _ in triplets], dim=1))  # (m, T k)
    sizes = torch.cat([s[:kept] for _, s, _ in triplets])  # (T k)
    right = _orthonormal(torch.cat([vh[:kept].T for _, _, vh in triplets], dim=1))  # (n, T k)
    return onto(base, (left * sizes) @ right.T, alpha)


def _orthonormal(x: Tensor) -> Tensor:
    """The nearest matrix with orthonormal columns (rows, if there are more columns): P Q^T of x = P S Q^T."""
    p, _, qh = torch.linalg.svd(x, full_matrices=False)
    nearest: Tensor = p @ qh
    return nearest
