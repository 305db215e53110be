"""Pictures on the way: DDIM with classifier-free guidance (Song et al. 2021, arXiv:2010.02502), one file's worth."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from sdops.core.noise import Noise
from sdops.training.model import Model
from sdops.training.tokens import Tokens

GUIDANCE = 7.5
_CHUNKS = 3  # of 75 tokens that a prompt may have


def clean_of(prediction: str, predicted: Tensor, noisy: Tensor, abar: Tensor) -> tuple[Tensor, Tensor]:
    """Latents and noise that a prediction means, at a step with abar."""
    root, rest = abar.sqrt(), (1 - abar).sqrt()
    if prediction == "v":
        return root * noisy - rest * predicted, root * predicted + rest * noisy
    return (noisy - rest * predicted) / root.clamp(min=1e-6), predicted


def timesteps(steps: int, train: int = 1000) -> list[int]:
    """The noise steps to visit, the noisiest first, evenly, the last step of the schedule among them."""
    return [round((index + 1) * train / steps) - 1 for index in reversed(range(steps))]


@torch.no_grad()
def paint(
    model: Model,
    tokens: Tokens,
    prompt: str,
    *,
    steps: int,
    seed: int,
    size: tuple[int, int],
    guidance: float = GUIDANCE,
    negative: str = "",
) -> Tensor:
    """A picture [3, H, W] from -1 to 1.

    Args:
        model: With whatever was trained in place.
        tokens: Texts to tokens.
        prompt: What to paint.
        steps: Of DDIM.
        seed: Of the first noise.
        size: Width and height in pixels, multiples of the latents' cell.
        guidance: Of the prompt against `negative`.
        negative: What not to paint.
    """
    context, pooled = model.text(_ids(model, tokens, [negative, prompt]))
    width, height = size
    shape = torch.empty(1, model.vae.config.latent_channels, height // model.cell, width // model.cell)
    x = Noise(seed, f"sample of {prompt}").normal(0, shape).to(model.device)
    sizes = torch.tensor([[height, width, 0, 0, height, width]] * 2, device=model.device, dtype=model.dtype)
    abars = model.abar.float().to(model.device)
    visited = timesteps(steps)
    for index, step in enumerate(visited):
        both = model.predict(
            torch.cat([x, x]),
            torch.tensor([step, step], device=model.device),
            context,
            pooled,
            sizes if model.family == "sdxl" else None,
        ).float()
        predicted = both[:1] + guidance * (both[1:] - both[:1])
        clean, noise = clean_of(model.prediction, predicted, x, abars[step])
        following = abars[visited[index + 1]] if index + 1 < len(visited) else torch.ones_like(abars[0])
        x = following.sqrt() * clean + (1 - following).sqrt() * noise
    return model.decode(x)[0]


def _ids(model: Model, tokens: Tokens, texts: list[str]) -> Mapping[str, Tensor]:
    return {
        encoder.name: torch.tensor(tokens.rows(texts, encoder.pad, _CHUNKS), device=model.device)
        for encoder in model.encoders
    }
