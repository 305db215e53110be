"""Decide tensor by tensor what a merge does with it: merged, copied, repaired or left out, and why."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

from sdops.archs import blocks
from sdops.archs.detect import component_of
from sdops.card import Card
from sdops.core.dial import Dial, Place
from sdops.core.linear import coefficients
from sdops.core.method import Method
from sdops.core.plan import Input, Inputs, Plan, Step
from sdops.core.spec import FP8, INTEGERS, Spec
from sdops.errors import MismatchError, UsageError
from sdops.text import count
from sdops.verbs._inputs import Opened
from sdops.verbs._values import values

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


class Knobs(NamedTuple):
    """The knobs of some tensors.

    Attributes:
        values: For the method.
        only: The model that is all of the result, if the method is linear and says so.
    """

    values: Mapping[str, Any]
    only: int | None


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
        self.plan = Plan(name)
        self._unknown_patterns()
        self.plan.warnings += [note for model in self.models for note in model.notes]
        self._junk = {key: kind for kind, keys in self.template.detection.junk.items() for key in keys}
        self._markers = frozenset(self.template.detection.markers)
        self._lacking: dict[str, list[str]] = {}
        self._misshapen: list[str] = []
        self._places: list[Place] = []  # of merged tensors, for dials that have rules
        self._knobs: dict[tuple[Any, ...], Knobs] = {}
        self._common: Knobs | None = None  # those of all tensors, where no knob varies
        self._own = self._index(self.template)
        self._sources = tuple(model.source for model in self.models)
        self._varies = any(isinstance(knob, Dial) and (knob.rules or knob.blocks) for knob in self.knobs.values())
        self._merges = False
        for key, spec in self.template.source.specs.items():
            step = self._step(key, spec)
            if step is not None:
                self.plan.steps[key] = step
        for index, model in enumerate(self.models):
            self._extra_tensors(index, model)
        self._complain()
        self._remark()
        for dial in self.knobs.values():
            if isinstance(dial, Dial):
                self.plan.warnings += dial.notes
                for tally in dial.check(self._places):
                    self.plan.rules[f"{dial.knob}: {tally.rule}"] = tally.decided
        return self.plan

    def _step(self, key: str, spec: Spec) -> Step | None:
        """What becomes of one tensor of the template; None if it is left out."""
        if self.policy.prune and key in self._junk:
            self.plan.dropped[key] = f"pruned: {self._junk[key]}"
            return None
        if blocks.is_position_ids(key):
            return self._position_ids(key, self._input(key))
        if why := self._unmerged(key, spec):
            # half precision would spoil a noise schedule
            as_it_is = not spec.is_float or key in self._markers or self._junk.get(key) == "schedule"
            return self._copied(self._input(key), why, spec if as_it_is else None)
        found = [source.specs.get(key) for source in self._sources]
        if found.count(spec) == len(found):
            return self._merged(key, spec)
        if None in found:
            lacking = [m.name for m, s in zip(self.models, found, strict=True) if s is None]
            return self._lacked(key, self._input(key), lacking)
        for model, other in zip(self.models, found, strict=True):
            if other is not None and not other.is_float:
                return self._copied(self._input(key), f"{other.dtype} in `{model.name}`, not merged")
        if any(other is not None and other.shape != spec.shape for other in found):
            self._misshapen.append(key)
            return None
        return self._merged(key, spec)

    def _input(self, key: str) -> Input:
        """A tensor of the template."""
        return Input(self.template.source, key, self._own)

    def _unmerged(self, key: str, spec: Spec) -> str:
        """Why a tensor is copied whatever the other models hold; empty if it is not."""
        if key in self._markers:
            return "says what the model is"
        if not spec.is_float:
            return "not floating point"
        if key in self._junk:
            return f"{self._junk[key]}, not merged"
        return "" if self._selected(key) else "excluded"

    def _merged(self, key: str, spec: Spec) -> Step:
        """Merge a tensor, or copy it if the method's coefficients say that one model is all of it."""
        self._merges = True
        knobs = self._knobs_of(key)
        wanted = _with_dtype(spec, self._dtype(self._own, key, spec))
        if knobs.only is not None:
            item = Input(self._sources[knobs.only], key, knobs.only)
            return self._copied(item, f"all of it from `{item.source.name}`", wanted)
        return Step(wanted, "merge", Inputs(self._sources, key), knobs.values)

    def _knobs_of(self, key: str) -> Knobs:
        """The knobs for a tensor; tensors with equal ones share them."""
        if self._common is not None:
            return self._common
        place = Place("", "", "")
        if self._varies:
            detection = self.template.detection
            place = Place(key, blocks.block_of(detection, key), component_of(detection, key))
            self._places.append(place)
        values = {name: k.resolve(*place) if isinstance(k, Dial) else k for name, k in self.knobs.items()}
        identity = tuple(values.items())
        if identity not in self._knobs:
            exact = coefficients(self.method.function, len(self.models), values) if self.method is not None else ()
            used = [i for i, c in enumerate(exact) if c]
            self._knobs[identity] = Knobs(values, used[0] if len(used) == 1 and exact[used[0]] == 1 else None)
        found = self._knobs[identity]
        if not self._varies:
            self._common = found
        return found

    def _dtype(self, model: int, key: str, spec: Spec) -> str:
        """The output's dtype for a tensor that is like that of a model."""
        if self.policy.dtype and spec.is_float:
            return self.policy.dtype
        # fp8 weights are presented as float32; bfloat16 holds their range
        return "BF16" if self._was_fp8(model, key) else spec.dtype

    def _was_fp8(self, model: int, key: str) -> bool:
        original = self.models[model].origin.specs.get(key)
        return original is not None and original.dtype in FP8

    def _copied(self, item: Input, reason: str, wanted: Spec | None = None) -> Step:
        """Copy a tensor, in the output's dtype."""
        wanted = wanted or _with_dtype(item.spec, self._dtype(item.model, item.key, item.spec))
        return Step(wanted, "copy" if wanted == item.spec else "cast", (item,), reason=reason)

    def _lacked(self, key: str, own: Input, lacking: list[str]) -> Step | None:
        """A tensor that some model does not have. Whole components may be missing, single tensors not."""
        component = component_of(self.template.detection, key)
        absent = [m for m in self.models if m.name in lacking]
        whole = component and all(component not in {c.name for c in m.detection.components} for m in absent)
        if self.policy.missing == "drop":
            self.plan.dropped[key] = f"missing in {', '.join(f'`{n}`' for n in lacking)}"
            return None
        if all(key in m.placeless for m in absent):
            return self._copied(own, absent[0].placeless[key])
        if self.policy.missing == "error" and not whole:
            for name in lacking:
                self._lacking.setdefault(name, []).append(key)
            return None
        return self._copied(own, f"missing in {', '.join(f'`{n}`' for n in lacking)}")

    def _extra_tensors(self, index: int, model: Opened) -> None:
        """Tensors that only other models have. Whole components and ballast are left out without complaint."""
        junk = {key for keys in model.detection.junk.values() for key in keys}
        components = {c.name for c in self.template.detection.components}
        for key, spec in model.source.specs.items():
            if key in self.template.source.specs or key in self.plan.steps:
                continue
            needless = key in junk or key in model.detection.markers
            other = component_of(model.detection, key) not in components or not spec.is_float
            if self.policy.missing == "keep" and not needless:
                self.plan.steps[key] = self._copied(Input(model.source, key, index), f"only in `{model.name}`")
            elif self.policy.missing == "error" and not needless and not other and key not in model.placeless:
                self._lacking.setdefault(self.template.name, []).append(key)
            else:
                self.plan.dropped[key] = model.placeless.get(key, f"only in `{model.name}`")

    def _remark(self) -> None:
        """Warn of what a user may not expect."""
        for model in self.models:
            markers = [key for key in model.detection.markers if key in model.source.specs]
            if lost := [key for key in markers if key not in self._markers]:
                self.plan.warnings.append(
                    f"`{model.name}` says what it is by `{lost[0]}`, which `{self.template.name}` lacks: "
                    "the models may predict different things, and the result does not say so"
                )
        packed = sum(key in self.template.source.specs for key in self.template.detection.quantised)
        if packed and not self.policy.dtype:
            self.plan.warnings.append(
                f"`{self.template.name}` holds {count(packed, 'fp8 tensor')}, the result holds them as bf16"
            )
        if not self._merges:
            self.plan.warnings.append(f"nothing is merged: the result is a copy of `{self.template.name}`")

    def _position_ids(self, key: str, own: Input) -> Step:
        """Copy CLIP's position ids; put them right where an earlier merge has broken them.

        They are read here, 616 bytes: a dry run shall tell whether they are broken.
        """
        spec = own.spec
        if spec.numel != POSITIONS:
            return Step(spec, "copy", (own,), reason="not floating point")
        right = values(own.source, key) == list(range(POSITIONS))
        if right and spec.dtype in INTEGERS:
            return Step(spec, "copy", (own,), reason="position ids")
        why = f"stored as {spec.dtype}" if right or spec.dtype not in INTEGERS else "broken by an earlier merge"
        self.plan.repaired[key] = f"position ids {why}: written as 0..{POSITIONS - 1}"
        numbers = b"".join(i.to_bytes(8, "little") for i in range(POSITIONS))
        return Step(Spec("I64", spec.shape), "value", value=numbers, reason="repaired")

    def _selected(self, key: str) -> bool:
        include, exclude = self.policy.include, self.policy.exclude
        if include and not any(fnmatchcase(key, p) for p in include):
            return False
        return not (exclude and any(fnmatchcase(key, p) for p in exclude))

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
            names = " ".join(m.name for m in self.models)
            raise MismatchError(
                f"{self._titles()}{count(len(self._misshapen), 'tensor')} of different shape, "
                f"the first is `{key}`: {shapes}",
                hint=f"`--exclude '{key}'` copies the first model's; `sdops inspect {names}` shows what they are",
                keys=self._misshapen,
            )
        for name, keys in self._lacking.items():
            raise MismatchError(
                f"{self._titles()}`{name}` lacks {count(len(keys), 'tensor')} that another model has, "
                f"the first is `{keys[0]}`",
                hint="`--missing keep` copies them from the model that has them, `--missing drop` leaves them out; "
                "`sdops inspect` shows what a model lacks",
                model=name,
                keys=keys,
            )

    def _titles(self) -> str:
        """What the models are, if they are of several families."""
        titles = {model.detection.title: model.name for model in reversed(self.models)}
        if len(titles) < 2:
            return ""
        return ", ".join(f"`{name}` is {title}" for title, name in reversed(titles.items())) + ": "

    def _index(self, model: Opened) -> int:
        return next(i for i, m in enumerate(self.models) if m is model)


def _with_dtype(spec: Spec, dtype: str) -> Spec:
    """A tensor of another dtype; the same object if it has that."""
    return spec if spec.dtype == dtype else Spec(dtype, spec.shape)
