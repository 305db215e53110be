"""DreamBooth (Ruiz et al. 2022, arXiv:2208.12242): the whole UNet, with pictures of the class that keep it what it is.

    loss = mean of the pictures + `prior_weight` * mean of as many pictures of the class (`class_images`)

Every picture of both has the weight of its own noise step. What is saved is the difference to the model, which
`sdops apply` adds to it. Trained as a LoRA: `sdops train lora` with `class_images`.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from sdops.trainers._cards import is_of_text
from sdops.trainers._weights import Weights
from sdops.training import method
from sdops.training.config import Config
from sdops.training.model import Model
from sdops.training.parameters import Parameter
from sdops.training.product import Product


class Method(method.Method):
    """All weights of the UNet, and of the text encoders if wished."""

    rate = 2e-6
    decay = 0.01

    def __init__(self, model: Model, config: Config) -> None:
        super().__init__(model, config)
        self.encodes = self.trains_text = config.text_encoder
        self._weights = Weights(model, self._wants)

    def parameters(self) -> list[Parameter]:
        """The weights."""
        of_text = self.config.text_lr or self.lr
        return self._weights.parameters(lambda part: self.lr if part == "unet" else of_text, self.weight_decay)

    def use(self, parts: Mapping[str, Tensor]) -> None:
        """Let the modules compute with them."""
        self._weights.use(parts)

    def product(self, values: Mapping[str, Tensor]) -> Product:
        """The differences."""
        return Product(self._weights.layers(values))

    def _wants(self, component: str, name: str) -> bool:
        if component == "unet":
            return True
        return self.config.text_encoder and is_of_text(name)
