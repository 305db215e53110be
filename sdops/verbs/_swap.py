"""Take a component of the result, such as the VAE, from another file; add it if the result lacks it."""

from __future__ import annotations

from collections.abc import Sequence

from sdops.archs.detect import Component
from sdops.archs.junk import is_position_ids
from sdops.core.plan import Action, Input, Plan, Step
from sdops.core.spec import Spec
from sdops.errors import MismatchError
from sdops.text import count
from sdops.verbs._inputs import Opened, places_beside
from sdops.verbs._pairing import Policy


def swap(plan: Plan, first: Opened, donor: Opened, kind: str, policy: Policy) -> None:
    """Replace the steps of all components of a kind by copies from `donor`, in its dtype unless one was asked for.

    Position ids stay as the plan has them. Of several text encoders those that the donor has are replaced. What the
    first model lacks and files of its family may hold is added.

    Args:
        plan: Changed in place.
        first: The model that the result is shaped after.
        donor: Has the component under the first model's names.
        kind: "vae" or "text_encoder".
        policy: For the output's dtype.

    Raises:
        MismatchError: one of the two has no such component, or they differ.
    """
    words = kind.replace("_", " ")
    components = [component for component in first.detection.components if component.kind == kind]
    added = _added(donor, first, kind)
    offered = [component for component in components if any(key in donor.source.specs for key in component.keys)]
    if not components and not added:
        raise MismatchError(
            f"`{first.name}` has no {words} that `{donor.name}` could replace, nor a known place for one",
            hint=f"`sdops inspect {first.name} {donor.name}` shows their components",
        )
    if not offered and not added:
        raise MismatchError(
            f"`{donor.name}` has no {words} like that of `{first.name}`",
            hint=f"`sdops inspect {donor.name}` shows its components",
        )
    for component in added:
        for key in component.keys:
            plan.dropped.pop(key, None)
            plan.steps[key] = _taken(donor, key, None, policy)
    for component in offered:
        keys = [key for key in component.keys if key in plan.steps and not is_position_ids(key)]
        _check(plan, keys, first, donor, words)
        for key in keys:
            plan.steps[key] = _taken(donor, key, plan.steps[key], policy)
    for component in components:
        if component not in offered:
            plan.warnings.append(f"`{donor.name}` has no {component.name}: the merged one stays")
    _note_extra(plan, donor, kind)


def _check(plan: Plan, keys: Sequence[str], first: Opened, donor: Opened, words: str) -> None:
    """Refuse a component that is not shaped like the first model's."""
    specs = donor.source.specs
    different = [key for key in keys if key not in specs or specs[key].shape != plan.steps[key].spec.shape]
    if different:
        raise MismatchError(
            f"the {words} of `{donor.name}` differs from that of `{first.name}` in "
            f"{count(len(different), 'tensor')}, the first is `{different[0]}`",
            hint=f"`sdops inspect {donor.name} {first.name}` shows both",
            keys=different,
        )


def _added(donor: Opened, first: Opened, kind: str) -> list[Component]:
    """The donor's components of the kind that the first model lacks, where they lie as in files of its family."""
    own = {component.name for component in first.detection.components}
    places = places_beside(first)
    return [
        component
        for component in donor.detection.components
        if component.kind == kind
        and component.name not in own
        and (component.layout, component.prefix) == places.get(component.name)
    ]


def _taken(donor: Opened, key: str, planned: Step | None, policy: Policy) -> Step:
    """One tensor from the donor."""
    spec = donor.source.specs[key]
    if spec.is_float:
        quantised = "BF16" if planned is None else planned.spec.dtype  # fp8 is presented as float32
        kept = quantised if donor.detection.quantised else spec.dtype
        spec = Spec(policy.dtype or kept, spec.shape)
    action: Action = "copy" if spec == donor.source.specs[key] else "cast"
    return Step(spec, action, (Input(donor.source, key, -1),), reason=f"from `{donor.name}`")


def _note_extra(plan: Plan, donor: Opened, kind: str) -> None:
    """Mention what the donor's component has and the first model's has not."""
    for component in donor.detection.components:
        for key in component.keys if component.kind == kind else ():
            if key not in plan.steps and not is_position_ids(key):
                plan.dropped[key] = f"only in `{donor.name}`"
