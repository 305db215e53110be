"""See a model's components in the layouts that another model has them in, as ranges of bytes: nothing is computed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from sdops.archs.detect import Component
from sdops.archs.junk import is_position_ids
from sdops.core.assembled import Made, joined, rows
from sdops.core.source import Source


@dataclass(slots=True)
class Relaid:
    """Components in other layouts.

    Attributes:
        tensors: New key -> how it is made.
        layouts: Component -> (layout in the file, layout it is seen in).
        placeless: Keys of either side that the other side's layout has no place for -> why.
        notes: What the user should know.
    """

    tensors: dict[str, Made] = field(default_factory=dict)
    layouts: dict[str, tuple[str, str]] = field(default_factory=dict)
    placeless: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def add(self, source: Source, own: Component, wanted: Component, names: tuple[str, str]) -> None:
        """Spell a component of `source` as another model spells it.

        What nobody knows keeps its name behind the new prefix, so that it is found missing or too much as if both
        models were in one layout. What only one of the two layouts holds (`logit_scale`, the last layer of a text
        encoder whose output nobody uses) goes to `placeless`.

        Args:
            source: Has the component `own`.
            own: The component as it is.
            wanted: The other model's component.
            names: What messages call the model and the other one.

        Raises:
            MismatchError: there is no way between the layouts, or a tensor's shape does not allow it.
        """
        from sdops.layouts.tables import made_of

        keys = [key for key in own.keys if key in source.specs]
        recipes = made_of(own.family, own.name, own.layout, wanted.layout, [_cut(key, own) for key in keys])
        made = {
            wanted.prefix + name: joined([rows(source, own.prefix + p.key, p.share, p.operation) for p in parts])
            for name, parts in recipes.items()
        }
        self._leave(source, own, wanted, made, names)
        self.tensors |= made
        self.layouts[own.name] = own.layout, wanted.layout

    def _leave(
        self, source: Source, own: Component, wanted: Component, made: dict[str, Made], names: tuple[str, str]
    ) -> None:
        """Decide on the tensors of either side that have no counterpart."""
        used = {part.key for each in made.values() for part in each.ranges}
        known, why = set(wanted.keys), f"the {wanted.layout} layout of `{names[1]}` has no place for it"
        if wanted.complete:
            unknown = {new for new, each in made.items() if all(part.key in own.extra for part in each.ranges)}
            self.placeless |= dict.fromkeys(made.keys() - known - unknown, why)
        for key in [key for key in own.keys if key not in used and key in source.specs]:
            name = wanted.prefix + _cut(key, own) if key in own.extra else key
            if name in known or name in made:  # the name of another tensor in the other layout
                self.notes.append(f"`{key}` of `{names[0]}` is left out: {why}")
                continue
            made[name] = rows(source, key)
            if key not in own.extra and not is_position_ids(key):
                self.placeless[name] = why
        if own.complete:
            why = f"the {own.layout} layout of `{names[0]}` has no place for it"
            self.placeless |= dict.fromkeys(known - made.keys() - set(wanted.extra), why)


def _cut(key: str, component: Component) -> str:
    return key.removeprefix(component.prefix)


def shown(layouts: Mapping[str, tuple[str, str]]) -> str:
    """`unet diffusers -> ldm, vae diffusers -> ldm`."""
    return ", ".join(f"{name} {own} -> {wanted}" for name, (own, wanted) in layouts.items())
