"""How hypernetworks are built: which widths, which layers, and what their places are called. No torch."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from sdops.errors import UsageError
from sdops.training.config import Config


@dataclass(frozen=True, slots=True)
class Networks:
    """The chains of a hypernetwork; keys and values have one each, alike, for every width.

    Attributes:
        widths: Of the contexts, ascending.
        structure: Widths of the layers as multiples of the context's.
        activation: Empty for none.
        activates_output: Whether it also stands behind the last layer.
        has_norms: Whether a layer norm stands behind every layer.
        dropout: Share that is dropped behind each layer but the last; there 0.
    """

    widths: tuple[int, ...]
    structure: tuple[float, ...]
    activation: str
    activates_output: bool
    has_norms: bool
    dropout: float

    @property
    def shares(self) -> list[float]:
        """Dropout as files tell it, with one more number than there are layers."""
        return [0.0, *[self.dropout] * (len(self.structure) - 2), 0.0]

    def modules(self) -> list[tuple[str, int]]:
        """What stands in a chain, in order: `linear`, `activation`, `norm`, `dropout`, and of which layer."""
        found: list[tuple[str, int]] = []
        last = len(self.structure) - 2
        for layer in range(last + 1):
            found.append(("linear", layer))
            if self.activation and (layer < last or self.activates_output):
                found.append(("activation", layer))
            if self.has_norms:
                found.append(("norm", layer))
            if self.shares[layer + 1]:
                found.append(("dropout", layer))
        return found

    def shapes(self, width: int) -> dict[str, tuple[int, ...]]:
        """The tensors of a chain, as the web UI calls them behind `linear.`: `0.weight`, `0.bias` ..."""
        sides = [int(width * share) for share in self.structure]
        found: dict[str, tuple[int, ...]] = {}
        for index, (kind, layer) in enumerate(self.modules()):
            if kind in ("linear", "norm"):
                rows = sides[layer + 1]
                found[f"{index}.weight"] = (rows, sides[layer]) if kind == "linear" else (rows,)
                found[f"{index}.bias"] = (rows,)
        return found


def networks_of(config: Config, widths: Iterable[int]) -> Networks:
    """How the settings build them.

    Args:
        config: The settings.
        widths: Of the contexts that the model has.

    Raises:
        UsageError: the structure makes no sense, or the model has no context that wide.
    """
    there = tuple(sorted(widths))
    wanted = tuple(sorted({int(number) for number in _numbers(config.widths, "widths")}))
    if missing := [width for width in wanted if width not in there]:
        raise UsageError(
            f"no attention of the model has a context of {missing[0]} numbers",
            hint=f"there are {', '.join(map(str, there))}",
            key="widths",
        )
    structure = tuple(_numbers(config.layer_structure, "layer_structure"))
    if len(structure) < 2 or structure[0] != 1 or structure[-1] != 1 or min(structure) <= 0:
        raise UsageError(
            f"`layer_structure` is `{config.layer_structure}`, which is no hypernetwork's",
            hint="multiples of the width, the first and the last 1, e.g. `1, 2, 1`",
            key="layer_structure",
        )
    activation = "" if config.activation == "linear" else config.activation
    return Networks(wanted or there, structure, activation, config.activate_output, config.layer_norm, config.dropout)


def _numbers(text: str, key: str) -> list[float]:
    try:
        return [float(item) for item in text.replace(",", " ").split()]
    except ValueError as error:
        raise UsageError(f"`{key}` is `{text}`: not all of that are numbers", hint="e.g. `1, 2, 1`", key=key) from error
