"""Null-text inversion (Mokady et al. 2022, arXiv:2211.09794): a picture comes back from its own noise, guided.

    x_T         DDIM run backwards from the picture with its prompt, without guidance; every x_t on the way is kept
    null_t      the empty prompt's text, learnt for each step t of DDIM: |step(y_t, t, null_t) - x_(t-1)|^2, w = 7.5
    y_(t-1)     what step(y_t, t, null_t) then gives, from y_T = x_T

`inner_steps` steps of the loop belong to each step of DDIM, whose text begins as the one before ended; one that is good
enough stands still. The noise steps are those of the paper's program (google/prompt-to-prompt): 1000 / T apart from 0,
and the last abar is that of step 0.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from sdops.training import method
from sdops.training.config import Config
from sdops.training.diffusion import STEPS
from sdops.training.feeder import Batch
from sdops.training.method import Beginning
from sdops.training.model import Model
from sdops.training.parameters import Parameter
from sdops.training.product import Product, Texts
from sdops.training.sampling import clean_of
from sdops.training.tokens import VOCABULARY, Tokens

_SLACK = 2e-5  # by how much `enough` grows from step to step


class Method(method.Method):
    """A text per step of DDIM."""

    encodes = decodes = True
    rate = 1e-2
    repeats = False
    measured = "error of the reconstruction"
    _settled: tuple[Tensor, Tensor] | None = None  # error and text of a step that is done

    def __init__(self, model: Model, config: Config) -> None:
        super().__init__(model, config)
        self._number = config.steps // config.inner_steps
        gap = STEPS // self._number
        self._visited = [gap * index for index in reversed(range(self._number))]
        abar = model.abar.float().to(model.device)
        self._abar = [abar[max(step, 0)] for step in [*self._visited, -1]]
        self._null, self._pooled_null = _text(model, "")

    def parameters(self) -> list[Parameter]:
        """The texts; each learns in its own steps, at a rate that falls to the half."""
        inner = self.config.inner_steps
        return [
            Parameter(
                f"null{index:03d}",
                self._null[0],
                self.lr * (1 - index / (2 * self._number)),
                since=index * inner,
                until=(index + 1) * inner,
            )
            for index in range(self._number)
        ]

    @torch.no_grad()
    def begin(self, beginning: Beginning) -> None:
        """Run DDIM backwards; a run that goes on comes to where it was."""
        feeder = beginning.feeder
        (sample,) = feeder.latents
        self._prompt = feeder.captions[sample.picture]
        self._context, self._pooled = _text(self.model, self._prompt)
        latent = feeder.latents[sample]
        self._picture = latent.mean.unsqueeze(0).to(self.model.device)
        sizes = torch.tensor([latent.sizes], device=self.model.device, dtype=self.model.dtype)
        self._sizes = sizes if self.model.family == "sdxl" else None
        self._path = [self._picture]
        for index in reversed(range(self._number)):
            x = self._path[0]
            said = self._say(x, index, self._context, self._pooled)
            self._path.insert(0, self._moved(x, said, index + 1, index))
        self._done = beginning.done
        self._at = self._followed(self._texts(beginning.views), self._done // self.config.inner_steps)
        if self._done < self.config.steps:
            self._given = self._guide()

    def use(self, parts: Mapping[str, Tensor]) -> None:
        """Keep them."""
        self._parts = parts

    def loss(self, batch: Batch) -> Tensor:
        """How far a step with its text misses the picture's own way, [1]; 0 once it is near enough."""
        del batch  # there is one picture, and DDIM says which noise step it is
        index = self._done // self.config.inner_steps
        text = self._parts[f"null{index:03d}"]
        if self._settled is None:
            error = (self._step(self._at, index, text, self._given) - self._path[index + 1]).square().mean().view(1)
            if float(error.detach()) >= self.config.enough + index * _SLACK:
                return error
            self._settled = error.detach(), text.detach().float().clone()
        return self._settled[0] + 0 * text.sum()

    def after_step(self, views: Mapping[str, Tensor]) -> None:
        """Behind the last step of a text, take its step of DDIM and hand it on as the beginning of the next."""
        index = self._done // self.config.inner_steps
        text = views[f"null{index:03d}"]
        if self._settled is not None:
            text.copy_(self._settled[1])  # the optimizer moves on where there is no gradient any more
        self._done += 1
        if self._done % self.config.inner_steps:
            return
        self._at = self._step(self._at, index, text, self._given)
        self._settled = None
        if index + 1 < self._number:
            views[f"null{index + 1:03d}"].copy_(text)
            self._given = self._guide()

    @torch.no_grad()
    def measure(self, views: Mapping[str, Tensor]) -> float:
        """Mean of squares of what the texts lead to, less the picture, in latents."""
        return float((self._followed(self._texts(views), self._number) - self._picture).square().mean())

    @torch.no_grad()
    def findings(self, views: Mapping[str, Tensor]) -> dict[str, float]:
        """PSNR (dB) of the painted picture against what the VAE makes of the original: with the texts, and without."""
        wanted = self.model.decode(self._picture)
        plain = [self._null[0]] * self._number
        found = {"psnr": self._texts(views), "psnr_without_texts": plain}
        followed = {name: self._followed(texts, self._number) for name, texts in found.items()}
        return {name: _psnr(self.model.decode(latents), wanted) for name, latents in followed.items()}

    def product(self, values: Mapping[str, Tensor]) -> Product:
        """The texts and what they belong to."""
        facts = {
            "prompt": self._prompt,
            "guidance": f"{self.config.guidance:g}",
            "timesteps": ",".join(map(str, self._visited)),
            "scheduler": "DDIM",
        }
        return Product(texts=Texts(torch.stack(self._texts(values)), self._path[0].cpu(), facts))

    # ---------------------------------------------------------------------------------------------------------- DDIM

    def _texts(self, values: Mapping[str, Tensor]) -> list[Tensor]:
        return [values[f"null{index:03d}"] for index in range(self._number)]

    def _followed(self, texts: list[Tensor], number: int) -> Tensor:
        """Where guided DDIM is after so many steps with these texts."""
        x = self._path[0]
        for index in range(number):
            x = self._step(x, index, texts[index], self._say(x, index, self._context, self._pooled))
        return x

    def _guide(self) -> Tensor:
        """What the model says with the prompt where DDIM is now."""
        with torch.no_grad():
            return self._say(self._at, self._done // self.config.inner_steps, self._context, self._pooled)

    def _step(self, x: Tensor, index: int, text: Tensor, given: Tensor) -> Tensor:
        """A guided step with a null text [77, width]."""
        without = self._say(x, index, text.unsqueeze(0).to(self._context.dtype), self._pooled_null)
        return self._moved(x, without + self.config.guidance * (given - without), index, index + 1)

    def _say(self, x: Tensor, index: int, context: Tensor, pooled: Tensor | None) -> Tensor:
        step = torch.tensor([self._visited[index]], device=x.device)
        return self.model.predict(x, step, context, pooled, self._sizes).float()

    def _moved(self, x: Tensor, said: Tensor, start: int, stop: int) -> Tensor:
        """DDIM from one noise step to another, in either direction."""
        clean, noise = clean_of(self.model.prediction, said, x, self._abar[start])
        return self._abar[stop].sqrt() * clean + (1 - self._abar[stop]).sqrt() * noise


@torch.no_grad()
def _text(model: Model, text: str) -> tuple[Tensor, Tensor | None]:
    """A text as the UNet reads it, [1, 77, width]."""
    tokens = Tokens({}, VOCABULARY)
    return model.text(
        {each.name: torch.tensor(tokens.rows([text], each.pad), device=model.device) for each in model.encoders}
    )


def _psnr(picture: Tensor, wanted: Tensor) -> float:
    """10 log10(2^2 / mean square), pictures from -1 to 1."""
    return float(10 * torch.log10(4 / (picture - wanted).square().mean().clamp(min=1e-12)))
