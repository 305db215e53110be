"""The centre of any number of models on the sphere."""

from __future__ import annotations

import torch
from torch import Tensor

from sdops.merges._geometry import normalized

EXECUTION = "gram"
INPUTS = "*models"

MAX_STEPS = 100
TOLERANCE = 1e-12  # of the last step, in radians


def karcher(gram: Tensor, *, weights: tuple[float, ...] = ()) -> Tensor:
    """u sum_i w_i |x_i|,   u = the direction that minimises sum_i w_i angle(u, x_i)^2,   sum_i w_i = 1.

    Steps from the mean direction: T = sum_i w_i t_i / sin t_i (u_i - cos t_i u) with t_i the angle from u to
    u_i = x_i / |x_i|, then u <- u cos|T| + T / |T| sin|T|, until |T| < 1e-12. Zero tensors have no direction and only
    shorten the mean length. mergekit has equal weights alone and stops after 10 steps or at 1e-5.

    Source: Karcher, Riemannian Center of Mass, 1977; arcee-ai/mergekit, `karcher`, https://arxiv.org/abs/2603.04972

    Args:
        weights: One number per model; none means all equal.

    Raises:
        UsageError: the number of weights is wrong, or they sum to zero.
    """
    shares = normalized(weights, len(gram)).to(gram.device)
    norms = gram.diagonal().sqrt()
    inverse = (norms > 0) / norms.clamp(min=1e-300)
    unit_gram = inverse[:, None] * gram * inverse
    pull = shares * (norms > 0)
    pull = pull / pull.sum() if pull.sum() != 0 else shares
    centre = _start(unit_gram, pull)
    for _ in range(MAX_STEPS):
        step = _tangent(unit_gram, pull, centre)
        length = (step @ unit_gram @ step).clamp(min=0).sqrt()
        if length < TOLERANCE:
            break
        centre = centre * torch.cos(length) + step / length * torch.sin(length)
        centre = centre / (centre @ unit_gram @ centre).sqrt()
    return centre * inverse * (shares @ norms)


def _start(unit_gram: Tensor, pull: Tensor) -> Tensor:
    """The mean direction, or the first one that exists if they cancel out."""
    length = (pull @ unit_gram @ pull).clamp(min=0).sqrt()
    if length > 1e-6:
        return pull / length
    return torch.zeros_like(pull).index_fill_(0, unit_gram.diagonal().argmax(), 1.0)


def _tangent(unit_gram: Tensor, pull: Tensor, centre: Tensor) -> Tensor:
    """Coefficients of T, the weighted sum of the directions from `centre` to every model, as long as the angles."""
    cosine = (unit_gram @ centre).clamp(-1, 1)
    sine = ((1 - cosine) * (1 + cosine)).sqrt()
    # t / sin t -> 1 for t -> 0; there is no direction towards the opposite point.
    stretch = torch.where(sine > 1e-9, torch.atan2(sine, cosine) / sine.clamp(min=1e-9), (cosine > 0).double())
    scaled = pull * stretch
    return scaled - (scaled @ cosine) * centre
