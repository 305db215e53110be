"""Weights of the model itself that learn, saved as their difference to what they were."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from sdops.training.model import Model
from sdops.training.parameters import Parameter
from sdops.training.product import Layer

_PARTS = {"weight": "diff", "bias": "diff_b"}


class Weights:
    """Some weights of the UNet and maybe of the text encoders.

    Args:
        model: Whose.
        wanted: Component and name of a tensor -> whether it learns.
    """

    def __init__(self, model: Model, wanted: Callable[[str, str], bool]) -> None:
        components: list[tuple[str, Any]] = [("unet", model.unet)]
        components += [(encoder.name, encoder.module) for encoder in model.encoders]
        self._places: dict[str, tuple[Any, str]] = {}
        self._base: dict[str, Tensor] = {}
        for component, module in components:
            for name, weight in module.named_parameters():
                if wanted(component, name):
                    parent, _, leaf = name.rpartition(".")
                    self._places[f"{component}:{name}"] = module.get_submodule(parent), leaf
                    self._base[f"{component}:{name}"] = weight.detach()

    def parameters(self, rate: Callable[[str], float], decay: float) -> list[Parameter]:
        """The weights as they are now; `rate` is asked for each component."""
        return [Parameter(key, base, rate(key.partition(":")[0]), decay) for key, base in self._base.items()]

    def use(self, parts: Mapping[str, Tensor]) -> None:
        """Let the modules compute with this step's tensors."""
        for key, (module, leaf) in self._places.items():
            module._parameters.pop(leaf, None)
            setattr(module, leaf, parts[key])

    def layers(self, values: Mapping[str, Tensor]) -> list[Layer]:
        """What changed, layer by layer."""
        found: dict[tuple[str, str], dict[str, Tensor]] = {}
        for key, base in self._base.items():
            component, _, name = key.partition(":")
            module, _, leaf = name.rpartition(".")
            difference = values[key] - base.float().cpu()
            found.setdefault((component, module), {})[_PARTS[leaf]] = difference
        return [Layer(component, module, "full", parts, {}) for (component, module), parts in found.items()]
