"""What most dialects are: prefixes for the components, a layout, dots or underscores, and names for the parts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

from sdops.core.patch import Target
from sdops.dialects._names import CANONICAL, DIFFUSERS, Names
from sdops.dialects._suffixes import LYCORIS

Alphas = Literal["tensor", "fold"]
Dora = Literal["dora_scale", "magnitude", "none"]


@dataclass(frozen=True, eq=False)
class Spelling:
    """A dialect as data.

    Attributes:
        name: The dialect's file.
        joint: What stands between the parts of a module's name: "." or "_".
        prefixes: Component -> what may stand before its names; the first is written. Empty: it has no place here.
        writes: The layout that a component is written in.
        alphas: Where a LoRA's alpha goes: a tensor, or folded into `up`.
        dora: How DoRA's vector is kept.
        suffixes: Family, part -> suffix; what is not here cannot be written.
        norm_names: Whether 1-D changes are called `w_norm` and `b_norm`.
        bundles: Whether embeddings may lie in the same file.
        rename: Applied to a dotted module name before it is written; the reader finds the same.
    """

    name: str
    joint: Literal[".", "_"]
    prefixes: Callable[[Names, str], tuple[str, ...]]
    writes: Callable[[Names, str], str] = lambda _names, _component: CANONICAL
    alphas: Alphas = "tensor"
    dora: Dora = "dora_scale"
    suffixes: Mapping[tuple[str, str], str] = field(default_factory=lambda: LYCORIS)
    norm_names: bool = False
    bundles: bool = False
    rename: Callable[[str], str | None] = lambda module: module

    def stem(self, names: Names, component: str, module: str) -> str | None:
        """A module of the written layout as this dialect calls it."""
        prefixes, renamed = self.prefixes(names, component), self.rename(module)
        return prefixes[0] + renamed.replace(".", self.joint) if prefixes and renamed is not None else None

    def stems(self, names: Names) -> Mapping[str, Target]:
        """Every stem that the dialect reads, in all layouts -> what it is."""
        if self not in names.stems:
            names.stems[self] = _Stems(self, names)
        return names.stems[self]

    def modules(self, names: Names, component: str) -> Iterator[tuple[str, Target]]:
        """Dotted names in all layouts, the written one first."""
        first = self.writes(names, component)
        for layout in (first, *(layout for layout in names.layouts(component) if layout != first)):
            for module, target in names.modules(component, layout).items():
                renamed = self.rename(module)
                if renamed is not None:
                    yield renamed, target
                if renamed != module:
                    yield module, target


class _Stems(Mapping[str, Target]):
    """All stems of a dialect. They are looked up below each prefix: to keep every name under every prefix would take
    megabytes, and longer than to read a file's names.
    """

    def __init__(self, spelling: Spelling, names: Names) -> None:
        self._found: list[tuple[tuple[str, ...], dict[str, Target]]] = []  # of each component: prefixes, modules
        for component in (names.denoiser, *names.text_encoders):
            if prefixes := spelling.prefixes(names, component):
                modules: dict[str, Target] = {}
                for module, target in spelling.modules(names, component):
                    modules.setdefault(module.replace(".", spelling.joint), target)
                self._found.append((prefixes, modules))

    def __getitem__(self, stem: str) -> Target:
        for prefixes, modules in self._found:
            for prefix in prefixes:
                if stem.startswith(prefix) and (target := modules.get(stem[len(prefix) :])) is not None:
                    return target
        raise KeyError(stem)

    def __iter__(self) -> Iterator[str]:
        return iter({prefix + name: None for prefixes, names in self._found for prefix in prefixes for name in names})

    def __len__(self) -> int:
        return sum(1 for _ in self)


def diffusers(names: Names, component: str) -> str:
    """The denoiser in diffusers' layout, where it has one."""
    return DIFFUSERS if component == names.denoiser else CANONICAL


def pipeline_prefixes(names: Names, component: str) -> tuple[str, ...]:
    """What diffusers' pipelines call a component: `unet.` or `transformer.`, `text_encoder.`, `text_encoder_2.` ..."""
    if component == names.denoiser:
        return f"{component}.", ""
    number = 1 + names.text_encoders.index(component)
    return ("text_encoder.",) if number == 1 else (f"text_encoder_{number}.",)
