"""What will be written and how each tensor comes about, known from headers alone. No torch, no numpy.

A Plan holds one Step per output tensor. It can be shown (`--dry-run`), and run: core.merged turns it into a Source.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, MutableMapping, Sequence
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

    __slots__ = ("key", "sources")

    def __init__(self, sources: tuple[Source, ...], key: str) -> None:
        self.sources = sources
        self.key = key

    def __iter__(self) -> Iterator[Input]:
        return iter([Input(source, self.key, index) for index, source in enumerate(self.sources)])

    def __getitem__(self, index: Any) -> Any:
        return tuple(self)[index]

    def __len__(self) -> int:
        return len(self.sources)


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


class Steps(MutableMapping[str, Step]):
    """Output tensor -> how it comes about; of steps that differ in nothing but the tensor's name, one is kept.

    Args:
        steps: What is known already.

    Raises:
        ValueError: a step has `Inputs` of another name than the tensor's.
    """

    def __init__(self, steps: Mapping[str, Step]) -> None:
        self._steps: dict[str, Step] = {}
        self._alike: dict[tuple[Any, ...], Step] = {}
        self.update(steps)

    def __setitem__(self, key: str, step: Step) -> None:
        if isinstance(step.inputs, Inputs):
            if step.inputs.key != key:
                raise ValueError(f"`{key}` would be made of tensors named `{step.inputs.key}`")
            about = id(step.inputs.sources), id(step.knobs), step.spec, step.action, step.value, step.reason
            step = self._alike.setdefault(about, step)
        self._steps[key] = step

    def __getitem__(self, key: str) -> Step:
        step = self._steps[key]
        if isinstance(step.inputs, Inputs) and step.inputs.key != key:
            inputs = Inputs(step.inputs.sources, key)
            return Step(step.spec, step.action, inputs, step.knobs, step.value, step.reason)
        return step

    def __delitem__(self, key: str) -> None:
        del self._steps[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._steps)

    def __len__(self) -> int:
        return len(self._steps)

    def __contains__(self, key: object) -> bool:
        return key in self._steps  # a Mapping would make the step

    @property
    def specs(self) -> dict[str, Spec]:
        """Output tensor -> its dtype and shape."""
        return {key: step.spec for key, step in self._steps.items()}

    @property
    def sources(self) -> Iterable[Source]:
        """What is read, each once."""
        kept = {id(step): step for step in self._steps.values()}.values()
        return {id(item.source): item.source for step in kept for item in step.inputs}.values()

    def keys_of(self, action: Action) -> list[str]:
        """The tensors made by an action."""
        return [key for key, step in self._steps.items() if step.action == action]


@dataclass(slots=True)
class Plan:
    """All steps, and what the reader of a report wants to know about them.

    Attributes:
        name: What the result is called in messages.
        steps: How each output tensor comes about.
        metadata: The output's header metadata.
        passes: How often the inputs of merged tensors are read.
        dropped: Input tensors that do not reach the output, with the reason.
        repaired: Output tensors that differ from what plain copying would give, with the reason.
        warnings: Sentences that the user should see.
        rules: Dial rule -> number of tensors it decided.
    """

    name: str
    steps: Steps = field(default_factory=lambda: Steps({}))
    metadata: dict[str, str] = field(default_factory=dict)
    passes: int = 1
    dropped: dict[str, str] = field(default_factory=dict)
    repaired: dict[str, str] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    rules: dict[str, int] = field(default_factory=dict)

    @property
    def read_bytes(self) -> int:
        """Bytes of all inputs of all steps, read once."""
        return sum(item.spec.nbytes for step in self.steps.values() for item in step.inputs)

    @property
    def write_bytes(self) -> int:
        """Bytes of all output tensors."""
        return sum(spec.nbytes for spec in self.steps.specs.values())

    def count(self, action: Action) -> int:
        """Number of tensors made by an action."""
        return len(self.steps.keys_of(action))
