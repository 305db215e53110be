"""The modules of one architecture under all the names that they have.

Handed in by the caller, because this shelf knows no models. Underscored names (`down_blocks_0_attentions_0`) cannot be
split by rule, so they are looked up.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from sdops.core.patch import Target

CANONICAL = "canonical"  # ldm, sgm, bfl, sai, native or whatever the architecture's own layout is called
DIFFUSERS = "diffusers"


@dataclass(frozen=True, eq=False)
class Names:
    """How an architecture's modules are called.

    Attributes:
        architecture: Family of the architecture tables.
        denoiser: The component that makes the images: `unet` or `transformer`.
        text_encoders: The others, in the order in which programs number them.
        spellings: Component, layout -> dotted module name -> what it is. Text encoders have the canonical layout alone,
            and maybe others that are only read.
        biased: Component -> canonical names of its modules that have a bias.
        stems: Spelling -> what it calls the modules, once it was asked.
    """

    architecture: str
    denoiser: str
    text_encoders: tuple[str, ...]
    spellings: Mapping[tuple[str, str], Mapping[str, Target]]
    biased: Mapping[str, frozenset[str]] = field(default_factory=dict)
    stems: dict[object, Mapping[str, Target]] = field(default_factory=dict, repr=False)
    _places: dict[tuple[str, str], dict[str, list[tuple[str, Target]]]] = field(default_factory=dict, repr=False)

    def layouts(self, component: str) -> Iterator[str]:
        """The layouts of a component, the canonical one first."""
        return (layout for name, layout in self.spellings if name == component)

    def modules(self, component: str, layout: str) -> Mapping[str, Target]:
        """Dotted module name -> what it is; those of the canonical layout where there is no other."""
        return self.spellings.get((component, layout)) or self.spellings.get((component, CANONICAL), {})

    def places(self, component: str, layout: str, module: str) -> list[tuple[str, Target]]:
        """What stands for a canonical module in a layout: one name, or one for every share of its rows."""
        if (component, layout) not in self._places:
            by_module: dict[str, list[tuple[str, Target]]] = {}
            for name, target in self.modules(component, layout).items():
                by_module.setdefault(target.module, []).append((name, target))
            self._places[component, layout] = by_module
        return self._places[component, layout].get(module, [])
