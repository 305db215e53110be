"""LoRA (Hu et al. 2021, arXiv:2106.09685) and its relatives on UNet and text encoders, with the denoising loss."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from sdops.trainers._kinds import TEXT, ranks_of
from sdops.trainers._layers import changes, in_order
from sdops.training import method
from sdops.training.blocks import rates_by_block
from sdops.training.changes import Change
from sdops.training.config import Config
from sdops.training.kernels import lora_linear
from sdops.training.model import Model
from sdops.training.parameters import Parameter
from sdops.training.product import Layer, Product


class Method(method.Method):
    """Adapters on layers."""

    rate = 1e-4
    decay = 0.01

    def __init__(self, model: Model, config: Config) -> None:
        super().__init__(model, config)
        self.trains_text = self.encodes = TEXT in ranks_of(config)
        self._block_rate = rates_by_block(model, config.block_lr)
        self._changes = in_order(changes(model, config), self._rate)
        kernel = lora_linear(model.device)
        for change in self._changes:
            change.install(kernel)
        model.cross_attention.learn(self._changes)

    def parameters(self) -> list[Parameter]:
        """The parts of all layers."""
        return [
            Parameter(f"{change.key}.{part}", value, self._rate(change), self.weight_decay)
            for change in self._changes
            for part, value in change.initial(self.config.seed).items()
        ]

    def use(self, parts: Mapping[str, Tensor]) -> None:
        """Hand every layer its parts."""
        by_layer = _by_layer(parts)
        for change in self._changes:
            change.parts = by_layer[change.key]

    def product(self, values: Mapping[str, Tensor]) -> Product:
        """The layers."""
        by_layer = _by_layer(values)
        return Product([_layer(change, by_layer[change.key]) for change in self._changes])

    def _rate(self, change: Change) -> float:
        rate = self.lr if change.component == "unet" else self.config.text_lr or self.lr
        return rate * self._block_rate(change.component, change.name)


def _by_layer(parts: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    found: dict[str, dict[str, Tensor]] = {}
    for name, value in parts.items():
        layer, _, part = name.rpartition(".")
        found.setdefault(layer, {})[part] = value
    return found


def _layer(change: Change, parts: Mapping[str, Tensor]) -> Layer:
    """A layer as it is saved. No file says of a LoHa or LoKr that it is scaled by the root: its alpha says it."""
    form = change.form
    if form.family == "lora" or not form.use_rslora:
        settings = {"lora_alpha": form.lora_alpha, "use_rslora": form.use_rslora}
    else:
        settings = {"lora_alpha": form.scale * form.rank, "use_rslora": False}
    return Layer(change.component, change.name, form.family, parts, settings)
