"""An adapter for every layer that is to be trained."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from sdops.errors import UsageError
from sdops.trainers._kinds import form_of, kind_of, ranks_of
from sdops.training.changes import Change
from sdops.training.config import Config
from sdops.training.model import Model


def changes(model: Model, config: Config) -> list[Change]:
    """An adapter for every layer that is to be trained, not installed yet.

    Raises:
        UsageError: `ranks` names nothing that the model has.
    """
    ranks = ranks_of(config)
    components: list[tuple[str, Any]] = [("unet", model.unet)]
    components += [(encoder.name, encoder.module) for encoder in model.encoders]
    found = [
        Change(component, name, layer, form_of(config, ranks[kind]))
        for component, module in components
        for name, layer in module.named_modules()
        if isinstance(layer, (nn.Linear, nn.Conv2d)) and (kind := kind_of(component, name, ranks)) is not None
    ]
    if not found:
        raise UsageError(
            f"`{model.name}` has no layers of {', '.join(ranks)}", hint="e.g. `attention feedforward`", key="ranks"
        )
    return found


def in_order(found: list[Change], rate: Callable[[Change], float]) -> list[Change]:
    """Sorted so that layers that learn at one rate stand together."""
    return sorted(found, key=lambda change: (change.component != "unet", rate(change)))
