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


Chain = Mapping[str, "Tensor"]  # `{place}.weight` and `{place}.bias` of a hypernetwork's layers


@dataclass(frozen=True, slots=True)
class Network:
    """A hypernetwork.

    Attributes:
        pairs: Width of the context -> the chains for keys and for values.
        settings: How it is built, as the web UI calls it.
    """

    pairs: Mapping[int, tuple[Chain, Chain]]
    settings: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Texts:
    """Null texts, and what they only make sense with.

    Attributes:
        texts: [steps, 77, width].
        latents: The picture's noise [1, 4, h, w] that they lead back from.
        facts: Prompt, guidance and noise steps.
    """

    texts: Tensor
    latents: Tensor
    facts: Mapping[str, str]


@dataclass(slots=True)
class Product:
    """What is saved; a method fills in what it makes.

    Attributes:
        layers: For one LoRA-like file.
        words: New word -> encoder -> vectors [n, d]: bundled with layers, else files of embeddings.
        network: A hypernetwork.
        texts: Null texts.
        vector: A CLIP image vector [1, d].
    """

    layers: list[Layer] = field(default_factory=list)
    words: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    network: Network | None = None
    texts: Texts | None = None
    vector: Tensor | None = None
