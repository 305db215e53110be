"""Take a component of the result, such as the VAE, from another file."""

from __future__ import annotations

from sdops.core.plan import Action, Input, Plan, Step
from sdops.core.spec import Spec
from sdops.errors import MismatchError
from sdops.text import count
from sdops.verbs._inputs import Opened
from sdops.verbs._pairing import Policy


def swap(plan: Plan, first: Opened, donor: Opened, kind: str, policy: Policy) -> None:
    """Replace the steps of all components of a kind by copies from `donor`, in its dtype unless one was asked for.

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
    if not components:
        raise MismatchError(
            f"`{first.name}` has no {words} that `{donor.name}` could replace",
            hint=f"`sdops inspect {first.name}` shows its components",
        )
    keys = [key for component in components for key in component.keys if key in plan.steps]
    replaced = [key for key in keys if key in donor.source.specs]
    if not replaced:
        raise MismatchError(
            f"`{donor.name}` has no {words} like that of `{first.name}`",
            hint=f"`sdops inspect {donor.name}` shows its components",
        )
    different = [key for key in replaced if donor.source.specs[key].shape != plan.steps[key].spec.shape]
    lacking = [key for key in keys if key not in donor.source.specs and plan.steps[key].spec.is_float]
    if different or (lacking and len(components) == 1):
        key = (different or lacking)[0]
        raise MismatchError(
            f"the {words} of `{donor.name}` differs from that of `{first.name}` in "
            f"{count(len(different) + len(lacking), 'tensor')}, the first is `{key}`",
            hint=f"`sdops inspect {donor.name} {first.name}` shows both",
        )
    for key in replaced:
        spec = donor.source.specs[key]
        wanted = Spec(policy.dtype or spec.dtype, spec.shape) if spec.is_float else spec
        action: Action = "copy" if wanted == spec else "cast"
        plan.steps[key] = Step(wanted, action, (Input(donor.source, key, -1),), reason=f"from `{donor.name}`")
