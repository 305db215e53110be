"""Cosines between the rows, the columns or the whole of two tensors, summed in float64."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
import torch
from torch import Tensor

Read = Callable[[str], list[Tensor]]

# supermerger's calculation leaves the autoencoder as it is.
AUTOENCODER = "first_stage_model."


def cosine(x: Tensor, y: Tensor, dim: int | tuple[int, ...]) -> Tensor:
    """<x, y> / (|x| |y|) over `dim` (kept, size 1) in float64, 0 where x or y is 0."""
    x, y = x.double(), y.double()
    dot = (x * y).sum(dim, keepdim=True)
    norms = ((x * x).sum(dim, keepdim=True) * (y * y).sum(dim, keepdim=True)).sqrt()
    return torch.where(norms > 0, dot / norms, 0.0).clamp(-1, 1)


def closeness(x: Tensor, y: Tensor, gamma: float) -> Tensor:
    """((cos + 1) / 2)^gamma over the last dimension (kept, size 1), in x's dtype."""
    return (((cosine(x, y, -1) + 1) / 2) ** gamma).to(x.dtype)


def combined(a: Tensor, b: Tensor, *, normalize: bool) -> Tensor:
    """Mean of the cosine per column (over dim 0, kept) and the cosine of the whole tensors, float64.

    With `normalize` the columns are scaled to length 1 before the whole tensors are compared.
    """
    a, b = a.double(), b.double()
    if normalize:
        a, b = torch.nn.functional.normalize(a, dim=0), torch.nn.functional.normalize(b, dim=0)
    return (cosine(a, b, 0) + cosine(a.flatten(), b.flatten(), 0).squeeze()) / 2


def similarity_range(keys: Iterable[str], read: Read, *, normalize: bool) -> tuple[float, float]:
    """Smallest and largest combined similarity in the model without the lowest and highest 1 %.

    As in supermerger the 99th percentile is that of what is left after the cut at the 1st.
    """
    parts = []
    for key in keys:
        if not key.startswith(AUTOENCODER):
            a, b = read(key)
            if a.numel():
                parts.append(combined(a, b, normalize=normalize).flatten().numpy(force=True))
    found = np.concatenate([np.empty(0), *parts])
    if not found.size:
        return 0.0, 0.0
    found = found[found >= np.percentile(found, 1, method="midpoint")]
    found = found[found <= np.percentile(found, 99, method="midpoint")]
    return float(found.min()), float(found.max())


def blend(a: Tensor, b: Tensor, span: tuple[float, float], *, alpha: float, normalize: bool) -> Tensor:
    """b + k (a - b),   k = clip((similarity - low) / (high - low) - alpha, 0, 1) per column.

    Where all of the model is equally similar (low = high) everything counts as similar: k = 1 - alpha.
    """
    low, high = span
    similarity = combined(a, b, normalize=normalize)
    relative = (similarity - low) / (high - low) if high > low else torch.ones_like(similarity)
    return torch.lerp(b, a, (relative - alpha).clamp(0, 1).to(a.dtype))
