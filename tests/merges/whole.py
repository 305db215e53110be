"""Run a merge method on whole tensors in the plainest way: the contract of the shelf without an engine."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from types import ModuleType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sdops.card import Card
from sdops.core.noise import Noise

KEY = "model.diffusion_model.input_blocks.0.0.weight"


def load(card: Card) -> ModuleType:
    return import_module(f"sdops.merges.{card.name}")


def merge(card: Card, inputs: Sequence[Tensor], knobs: Mapping[str, Any] | None = None, offset: int = 0) -> Tensor:
    """One tensor merged; `inputs` has the base first where the method has one. It starts at flat index `offset`."""
    knobs = knobs or {}
    extras = _extras(card, inputs, offset)
    module = load(card)
    function = getattr(module, card.name)
    own = _taken(function, knobs)
    match card.execution:
        case "linear" | "tensor":
            return function(*inputs, **own, **extras)
        case "elementwise":
            flat = [x.flatten() for x in inputs]
            return function(*flat, **own, **extras).reshape(inputs[0].shape)
        case "gram":
            coefficients = function(gram(inputs), **own)
            total = sum(c * x.double() for c, x in zip(coefficients.tolist(), inputs, strict=True))
            return total.to(inputs[0].dtype)
        case "ranked":
            flat = [x.flatten() for x in inputs]
            first, last = module.window(inputs[0].numel(), **_taken(module.window, knobs))
            kept = ranked(module.scores(*flat), first, last)
            return function(*flat, kept=kept, **own, **extras).reshape(inputs[0].shape)
        case "rows":
            rows = [x.reshape(1, -1) if x.dim() < 2 else x for x in inputs]
            return function(*rows, **own, **extras).reshape(inputs[0].shape)
        case "model":
            state = module.prepare([KEY], lambda _: list(inputs), **_taken(module.prepare, knobs))
            return function(*inputs, state=state, **own, **extras)
    raise AssertionError(card.execution)


def _taken(function: Callable[..., Any], knobs: Mapping[str, Any]) -> dict[str, Any]:
    """The knobs that a function declares."""
    return {name: value for name, value in knobs.items() if name in inspect.signature(function).parameters}


def _extras(card: Card, inputs: Sequence[Tensor], offset: int) -> dict[str, Any]:
    extras = {"gram": lambda: gram(inputs), "noise": lambda: Noise(seed=0, key=KEY, offset=offset), "key": lambda: KEY}
    return {name: make() for name, make in extras.items() if name in card.needs}


def gram(inputs: Sequence[Tensor]) -> NDArray[np.float64]:
    """Inner products (N, N)."""
    flat = np.stack([x.flatten().double().numpy() for x in inputs])
    return flat @ flat.T


def ranked(scores: Tensor, first: int, last: int) -> Tensor:
    """Elements at places [first, last) of each row, largest first, equal ones by increasing index."""
    kept = torch.zeros(scores.shape, dtype=torch.bool)
    for row, mask in zip(scores, kept, strict=True):
        order = np.argsort(-row.numpy(), kind="stable")
        mask[torch.from_numpy(order[max(first, 0) : max(last, 0)])] = True
    return kept
