"""UNet, VAE and text encoders in one hand, and the few things that a trainer asks of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sdops.training.cross_attention import CrossAttention
from sdops.training.tokens import LENGTH
from sdops.training.words import Words


@dataclass(eq=False)
class Encoder:
    """A text encoder.

    Attributes:
        name: As in archs: `clip_l`, `clip_h`, `clip_g`.
        module: transformers' CLIPTextModel or CLIPTextModelWithProjection.
        words: Its vocabulary, in which new words get vectors of their own.
        pad: Token that fills up short texts.
        penultimate: Whether the last but one layer is used, without the final norm (SDXL).
        skip: So many more layers are left out.
    """

    name: str
    module: Any
    words: Words
    pad: int
    penultimate: bool = False
    skip: int = 0

    def __call__(self, ids: Tensor) -> tuple[Tensor, Tensor | None]:
        """Tokens [B, 77] -> what the UNet reads [B, 77, width], and the projected text of a model that has it."""
        back = self.skip + self.penultimate
        out = self.module(ids, output_hidden_states=back > 0)
        if not back:
            return out.last_hidden_state, None
        hidden = out.hidden_states[-1 - back]
        if not self.penultimate:
            hidden = self._norm(hidden)
        return hidden, getattr(out, "text_embeds", None)

    @property
    def _norm(self) -> nn.Module:
        """The final norm, which SD1 and SD2 also have behind an earlier layer."""
        found: nn.Module = next(x for name, x in self.module.named_modules() if name.endswith("final_layer_norm"))
        return found


@dataclass(eq=False)
class Model:
    """A diffusion model to be trained on.

    Attributes:
        name: As the user called it.
        family: `sd1`, `sd2` or `sdxl`.
        unet, vae: diffusers' UNet2DConditionModel and AutoencoderKL.
        encoders: In the order in which their outputs are joined.
        prediction: `epsilon` or `v`.
        abar: Of every step, float64 [1000].
        resolution: Pixels of a side that it was made for.
        device: Where everything is.
        dtype: That UNet and text encoders compute in; the VAE is float32.
        formula: A formula of words -> encoder -> rows [n, width], as `sdops embed make` reads it.
        cross_attention: The UNet's layers that read the text, all at once.
    """

    name: str
    family: str
    unet: Any
    vae: Any
    encoders: Sequence[Encoder]
    prediction: str
    abar: Tensor
    resolution: int
    device: torch.device
    dtype: torch.dtype
    formula: Callable[[str], Mapping[str, Tensor]]

    def __post_init__(self) -> None:
        self.cross_attention = CrossAttention(self.unet)

    @property
    def scale(self) -> float:
        """What latents are multiplied by."""
        return float(self.vae.config.scaling_factor)

    @property
    def cell(self) -> int:
        """Pixels of a latent's side."""
        return int(2 ** (len(self.vae.config.block_out_channels) - 1))

    def text(self, ids: Mapping[str, Tensor]) -> tuple[Tensor, Tensor | None]:
        """Tokens per encoder [B, 77 c] -> context [B, 77 c, width], pooled [B, width] of models that have it.

        Each of c chunks is read on its own and the outputs are joined; pooled is the first one's (A1111, ComfyUI).
        """
        outputs = [encoder(ids[encoder.name].view(-1, LENGTH)) for encoder in self.encoders]
        chunks = next(iter(ids.values())).shape[1] // LENGTH
        context = torch.cat([hidden for hidden, _ in outputs], dim=-1)
        pooled = [found[::chunks] for _, found in outputs if found is not None]
        return context.reshape(-1, chunks * LENGTH, context.shape[-1]), pooled[-1] if pooled else None

    def predict(
        self, latents: Tensor, steps: Tensor, context: Tensor, pooled: Tensor | None, sizes: Tensor | None
    ) -> Tensor:
        """What the UNet says, in the latents' shape.

        Args:
            latents: [B, 4, h, w].
            steps: [B], integers.
            context: [B, 77 c, width].
            pooled: [B, width], SDXL.
            sizes: [B, 6], SDXL: original height and width, top and left of the crop, height and width.
        """
        self.cross_attention.begin(context)
        extra = {} if pooled is None else {"added_cond_kwargs": {"text_embeds": pooled, "time_ids": sizes}}
        out = self.unet(latents.to(self.dtype), steps, encoder_hidden_states=context, return_dict=False, **extra)
        found: Tensor = out[0]
        return found

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Pictures [B, 3, H, W] from -1 to 1 -> mean and deviation of their latents, scaled, float32."""
        found = self.vae.encode(pixels.to(self.device, self.vae.dtype)).latent_dist
        return found.mean.float() * self.scale, found.std.float() * self.scale

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Scaled latents -> pictures [B, 3, H, W] from -1 to 1, on the CPU."""
        found: Tensor = self.vae.decode(latents.to(self.device, self.vae.dtype) / self.scale).sample
        return found.float().clamp(-1, 1).cpu()

    def freeze(self) -> None:
        """Let nothing learn, and drop no activations."""
        for module in (self.unet, self.vae, *(encoder.module for encoder in self.encoders)):
            module.requires_grad_(False)
            module.eval()

    def save_memory(self, *, dropout: bool) -> None:
        """Compute activations again in the backward pass.

        Args:
            dropout: Whether layers drop inputs, so that the state of the random numbers has to be kept for the second
                time; a CUDA graph cannot look it up.
        """
        how: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": dropout}
        self.unet.enable_gradient_checkpointing(partial(checkpoint, **how))
        self.unet.train()
        for encoder in self.encoders:
            module = encoder.module
            name = "activation_checkpointing_enable"  # as it is called since transformers 5
            getattr(module, name, module.gradient_checkpointing_enable)(how)
            module.train()
