"""Learning rates by block, with the slots that merges and `sdops apply` know: IN04, M00, OUT07."""

from __future__ import annotations

from collections.abc import Callable

from sdops.archs.blocks import BASE, slot_in, slots_in
from sdops.archs.tables import tables
from sdops.core.dial import parse_dial
from sdops.training.model import Model


def rates_by_block(model: Model, text: str) -> Callable[[str, str], float]:
    """A function from component and layer (as diffusers calls it) to a factor of the learning rate.

    Args:
        model: Whose blocks are meant.
        text: A dial, e.g. `1,IN04=0.5,M00=0`.

    Raises:
        UsageError: it is malformed, or names what is not there.
    """
    table = next(
        each for each in tables() if each.family == model.family and each.kind == "model" and each.layout == "diffusers"
    )
    ranges = table.ranges_of(())
    components = ["unet", *(encoder.name for encoder in model.encoders)]
    dial = parse_dial(text, knob="block_lr", default=1.0, slots=slots_in(table, ranges), components=components)

    def rate(component: str, layer: str) -> float:
        block = slot_in(table, ranges, component, layer) if component == "unet" else BASE
        return dial.resolve(layer, block, component)

    return rate
