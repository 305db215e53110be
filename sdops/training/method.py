"""What training methods have in common: the denoising loss."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from sdops.training.config import Config
from sdops.training.diffusion import loss_of, noised, target_of
from sdops.training.feeder import Batch, Feeder
from sdops.training.model import Model
from sdops.training.parameters import Parameter
from sdops.training.product import Product


@dataclass(frozen=True, slots=True)
class Beginning:
    """What there is before the first step.

    Attributes:
        feeder: Latents and captions.
        pictures: Files.
        views: What learns, as it begins or goes on.
        done: Steps that were done before.
    """

    feeder: Feeder
    pictures: Sequence[Path]
    views: Mapping[str, Tensor]
    done: int


class Method(ABC):
    """A training method; the shelf's docstring says what each member is for."""

    rate: float
    decay = 0.0
    encodes = False
    trains_text = False
    decodes = False
    repeats = True
    measured = "loss with fixed noise"

    def __init__(self, model: Model, config: Config) -> None:
        self.model, self.config = model, config
        self.words: dict[str, int] = {}

    @abstractmethod
    def parameters(self) -> list[Parameter]:
        """What learns."""

    @abstractmethod
    def use(self, parts: Mapping[str, Tensor]) -> None:
        """Put this step's tensors in their places."""

    @abstractmethod
    def product(self, values: Mapping[str, Tensor]) -> Product:
        """What is saved."""

    @property
    def lr(self) -> float:
        """The learning rate that is wished, or the usual one."""
        return self.config.lr or self.rate

    @property
    def weight_decay(self) -> float:
        """That of AdamW that is wished, or the usual one."""
        return self.decay if self.config.weight_decay < 0 else self.config.weight_decay

    def after_step(self, views: Mapping[str, Tensor]) -> None:
        """Nothing to do."""
        del views

    def begin(self, beginning: Beginning) -> None:
        """Nothing to look at."""
        del beginning

    def measure(self, views: Mapping[str, Tensor]) -> float | None:
        """None: the loss with fixed noise is measured."""
        del views
        return None

    def findings(self, views: Mapping[str, Tensor]) -> dict[str, float]:
        """Nothing but the losses."""
        del views
        return {}

    def loss(self, batch: Batch) -> Tensor:
        """Weighted mean of squares of the prediction's error, per sample [B]."""
        noisy = noised(batch.latents, batch.noise, batch.abar)
        target = target_of(self.model.prediction, batch.latents, batch.noise, batch.abar)
        return loss_of(self.predict(noisy, batch), target, batch.weights, batch.mask)

    def predict(self, noisy: Tensor, batch: Batch) -> Tensor:
        """What the model says about noisy latents with the batch's texts."""
        context, pooled = self.text(batch)
        return self.model.predict(noisy, batch.steps, context, pooled, batch.sizes)

    def text(self, batch: Batch) -> tuple[Tensor, Tensor | None]:
        """The texts as the UNet reads them: from the cache, or encoded here."""
        if batch.context is not None:
            return batch.context, batch.pooled
        return self.model.text(batch.ids)
