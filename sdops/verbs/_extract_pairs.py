"""Which tensors of a fine-tune belong to which of its base, layer by layer, from headers alone. No torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from math import prod
from typing import Literal

from sdops.archs.detect import Component
from sdops.core.patch import Target
from sdops.core.plan import Input
from sdops.core.spec import FLOATS
from sdops.errors import MismatchError, UsageError
from sdops.layouts.tables import Part, layouts, made_of
from sdops.verbs._inputs import FIRST_LAYERS, Opened

Kind = Literal["linear", "conv", "te", "norm", "bias"]

_KINDS = ("model", "text_encoder")  # what adapters change
# Lookup tables have two dimensions, but are no layers: programs that load adapters do not look for them.
_TABLES = ("token_embedding", "position_embedding", "relative_attention_bias", "shared", "pos_embed")


@dataclass(frozen=True, slots=True)
class Side:
    """One model's tensor of a layer.

    Attributes:
        model: The model.
        parts: What makes it, one below the other.
        index: 0 for the fine-tune, 1 for its base; for messages.
    """

    model: Opened
    parts: tuple[Part, ...]
    index: int

    @property
    def shape(self) -> tuple[int, ...]:
        """Of all parts together."""
        shapes = [_shape(self.model, part) for part in self.parts]
        return (sum(shape[0] for shape in shapes), *shapes[0][1:])

    @property
    def key(self) -> str:
        """The tensor's name in the file, the first if there are several."""
        return self.parts[0].key

    @property
    def nbytes(self) -> int:
        """Bytes to read."""
        size = self.model.source.specs[self.key].nbytes // max(self.model.source.specs[self.key].numel, 1)
        return prod(self.shape) * size

    @property
    def stored_dtype(self) -> str:
        """The dtype in the file, also where the values are seen through a scale."""
        origin = self.model.origin.specs.get(self.key)
        return (origin or self.model.source.specs[self.key]).dtype

    def input(self, part: Part) -> Input:
        """A part as messages name it."""
        return Input(self.model.source, part.key, self.index)


