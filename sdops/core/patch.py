"""What an adapter file (LoRA and its relatives) changes, in names alone: no torch, no values.

A dialect (shelf `dialects/`) reads a file's tensor names into Patches; a family (shelf `adapters/`) knows what
the parts of a Patch mean and computes its delta.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from sdops.core.source import Source

Share = tuple[int, int, int]  # rows start/total .. stop/total of dim 0


@dataclass(frozen=True, slots=True)
class Target:
    """The weight, or the rows of a weight, that a patch changes.

    Attributes:
        component: As the architecture tables call it: `unet`, `transformer`, `clip_l`, `clip_g`, `t5xxl`, ...
        module: Dotted name without `.weight` in the canonical layout: ldm / sgm, bfl, sai or native for denoisers, hf
            for text encoders.
        share: Rows `start / total .. stop / total` of a fused matrix; None for all of them.
        swapped: The patch's rows are stored with their two halves swapped (the final modulation of Flux and SD3).
    """

    component: str
    module: str
    share: Share | None = None
    swapped: bool = False

    def __str__(self) -> str:
        rows = "" if self.share is None else f"[{self.share[0]}/{self.share[2]}:{self.share[1]}/{self.share[2]}]"
        return f"{self.component}:{self.module}{rows}{'~' if self.swapped else ''}"

    @property
    def order(self) -> tuple[str, str, Share, bool]:
        """A key to sort by; all rows come before some of them."""
        return self.component, self.module, self.share or (0, 0, 0), self.swapped


@dataclass(frozen=True, slots=True)
class Patch:
    """One family's change of one target.

    Attributes:
        target: What is changed.
        family: Name of a file on the `adapters/` shelf.
        parts: Part, as that file calls it -> the tensor of the adapter file. Only names: values stay in the file.
        settings: What is no tensor, e.g. `lora_alpha` and `use_rslora` of a PEFT folder's configuration.
    """

    target: Target
    family: str
    parts: Mapping[str, str]
    settings: Mapping[str, float | int | bool | str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Adapter:
    """An opened adapter file.

    Attributes:
        source: Where the tensors are.
        dialect: Name of a file on the `dialects/` shelf.
        architecture: Family of the architecture tables: `sd1`, `sdxl`, `flux1`, ...
        variant: The family's variant where the depth decides what a name means: `3.5-large` of `sd3`; else empty.
        patches: In the file's order.
        extras: Tensors that are understood and no patches, e.g. bundled embeddings -> what they are.
        unknown: Tensors that are not understood.
        notes: What the user should know, one sentence each, without a full stop.
        rivals: Other families that it may be for as well: neither names, shapes nor the header tell.
    """

    source: Source
    dialect: str
    architecture: str
    patches: tuple[Patch, ...]
    extras: Mapping[str, str] = field(default_factory=dict)
    unknown: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    variant: str = ""
    rivals: tuple[str, ...] = ()

    def shapes(self, patch: Patch) -> dict[str, tuple[int, ...]]:
        """Part of one of the patches -> its shape."""
        return {part: self.source.specs[key].shape for part, key in patch.parts.items()}
