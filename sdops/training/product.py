"""What a training gives, before anybody asks how a file spells it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class Layer:
    """A changed layer.

    Attributes:
        component: `unet` or an encoder.
        module: As diffusers or transformers call it.
        family: On the adapters shelf.
        parts: As that calls them, float32.
        settings: `lora_alpha`, `use_rslora`.
    """

    component: str
    module: str
    family: str
    parts: Mapping[str, Tensor]
    settings: Mapping[str, float | bool]


@dataclass(slots=True)
class Product:
    """What is saved.

    Attributes:
        layers: For one LoRA file.
        words: New word -> encoder -> vectors [n, d], for a file of embeddings each.
        weights: Component -> tensor of the model, as diffusers calls it -> new values, for a whole model.
        tree: Plain values and tensors for a torch file (hypernetworks).
    """

    layers: list[Layer] = field(default_factory=list)
    words: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    weights: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    tree: dict[Any, Any] = field(default_factory=dict)
