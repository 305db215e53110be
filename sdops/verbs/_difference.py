"""What differs between two models, tensor by tensor and block by block, as plain records."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from sdops.archs.blocks import BASE, block_of, block_slots
from sdops.archs.detect import component_of
from sdops.core.compare import NUMBERS, Measure, Pair
from sdops.core.spec import Spec
from sdops.verbs._counterparts import Counterparts, Model

STATES = ("identical", "equal", "rounded", "changed", "shape")  # of tensors that both have

# What a tensor does, told by its name in any layout; the first pattern that is found decides.
_KINDS = tuple(
    (kind, re.compile(pattern))
    for kind, pattern in (
        ("norm", r"norm|(^|\.)ln_|(in_layers|out_layers)\.0\.|(^|\.)out\.0\."),
        ("cross", r"attn2|cross_attn|add_[qkvo]|context_block|txt_attn|_context\."),
        ("self", r"attn|attention|qkv|\bto_[qkv]\b|to_out|linear1|mid\.block_1\.[qkv]"),
        ("feed", r"\.ff\.|mlp|ffn|feed_forward|\bfc[12]\b|linear2|DenseReluDense"),
        ("embed", r"emb|time|label|guidance|vector_in|modulation|mod\.|adaLN|scale_shift|position|token"),
        (
            "conv",
            r"conv|in_layers|out_layers|skip_connection|shortcut|resnets|\.op\.|sample|_blocks\.0\.0|(^|\.)out\.2\.",
        ),
    )
)
KINDS = (*(kind for kind, _ in _KINDS), "other")


@dataclass(frozen=True, slots=True)
class Difference:
    """One tensor that both models have.

    Attributes:
        key: Its name in the first model.
        key_b: In the second.
        specs: Dtype as it is in the files, shape as it is in the first one's layout.
        block: Merge slot, or the component where it has none.
        kind: What it does, one of KINDS.
        measure: How far the values are apart; None if the shapes do not allow to say.
    """

    key: str
    key_b: str
    specs: tuple[Spec, Spec]
    block: str
    kind: str
    measure: Measure | None

    @property
    def state(self) -> str:
        """One of STATES. `equal`: the same values, not the same bits; `rounded`: equal but for the narrower dtype."""
        if self.measure is None:
            return "shape"
        if self.measure.changed:
            return "rounded" if self.measure.rounded else "changed"
        return "identical" if self.measure.same_bytes and self.specs[0] == self.specs[1] else "equal"

    def facts(self) -> dict[str, Any]:
        """For JSON."""
        facts: dict[str, Any] = {"state": self.state, "block": self.block, "kind": self.kind, "key_b": self.key_b}
        facts |= {"dtype": [s.dtype for s in self.specs], "shape": [list(s.shape) for s in self.specs]}
        return facts | (measured(self.measure) if self.measure else {})


def measured(found: Measure) -> dict[str, Any]:
    """A Measure for JSON, which knows no infinity."""
    numbers = {"relative": found.relative, "cosine": found.cosine, "max_abs": found.largest}
    known = {name: number if number is None or abs(number) < float("inf") else None for name, number in numbers.items()}
    return {"elements": found.elements, "changed": found.changed, "nonfinite": found.nonfinite, **known}


def pairs(a: Model, b: Counterparts, b_model: Model) -> list[Pair]:
    """The tensors that can be compared: those of one shape, sizes of 1 left aside."""
    found = []
    for key, spec in a.source.specs.items():
        other = b.source.specs.get(key)
        if other is None or _squeezed(spec) != _squeezed(other):
            continue
        codes = a.is_code(key) or b_model.is_code(b.keys[key])
        codes |= not {spec.dtype, other.dtype} <= NUMBERS or ("C64" in (spec.dtype, other.dtype) and spec != other)
        found.append(Pair(key, a.source, key, b.source, key, codes=codes))
    return found


def differences(a: Model, b: Counterparts, b_model: Model, found: Mapping[str, Measure]) -> list[Difference]:
    """A record for every tensor that both have, in the order of the first."""
    records = []
    for key in a.source.specs:
        if key not in b.source.specs:
            continue
        specs = _stored(a, key, a.source.specs[key]), _stored(b_model, b.keys[key], b.source.specs[key])
        records.append(Difference(key, b.keys[key], specs, block(a, key), kind(key), found.get(key)))
    return records


def block(model: Model, key: str) -> str:
    """Merge slot of a key; where it has none, its component."""
    slot = block_of(model.detection, key)
    return component_of(model.detection, key) if slot == BASE else slot


def kind(key: str) -> str:
    """What a tensor does, one of KINDS."""
    return next((kind for kind, pattern in _KINDS if pattern.search(key)), "other")


def by_block(model: Model, records: Iterable[Difference]) -> dict[str, dict[str, Measure]]:
    """Block -> kind of tensor -> the sum of their measures; blocks in the model's order, components behind.

    What was only rounded counts as unchanged.
    """
    grid: dict[str, dict[str, Measure]] = {slot: {} for slot in block_slots(model.detection) if slot != BASE}
    for record in records:
        cells = grid.setdefault(record.block, {})
        if record.measure is not None:
            found = Measure(record.measure.elements) if record.state == "rounded" else record.measure
            cells.setdefault(record.kind, Measure(0)).add(found)
    return {slot: cells for slot, cells in grid.items() if cells}


def total(measures: Iterable[Measure]) -> Measure:
    """Several measures as one."""
    whole = Measure(0)
    for measure in measures:
        whole.add(measure)
    return whole


def _stored(model: Model, key: str, seen: Spec) -> Spec:
    """A tensor in the dtype that the file has."""
    return Spec(model.origin.specs[key].dtype, seen.shape)


def _squeezed(spec: Spec) -> tuple[int, ...]:
    return tuple(size for size in spec.shape if size != 1)
