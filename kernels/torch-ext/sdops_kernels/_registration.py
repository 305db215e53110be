"""Registered torch operators: one definition each, with a kernel for every device and a fake for tracing.

kernel-builder generates `_ops.py`, which gives every build a namespace of its own; without it the namespace is that of
the package.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

try:
    from ._ops import add_op_namespace_prefix
except ImportError:

    def add_op_namespace_prefix(name: str) -> str:
        """The name in the package's own namespace."""
        return f"sdops_kernels::{name}"


def register(name: str, schema: str, function: Callable[..., Any], fake: Callable[..., Any] | None = None) -> None:
    """Define an operator.

    Args:
        name: Without namespace.
        schema: As torch.library wants it; `Tensor(a!)` marks what is written.
        function: Does the work on any device.
        fake: Shapes and dtypes of the results; None for operators that only write into their arguments.
    """
    qualified = add_op_namespace_prefix(name)
    exact = getattr(torch.Tag, "needs_exact_strides", None)  # torch from 2.7 on
    torch.library.define(qualified, schema, tags=() if exact is None else (exact,))
    torch.library.impl(qualified, ("CPU", "CUDA"), function)
    torch.library.register_fake(qualified, fake or _nothing)


def _nothing(*_: Any) -> None:
    """What an operator without results gives while it is traced."""


def operator(name: str) -> Any:
    """A registered operator, to be called."""
    namespace, _, own = add_op_namespace_prefix(name).partition("::")
    return getattr(getattr(torch.ops, namespace), own)
