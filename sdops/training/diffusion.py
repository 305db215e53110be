"""Noise, targets and weights of the loss, as the papers write them. abar is the product of 1 - beta up to a step."""

from __future__ import annotations

import torch
from torch import Tensor

STEPS = 1000


def abar_of(start: float = 0.00085, end: float = 0.012, schedule: str = "scaled_linear", steps: int = STEPS) -> Tensor:
    """abar of every step, float64 [steps]. Stable Diffusion: beta is linear in its root (`scaled_linear`)."""
    power = {"scaled_linear": 0.5, "linear": 1.0}[schedule]
    betas = torch.linspace(start**power, end**power, steps, dtype=torch.float64) ** (1 / power)
    return torch.cumprod(1 - betas, 0)


def with_zero_terminal_snr(abar: Tensor) -> Tensor:
    """Shift and scale sqrt(abar): the last becomes 0, the first stays (Lin et al. 2023, arXiv:2305.08891)."""
    root = abar.sqrt()
    return ((root - root[-1]) * (root[0] / (root[0] - root[-1]))).square()


def noised(latents: Tensor, noise: Tensor, abar: Tensor) -> Tensor:
    """sqrt(abar) z + sqrt(1 - abar) n; abar [B], the others [B, 4, h, w]."""
    abar = abar.view(-1, 1, 1, 1)
    return abar.sqrt() * latents + (1 - abar).sqrt() * noise


def target_of(prediction: str, latents: Tensor, noise: Tensor, abar: Tensor) -> Tensor:
    """What the model should say: n (`epsilon`), or v = sqrt(abar) n - sqrt(1 - abar) z (Salimans and Ho 2022)."""
    if prediction == "epsilon":
        return noise
    abar = abar.view(-1, 1, 1, 1)
    return abar.sqrt() * noise - (1 - abar).sqrt() * latents


def weights_of(abar: Tensor, prediction: str, *, min_snr: float = 0.0, debiased: bool = False) -> Tensor:
    """The weight of every step's loss, [steps].

    min-SNR (Hang et al. 2023, arXiv:2303.09556): min(snr, g) / snr for epsilon, min(snr, g) / (snr + 1) for v; where
    snr is 0 epsilon says nothing about the picture, and the weight is that of an SNR of nearly 0: 1.
    debiased (Yu et al. 2023, arXiv:2310.08442): 1 / sqrt(min(snr, 1000)), here with snr of at least 1e-3; for v, whose
    error is sqrt(snr + 1) times that of the picture, 1 / (min(snr, 1000) + 1), as kohya-ss/sd-scripts has it.
    """
    snr = abar / (1 - abar)
    weights = torch.ones_like(snr)
    if min_snr:
        least = snr.clamp(max=min_snr)
        weights = least / (snr + 1) if prediction == "v" else torch.where(snr > 0, least / snr.clamp(min=1e-12), 1.0)
    if debiased:
        weights = weights / ((snr.clamp(max=1000) + 1) if prediction == "v" else snr.clamp(1e-3, 1000).sqrt())
    return weights


def loss_of(predicted: Tensor, target: Tensor, weights: Tensor, mask: Tensor | None = None) -> Tensor:
    """Weighted mean of squares per sample, [B].

    Args:
        predicted: [B, 4, h, w].
        target: Of the same shape.
        weights: [B].
        mask: [B, 1, h, w] or None; the mean is then taken over what it lets through.
    """
    squares = (predicted.float() - target.float()).square()
    if mask is None:
        return squares.mean(dim=(1, 2, 3)) * weights
    channels = squares.shape[1]
    inside = (squares * mask).sum(dim=(1, 2, 3)) / (mask.sum(dim=(1, 2, 3)) * channels).clamp(min=1e-6)
    return inside * weights
