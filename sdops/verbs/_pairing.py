"""Decide tensor by tensor what a merge does with it: merged, copied, repaired or left out, and why."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from fractions import Fraction
from typing import Any

from sdops.archs import blocks
from sdops.archs.detect import component_of
from sdops.card import Card
from sdops.core.dial import Dial, Place
from sdops.core.linear import coefficients
from sdops.core.method import Method
from sdops.core.plan import Input, Plan, Step
from sdops.core.source import read
from sdops.core.spec import FP8, INTEGERS, Spec
from sdops.errors import MismatchError, UsageError
from sdops.text import count
from sdops.verbs._inputs import Opened

POSITIONS = 77  # CLIP's context length: position_ids are 0..76


@dataclass(frozen=True)
class Policy:
    """What the user wants besides the method.

    Attributes:
        dtype: Output dtype, or "" for that of the first model, per tensor.
        include: Merge only tensors that match one of these patterns; the first model's others are copied.
        exclude: Copy the first model's tensors that match one of these patterns.
        missing: What to do with tensors that not all models have: error, keep (copy) or drop.
        prune: Leave out EMA weights, schedules and other ballast.
    """

    dtype: str = ""
    include: Sequence[str] = ()
    exclude: Sequence[str] = ()
    missing: str = "error"
    prune: bool = False


@dataclass
class Pairing:
    """Builds the plan of one merge.

    Args:
        models: In the order of the method's parameters.
        template: The model whose tensors, names and dtypes the output takes.
        card: The method.
        method: The same, imported, if it is linear (for coefficients); else None.
        knobs: The method's knobs; dials are resolved per tensor.
        policy: See `Policy`.
    """

    models: Sequence[Opened]
    template: Opened
    card: Card
    method: Method | None
    knobs: Mapping[str, Any]
    policy: Policy
    plan: Plan = field(init=False)

    def build(self, name: str) -> Plan:
        """The plan.

        Raises:
            MismatchError: shapes differ, or tensors are missing where `policy.missing` is "error".
            UsageError: a pattern or dial rule matches nothing.
        """
        self.plan = Plan(name, {}, passes=1)
        self._unknown_patterns()
        self.plan.warnings += [note for model in self.models for note in model.notes]
        self._junk = {key: kind for kind, keys in self.template.detection.junk.items() for key in keys}
        self._lacking: dict[str, list[str]] = {}
        self._misshapen: list[str] = []
        self._places: dict[str, Place] = {}
        self._known: dict[tuple[Any, ...], tuple[Fraction, ...]] = {}
        for key, spec in self.template.source.specs.items():
            step = self._step(key, spec)
            if step is not None:
                self.plan.steps[key] = step
        self._extra_tensors()
        self._complain()
        for dial in self.knobs.values():
            if isinstance(dial, Dial):
                self.plan.warnings += dial.notes
                for tally in dial.check(self._places.values()):
                    self.plan.rules[f"{dial.knob}: {tally.rule}"] = tally.decided
        return self.plan

    def _step(self, key: str, spec: Spec) -> Step | None:
        """What becomes of one tensor of the template; None if it is left out."""
        own = Input(self.template.source, key, self._index(self.template))
        if self.policy.prune and key in self._junk:
            self.plan.dropped[key] = f"pruned: {self._junk[key]}"
            return None
        if blocks.is_position_ids(key):
            return self._position_ids(key, own)
        if not spec.is_float:
            return Step(spec, "copy", (own,), reason="not floating point")
        if key in self._junk:
            return self._copied(own, f"{self._junk[key]}, not merged")
        if not self._selected(key):
            return self._copied(own, "excluded")
        lacking = [m.name for m in self.models if key not in m.source.specs]
        if lacking:
            return self._lacked(key, own, lacking)
        inputs = tuple(Input(m.source, key, i) for i, m in enumerate(self.models))
        if len({item.spec.shape for item in inputs}) > 1:
            self._misshapen.append(key)
            return None
        return self._merged(key, spec, inputs)

    def _merged(self, key: str, spec: Spec, inputs: tuple[Input, ...]) -> Step:
        """Merge a tensor, or copy it if the method's coefficients say that one model is all of it."""
        detection = self.template.detection
        place = Place(key, blocks.block_of(detection, key), component_of(detection, key))
        self._places[key] = place
        knobs = {name: k.resolve(*place) if isinstance(k, Dial) else k for name, k in self.knobs.items()}
        wanted = Spec(self._dtype(spec, inputs), spec.shape)
        if self.method is not None:
            exact = self._coefficients(knobs, len(inputs))
            used = [i for i, c in enumerate(exact) if c]
            if len(used) == 1 and exact[used[0]] == 1:
                return self._copied(inputs[used[0]], f"all of it from `{inputs[used[0]].source.name}`", wanted)
        return Step(wanted, "merge", inputs, knobs)

    def _coefficients(self, knobs: Mapping[str, Any], size: int) -> tuple[Fraction, ...]:
        identity = tuple(sorted(knobs.items()))
        if identity not in self._known and self.method is not None:
            self._known[identity] = coefficients(self.method.function, size, knobs)
        return self._known[identity]

    def _dtype(self, spec: Spec, inputs: Sequence[Input]) -> str:
        if self.policy.dtype:
            return self.policy.dtype
        # the template's fp8 weights are presented as float32; bfloat16 holds their range
        return "BF16" if self.template.dequantised and self._was_fp8(inputs[0].key) else spec.dtype

    def _was_fp8(self, key: str) -> bool:
        original = getattr(self.template.source, "source", None)
        return original is not None and key in original.specs and original.specs[key].dtype in FP8

    def _copied(self, item: Input, reason: str, wanted: Spec | None = None) -> Step:
        """Copy a tensor, in the output's dtype."""
        wanted = wanted or Spec(self.policy.dtype or item.spec.dtype, item.spec.shape)
        return Step(wanted, "copy" if wanted == item.spec else "cast", (item,), reason=reason)

    def _lacked(self, key: str, own: Input, lacking: list[str]) -> Step | None:
        """A tensor that some model does not have. Whole components may be missing, single tensors not."""
        component = component_of(self.template.detection, key)
        absent = [m for m in self.models if m.name in lacking]
        whole = component and all(component not in {c.name for c in m.detection.components} for m in absent)
        if self.policy.missing == "drop":
            self.plan.dropped[key] = f"missing in {', '.join(f'`{n}`' for n in lacking)}"
            return None
        if self.policy.missing == "error" and not whole:
            for name in lacking:
                self._lacking.setdefault(name, []).append(key)
            return None
        return self._copied(own, f"missing in {', '.join(f'`{n}`' for n in lacking)}")

    def _extra_tensors(self) -> None:
        """Tensors that only other models have."""
        for index, model in enumerate(self.models):
            junk = {key for keys in model.detection.junk.values() for key in keys}
            components = {c.name for c in self.template.detection.components}
            for key, spec in model.source.specs.items():
                if key in self.template.source.specs or key in self.plan.steps or blocks.is_position_ids(key):
                    continue
                ballast = key in junk or component_of(model.detection, key) not in components or not spec.is_float
                if self.policy.missing == "keep" and not ballast:
                    self.plan.steps[key] = self._copied(Input(model.source, key, index), f"only in `{model.name}`")
                elif self.policy.missing == "error" and not ballast:
                    self._lacking.setdefault(self.template.name, []).append(key)
                else:
                    self.plan.dropped[key] = f"only in `{model.name}`"

    def _position_ids(self, key: str, own: Input) -> Step:
        """Copy CLIP's position ids; put them right where an earlier merge has broken them.

        They are read here, 616 bytes: a dry run shall tell whether they are broken.
        """
        spec = own.spec
        right = b"".join(i.to_bytes(8, "little") for i in range(POSITIONS))
        if spec.numel != POSITIONS:
            return Step(spec, "copy", (own,), reason="not floating point")
        if spec.dtype == "I64" and bytes(read(own.source, key)) == right:
            return Step(spec, "copy", (own,), reason="position ids")
        if spec.dtype in INTEGERS - {"I64"}:
            return Step(spec, "copy", (own,), reason="position ids")
        why = f"stored as {spec.dtype}" if spec.dtype != "I64" else "broken by an earlier merge"
        self.plan.repaired[key] = f"position ids {why}: written as 0..{POSITIONS - 1}"
        return Step(Spec("I64", (1, POSITIONS)), "value", value=right, reason="repaired")

    def _selected(self, key: str) -> bool:
        if self.policy.include and not any(fnmatchcase(key, p) for p in self.policy.include):
            return False
        return not any(fnmatchcase(key, p) for p in self.policy.exclude)

    def _unknown_patterns(self) -> None:
        for option, patterns in (("include", self.policy.include), ("exclude", self.policy.exclude)):
            for pattern in patterns:
                if not any(fnmatchcase(key, pattern) for key in self.template.source.specs):
                    raise UsageError(
                        f"`--{option} '{pattern}'` matches no tensor of `{self.template.name}`",
                        hint=f"`sdops inspect --keys {self.template.name}` lists the names; `*` stands for any text",
                        pattern=pattern,
                    )

    def _complain(self) -> None:
        """Raise what was collected about shapes and missing tensors."""
        if self._misshapen:
            key = self._misshapen[0]
            shapes = ", ".join(f"`{m.name}` {list(m.source.specs[key].shape)}" for m in self.models)
            raise MismatchError(
                f"{count(len(self._misshapen), 'tensor')} differ in shape, the first is `{key}`: {shapes}",
                hint=f"`--exclude '{key}'` copies the first model's",
                keys=self._misshapen,
            )
        for name, keys in self._lacking.items():
            raise MismatchError(
                f"`{name}` lacks {count(len(keys), 'tensor')} that another model has, the first is `{keys[0]}`",
                hint="`--missing keep` copies them from the model that has them, `--missing drop` leaves them out",
                model=name,
                keys=keys,
            )

    def _index(self, model: Opened) -> int:
        return next(i for i, m in enumerate(self.models) if m is model)
