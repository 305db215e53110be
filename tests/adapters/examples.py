"""One or more patches of every family, in every form that it has, filled with random numbers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sdops.adapters import Family, Shape, family


@dataclass(frozen=True)
class Example:
    """Shapes of the parts, the numbers among them, and the weight that they are for."""

    name: str
    family: str
    shape: Shape
    shapes: Mapping[str, Shape]
    numbers: Mapping[str, float] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    fixed: Mapping[str, Any] = field(default_factory=dict)  # parts whose numbers cannot be random
    exact: bool = True  # is the family's `factors` expected to answer?

    @property
    def code(self) -> Family:
        return family(self.family)

    def parts(self, seed: int = 0, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        made = {
            part: torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) / 2
            for part, shape in self.shapes.items()
        }
        made |= {part: torch.tensor(value, dtype=torch.float32) for part, value in self.fixed.items()}
        return made | {part: torch.tensor(value) for part, value in self.numbers.items()}

    def weight(self, seed: int = 1, dtype: torch.dtype = torch.float64) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(self.shape, generator=generator, dtype=torch.float64).to(dtype)

    def all_shapes(self) -> dict[str, Shape]:
        fixed = {part: tuple(torch.tensor(value).shape) for part, value in self.fixed.items()}
        return dict(self.shapes) | dict.fromkeys(self.numbers, ()) | fixed


LINEAR, CONV, POINT = (6, 8), (6, 4, 3, 3), (6, 8, 1, 1)
ALPHA = {"lora_alpha": 2.0}

EXAMPLES = [
    Example("lora", "lora", LINEAR, {"up": (6, 3), "down": (3, 8)}),
    Example("lora alpha", "lora", LINEAR, {"up": (6, 3), "down": (3, 8)}, ALPHA),
    Example(
        "lora rs", "lora", LINEAR, {"up": (6, 3), "down": (3, 8)}, settings={"lora_alpha": 2.0, "use_rslora": True}
    ),
    Example("lora bias", "lora", LINEAR, {"up": (6, 3), "down": (3, 8), "up_bias": (6,)}, ALPHA),
    Example("lora prefix", "lora", LINEAR, {"up": (6, 4), "down": (4, 8)}, ALPHA, {"rank": 2}),
    Example("lora conv", "lora", CONV, {"up": (6, 3, 1, 1), "down": (3, 4, 3, 3)}, ALPHA),
    Example("lora flat conv", "lora", CONV, {"up": (6, 3), "down": (3, 36)}, ALPHA),
    Example("lora point", "lora", POINT, {"up": (6, 3, 1, 1), "down": (3, 8, 1, 1)}, ALPHA),
    Example("lora flat point", "lora", POINT, {"up": (6, 3), "down": (3, 8)}, ALPHA),
    Example("lora on linear", "lora", LINEAR, {"up": (6, 3, 1, 1), "down": (3, 8, 1, 1)}, ALPHA),
    Example("tucker", "lora", CONV, {"up": (6, 3, 1, 1), "mid": (3, 3, 3, 3), "down": (3, 4, 1, 1)}, ALPHA),
    Example(
        "lora sparse",
        "lora",
        LINEAR,
        {"up": (6, 3), "down": (3, 8), "sparse_values": (3,)},
        ALPHA,
        fixed={"sparse_indices": [[0, 0, 5], [7, 1, 3]], "sparse_size": [6, 8]},
        exact=False,
    ),
    Example("lora embedding", "lora_embedding", LINEAR, {"a": (3, 6), "b": (8, 3)}, ALPHA),
    Example("dora out", "lora", LINEAR, {"up": (6, 3), "down": (3, 8), "dora_scale": (6, 1)}, exact=False),
    Example("dora in", "lora", LINEAR, {"up": (6, 3), "down": (3, 8), "dora_scale": (1, 8)}, exact=False),
    Example("dora peft", "lora", LINEAR, {"up": (6, 3), "down": (3, 8), "magnitude": (6,)}, exact=False),
    Example("dora conv in", "lora", CONV, {"up": (6, 3), "down": (3, 36), "dora_scale": (1, 4, 1, 1)}, exact=False),
    Example("dora conv peft", "lora", CONV, {"up": (6, 3), "down": (3, 36), "magnitude": (1, 6, 1, 1)}, exact=False),
    Example("loha", "loha", LINEAR, {"w1_a": (6, 2), "w1_b": (2, 8), "w2_a": (6, 2), "w2_b": (2, 8)}, ALPHA),
    Example("loha conv", "loha", CONV, {"w1_a": (6, 2), "w1_b": (2, 36), "w2_a": (6, 2), "w2_b": (2, 36)}, ALPHA),
    Example(
        "loha tucker",
        "loha",
        CONV,
        {"t1": (2, 2, 3, 3), "w1_a": (2, 6), "w1_b": (2, 4), "t2": (2, 2, 3, 3), "w2_a": (2, 6), "w2_b": (2, 4)},
        ALPHA,
    ),
    Example(
        "loha dora",
        "loha",
        LINEAR,
        {"w1_a": (6, 2), "w1_b": (2, 8), "w2_a": (6, 2), "w2_b": (2, 8), "dora_scale": (6, 1)},
        exact=False,
    ),
    Example("lokr full", "lokr", LINEAR, {"w1": (2, 2), "w2": (3, 4)}, ALPHA),
    Example("lokr peft", "lokr", LINEAR, {"w1": (2, 2), "w2": (3, 4)}, settings={"lora_alpha": 2.0, "rank": 4}),
    Example("lokr one", "lokr", LINEAR, {"w1": (2, 2), "w2_a": (3, 2), "w2_b": (2, 4)}, ALPHA),
    Example("lokr both", "lokr", LINEAR, {"w1_a": (2, 1), "w1_b": (1, 2), "w2_a": (3, 1), "w2_b": (1, 4)}, ALPHA),
    Example("lokr conv", "lokr", CONV, {"w1": (2, 2), "w2": (3, 2, 3, 3)}, ALPHA),
    Example("lokr conv factored", "lokr", CONV, {"w1": (2, 2), "w2_a": (3, 2), "w2_b": (2, 18)}, ALPHA),
    Example("lokr early", "lokr", CONV, {"w1": (2, 4), "w2_a": (3, 2), "w2_b": (2, 9)}, ALPHA),
    Example("lokr flattened", "lokr", CONV, {"w1": (2, 6), "w2": (3, 6)}, ALPHA),
    Example("lokr tucker", "lokr", CONV, {"w1": (2, 2), "t2": (2, 2, 3, 3), "w2_a": (2, 3), "w2_b": (2, 2)}, ALPHA),
    Example("lokr dora", "lokr", LINEAR, {"w1": (2, 2), "w2": (3, 4), "dora_scale": (1, 8)}, exact=False),
    Example("glora", "glora", LINEAR, {"a1": (8, 2), "a2": (2, 8), "b1": (6, 2), "b2": (2, 8)}, ALPHA),
    Example("glora old", "glora", LINEAR, {"a1": (2, 8), "a2": (8, 2), "b1": (2, 8), "b2": (6, 2)}, ALPHA),
    Example(
        "glora conv",
        "glora",
        CONV,
        {"a1": (4, 2, 1, 1), "a2": (2, 4, 1, 1), "b1": (6, 2, 1, 1), "b2": (2, 4, 3, 3)},
        ALPHA,
    ),
    Example(
        "glora tucker",
        "glora",
        CONV,
        {"a1": (4, 2, 1, 1), "a2": (2, 4, 1, 1), "b1": (6, 2, 1, 1), "b2": (2, 4, 1, 1), "bm": (2, 2, 3, 3)},
        ALPHA,
    ),
    Example("ia3 in", "ia3", LINEAR, {"weight": (8,)}, {"on_input": 1}, exact=False),
    Example("ia3 out", "ia3", LINEAR, {"weight": (6,)}, {"on_input": 0}, exact=False),
    Example("ia3 conv out", "ia3", CONV, {"weight": (1, 6, 1, 1)}, {"on_input": 0}, exact=False),
    Example("ia3 conv in", "ia3", CONV, {"weight": (1, 4, 1, 1)}, {"on_input": 1}, exact=False),
    Example("ia3 peft in", "ia3", LINEAR, {"multiplier": (1, 8)}, exact=False),
    Example("ia3 peft out", "ia3", LINEAR, {"multiplier": (6, 1)}, exact=False),
    Example("ia3 peft conv", "ia3", CONV, {"multiplier": (1, 4, 1, 1)}, settings={"on_input": True}, exact=False),
    Example("oft", "oft", LINEAR, {"blocks": (2, 3, 3)}, exact=False),
    Example(
        "oft limited", "oft", CONV, {"blocks": (3, 2, 2), "rescale": (6, 1, 1, 1)}, {"constraint": 0.1}, exact=False
    ),
    Example("oft vectors", "oft", LINEAR, {"vectors": (2, 6)}, exact=False),
    Example("oft scaled", "oft", LINEAR, {"vectors": (2, 6)}, {"scaled": 1}, exact=False),
    Example("oft shared", "oft", CONV, {"vectors": (1, 15)}, exact=False),
    Example("oft cayley", "oft", LINEAR, {"vectors": (2, 6)}, settings={"neumann_terms": 0}, exact=False),
    Example("boft", "boft", (8, 5), {"blocks": (3, 4, 2, 2), "rescale": (8, 1)}, exact=False),
    Example("boft wide", "boft", (8, 2, 3, 3), {"blocks": (2, 2, 4, 4)}, {"constraint": 0.05}, exact=False),
    Example("full", "full", CONV, {"diff": CONV, "diff_b": (6,)}, exact=False),
    Example("full set", "full", LINEAR, {"set": LINEAR, "set_b": (6,)}, exact=False),
    Example("full norm", "full", (6,), {"diff": (6,), "diff_b": (6,)}, exact=False),
    Example("full bias", "full", LINEAR, {"diff_b": (6,)}, exact=False),
]


def relative(found: Tensor, wanted: Tensor) -> float:
    """||found - wanted|| / ||wanted||."""
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


def tolerance(dtype: torch.dtype, length: int) -> float:
    """What rounding in sums of that length may make of a result, relative."""
    return 8 * torch.finfo(dtype).eps * length**0.5
