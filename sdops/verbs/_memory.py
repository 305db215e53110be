"""How much memory a merge takes, and what is left of a budget for whole tensors."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sdops.errors import UsageError
from sdops.text import size

if TYPE_CHECKING:
    from sdops.verbs.merge import Merge

PYTHON = 60 << 20  # the interpreter, numpy and ourselves
TORCH = 260 << 20  # the same with torch
DEFAULT = 1 << 30  # for whole tensors, when nobody says


def fixed_memory(merge: Merge, jobs: int) -> int:
    """Estimate of what a merge takes besides whole tensors."""
    inputs = max((len(step.inputs) for step in merge.plan.steps.values()), default=1)
    if merge.card.execution in ("linear", "gram") or (merge.card.execution == "elementwise" and _compiled()):
        return PYTHON + jobs * (5 + inputs) * (1 << 20)  # three float64 buffers, and one piece per input
    return TORCH + jobs * (8 + 3 * inputs) * (1 << 19)  # float32 pieces and their intermediates


def _compiled() -> bool:
    """Whether elementwise methods run on tapes, without torch."""
    from sdops.core import native

    return native.library() is not None


def whole_tensor_bytes(merge: Merge) -> tuple[int, str]:
    """What the largest tensor needs at once in a whole-tensor method, and its name; zero for all other methods."""
    if merge.card.execution not in ("tensor", "model"):
        return 0, ""
    merged = {key: step for key, step in merge.plan.steps.items() if step.action == "merge"}
    needs = {key: step.spec.numel * 4 * (2 * len(step.inputs) + 3) for key, step in merged.items()}
    largest = max(needs, key=lambda key: needs[key], default="")
    return needs.get(largest, 0), largest


def whole_tensor_memory(merge: Merge, jobs: int = 1) -> int:
    """Bytes that whole tensors may take within the merge's budget.

    Raises:
        UsageError: the budget is too small for the largest tensor.
    """
    if merge.memory is None:
        return DEFAULT
    needed, key = whole_tensor_bytes(merge)
    fixed = fixed_memory(merge, jobs)
    if fixed + needed > merge.memory:
        what = f", `{key}` alone needs {size(needed)} of it" if key else ""
        raise UsageError(
            f"{size(merge.memory)} of memory are not enough: the merge needs about {size(fixed + needed)}{what}",
            hint=f"`--memory {(fixed + needed) // 1_000_000 + 1}MB`, or fewer threads with `--jobs 1`",
        )
    return merge.memory - fixed
