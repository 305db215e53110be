"""What will be written and how each tensor comes about, known from headers alone. No torch, no numpy.

A Plan holds one Step per output tensor. It can be shown (`--dry-run`), and run: core.merged turns it into a Source.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from sdops.core.source import Source
from sdops.core.spec import Spec

Action = Literal["copy", "cast", "value", "merge"]


@dataclass(frozen=True, slots=True)
class Input:
    """One tensor that a step reads: `source.specs[key]`; `model` is the index that messages use."""

    source: Source
    key: str
    model: int

    @property
    def spec(self) -> Spec:
        """The tensor's dtype and shape."""
        return self.source.specs[self.key]


class Inputs(Sequence[Input]):
    """The tensors of one name in several models, made when they are asked for: plans hold thousands of these.

    Args:
        sources: The models, in the order of their indices.
        key: The name.
    """

    __slots__ = ("_key", "_sources")

    def __init__(self, sources: tuple[Source, ...], key: str) -> None:
        self._sources = sources
        self._key = key

    def __iter__(self) -> Iterator[Input]:
        return iter([Input(source, self._key, index) for index, source in enumerate(self._sources)])

    def __getitem__(self, index: Any) -> Any:
        return tuple(self)[index]

    def __len__(self) -> int:
        return len(self._sources)


@dataclass(frozen=True, slots=True)
class Step:
    """How one output tensor comes about.

    Attributes:
        spec: Its dtype and shape.
        action: "copy" the bytes of the only input, "cast" its values, write `value`, or "merge" the inputs.
        inputs: What is read, in the order of the method's parameters.
        knobs: The method's knobs, resolved for this tensor.
        value: The tensor's bytes, for "value".
        reason: Why it is not simply merged, for the report.
    """

    spec: Spec
    action: Action
    inputs: Sequence[Input] = ()
    knobs: Mapping[str, Any] = field(default_factory=dict)
    value: bytes = b""
    reason: str = ""


@dataclass(slots=True)
class Plan:
    """All steps, and what the reader of a report wants to know about them.

    Attributes:
        name: What the result is called in messages.
        steps: Output tensor -> how it comes about.
        metadata: The output's header metadata.
        passes: How often the inputs of merged tensors are read.
        dropped: Input tensors that do not reach the output, with the reason.
        repaired: Output tensors that differ from what plain copying would give, with the reason.
        warnings: Sentences that the user should see.
        rules: Dial rule -> number of tensors it decided.
    """

    name: str
    steps: dict[str, Step]
    metadata: dict[str, str] = field(default_factory=dict)
    passes: int = 1
    dropped: dict[str, str] = field(default_factory=dict)
    repaired: dict[str, str] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    rules: dict[str, int] = field(default_factory=dict)

    @property
    def specs(self) -> dict[str, Spec]:
        """The output's tensors."""
        return {key: step.spec for key, step in self.steps.items()}

    @property
    def read_bytes(self) -> int:
        """Bytes of all inputs of all steps, read once."""
        return sum(item.spec.nbytes for step in self.steps.values() for item in step.inputs)

    @property
    def write_bytes(self) -> int:
        """Bytes of all output tensors."""
        return sum(step.spec.nbytes for step in self.steps.values())

    def count(self, action: Action) -> int:
        """Number of tensors made by an action."""
        return sum(step.action == action for step in self.steps.values())
