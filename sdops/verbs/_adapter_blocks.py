"""The merge slots of an adapter's layers: IN04, MID, OUT07, or those of the transformers. No torch."""

from __future__ import annotations

from collections.abc import Mapping

from sdops.archs.blocks import BASE, slot_in, slots_in
from sdops.archs.tables import Table, tables
from sdops.core.dial import Dial, DialValue, parse_dial
from sdops.core.patch import Adapter, Target


class Blocks:
    """The slots of the architecture that an adapter is for.

    Attributes:
        slots: In their usual order, BASE first.
        components: What dials may name: denoiser and text encoders.
    """

    def __init__(self, adapter: Adapter) -> None:
        family = [table for table in tables() if table.family == adapter.architecture and table.kind == "model"]
        self._table: Table | None = next((table for table in family if table.keys), None)
        variants = self._table.variants if self._table else ()
        chosen = tuple(variant for variant in variants if variant.name == adapter.variant)
        self._ranges: Mapping[str, int] = self._table.ranges_of(chosen) if self._table else {}
        self.slots = slots_in(self._table, self._ranges) if self._table else [BASE]
        self.components = list(dict.fromkeys(patch.target.component for patch in adapter.patches))

    def of(self, target: Target) -> str:
        """The slot of a layer; BASE where it has none."""
        if self._table is None or not self._table.slots:
            return BASE
        return slot_in(self._table, self._ranges, target.component, target.module)

    def row(self, target: Target) -> str:
        """Where a layer stands in a table by block: its slot, or its component where it has none."""
        slot = self.of(target)
        return target.component if slot == BASE else slot

    def dial(self, value: DialValue, knob: str) -> Dial:
        """Block weights as users write them, 1 where they say nothing.

        Raises:
            UsageError: they are malformed, or name what is not there.
        """
        return parse_dial(value, knob=knob, default=1.0, slots=self.slots, components=self.components)

    def weight(self, dial: Dial, target: Target) -> float:
        """What a dial says of a layer."""
        return dial.resolve(target.module, self.of(target), target.component)