@dataclass(frozen=True, slots=True)
class Pair:
    """A layer's weight, or a vector of it, in both models.

    Attributes:
        target: The layer.
        kind: What it is; `norm` and `bias` are vectors.
        part: `weight` or `bias`.
        tuned, base: Where its values are.
    """

    target: Target
    kind: Kind
    part: str
    tuned: Side
    base: Side

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the tensor."""
        return self.tuned.shape

    @property
    def matrix(self) -> tuple[int, int]:
        """[o, i] or [o, i kh kw]."""
        return self.shape[0], prod(self.shape[1:])

    @property
    def nbytes(self) -> int:
        """Bytes to read of both models."""
        return self.tuned.nbytes + self.base.nbytes


@dataclass(slots=True)
class Pairs:
    """All layers that two models have in common.

    Attributes:
        layers: Weights of two and more dimensions.
        vectors: Norms and biases.
        left_out: Why tensors are left out -> how many.
        warnings: For the user.
    """

    layers: list[Pair] = field(default_factory=list)
    vectors: list[Pair] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)
    warnings: list[str] = field(default_factory=list)


def pairs(tuned: Opened, base: Opened, include: Sequence[str], exclude: Sequence[str]) -> Pairs:
    """Pair the layers of a fine-tune with those of its base, through prefixes and layouts.

    Args:
        tuned: The fine-tune.
        base: What it was made from.
        include: Only layers of which a tensor's name, in the fine-tune's file or in the canonical layout, matches.
        exclude: Not those that match one of these.

    Raises:
        MismatchError: the two share no component, or a tensor has two shapes.
        UsageError: a pattern matches nothing.
    """
    found, chosen = Pairs(), _Filter(include, exclude)
    parts = [part for part in tuned.detection.components if part.kind in _KINDS]
    both = [(part, other) for part in parts if (other := base.detection.component(part.name)) is not None]
    if not both:
        raise MismatchError(
            f"`{tuned.name}` is {tuned.detection.title}, `{base.name}` is {base.detection.title}: nothing in common",
            hint=f"`sdops inspect {tuned.name} {base.name}` shows both",
        )
    for component, other in both:
        ours, theirs = canonical(tuned, component), canonical(base, other)
        found.left_out["only in one of the models"] += len(ours.keys() ^ theirs.keys())
        norms = {key for key, parts in ours.items() if len(_shape(tuned, parts[0])) == 1}
        for key in [key for key in ours if key in theirs]:
            if chosen(key, ours[key][0].key):
                _add(found, component, key, norms, Side(tuned, ours[key], 0), Side(base, theirs[key], 1))
            else:
                found.left_out["not asked for"] += 1
    chosen.check(tuned)
    return found


def canonical(model: Opened, component: Component) -> Mapping[str, tuple[Part, ...]]:
    """Names of a component's tensors in the canonical layout -> what makes them.

    Raises:
        MismatchError: adapters for this component have no names that are known.
    """
    known = layouts(model.detection.family, component.name)
    if not known:
        raise MismatchError(
            f"the layers of the {component.name} of `{model.name}` ({component.title}) have no names in adapters that "
            "are known",
            hint="`sdops inspect` shows what a file holds",
        )
    keys = [key.removeprefix(component.prefix) for key in component.keys]
    if component.layout == known[0]:
        made: Mapping[str, tuple[Part, ...]] = {key: (Part(key),) for key in keys}
    else:
        made = made_of(model.detection.family, component.name, component.layout, known[0], keys)
    return {new: tuple(part._replace(key=component.prefix + part.key) for part in parts) for new, parts in made.items()}


def _add(found: Pairs, component: Component, key: str, norms: Set[str], tuned: Side, base: Side) -> None:
    """Put a tensor of both models where it belongs, or say why it is left out.

    Args:
        found: Grows.
        component: The fine-tune's.
        key: The tensor in the canonical layout.
        norms: Weights of the component that have one dimension.
        tuned, base: Where it is.
    """
    module, _, part = key.rpartition(".")
    part = "weight" if part == "scale" else part  # so Flux calls the weights of its norms
    shape = tuned.shape
    if not all(side.model.source.specs[p.key].dtype in FLOATS for side in (tuned, base) for p in side.parts):
        return  # positions and the like
    if part not in ("weight", "bias"):
        found.left_out["parameters that are no layer"] += 1
    elif len(shape) > 1 and any(name in _TABLES for name in module.split(".")):
        found.left_out["embedding tables"] += 1
    elif shape != base.shape:
        _refuse_shapes(found, tuned, base)
    elif len(shape) == 1:
        is_norm = not norms.isdisjoint((f"{module}.weight", f"{module}.scale"))
        found.vectors.append(Pair(Target(component.name, module), "norm" if is_norm else "bias", part, tuned, base))
    else:
        kind: Kind = "conv" if len(shape) > 2 and prod(shape[2:]) > 1 else "linear"
        kind = "te" if component.kind == "text_encoder" else kind
        found.layers.append(Pair(Target(component.name, module), kind, part, tuned, base))


def _refuse_shapes(found: Pairs, tuned: Side, base: Side) -> None:
    """Other input channels are a variant's (inpainting, edit); every other difference is an error."""
    ours, theirs = tuned.shape, base.shape
    if not tuned.key.endswith(FIRST_LAYERS) or ours[:1] + ours[2:] != theirs[:1] + theirs[2:]:
        raise MismatchError(
            f"`{tuned.key}` is {list(ours)} in `{tuned.model.name}` and {list(theirs)} in `{base.model.name}`",
            hint=f"name the model that `{tuned.model.name}` was made from with `--base`",
            key=tuned.key,
        )
    found.left_out["first layers of different width"] += 1
    found.warnings.append(
        f"`{tuned.key}` has {ours[1]} input channels in `{tuned.model.name}`, {theirs[1]} in `{base.model.name}`: "
        "it is left out; is the base the right one? An inpainting model wants an inpainting base"
    )


class _Filter:
    """Which names the user asked for."""

    def __init__(self, include: Sequence[str], exclude: Sequence[str]) -> None:
        self._include, self._exclude = include, exclude
        self._unused = {("include", pattern) for pattern in include} | {("exclude", pattern) for pattern in exclude}

    def __call__(self, *names: str) -> bool:
        """Whether a tensor that has these names is wanted."""
        included = self._matching("include", self._include, names)
        return not self._matching("exclude", self._exclude, names) and (included or not self._include)

    def check(self, model: Opened) -> None:
        """Raises UsageError if a pattern matched nothing."""
        for option, pattern in sorted(self._unused):
            raise UsageError(
                f"`--{option} '{pattern}'` matches no tensor of `{model.name}`",
                hint="a pattern must cover the whole name: `*attn2*`",
                pattern=pattern,
            )

    def _matching(self, option: str, patterns: Sequence[str], names: Sequence[str]) -> bool:
        matching = {(option, pattern) for pattern in patterns if any(fnmatchcase(name, pattern) for name in names)}
        self._unused -= matching
        return bool(matching)


def _shape(model: Opened, part: Part) -> tuple[int, ...]:
    """A part's shape, after what is done with it."""
    shape = model.source.specs[part.key].shape
    if part.share is not None:
        start, stop, total = part.share
        shape = ((stop - start) * shape[0] // total, *shape[1:])
    if part.operation == "transpose":
        return shape[::-1]
    if part.operation == "linear":
        return shape[:2]
    return (*shape, 1, 1) if part.operation == "conv" else shape
