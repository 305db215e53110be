"""What verbs check of values alone: ranks, dtypes, forms. Asked of them before any file is looked for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from sdops.errors import UsageError
from sdops.text import suggest
from sdops.verbs._recipe_text import Step
from sdops.verbs._recipe_told import told

_RANKS = ("rank", "conv_rank", "te_rank", "energy", "frobenius", "ratio", "absolute", "quantile", "budget", "max_rank")


def check_values(step: Step, arguments: Mapping[str, Any]) -> None:
    """Let the step's verb refuse values that it never takes.

    Args:
        step: A step whose keys and types have been checked.
        arguments: Its arguments with the parameters' values in place.

    Raises:
        UsageError: with the path of the key.
    """
    if check := _CHECKS.get(step.verb):
        with told(step, arguments):
            check(arguments)


def _ranks(arguments: Mapping[str, Any]) -> None:
    from sdops.verbs._rank_rules import checked

    checked(**{name: arguments[name] for name in _RANKS if name in arguments})


def _conversion(arguments: Mapping[str, Any]) -> None:
    """Of a checkpoint or of a LoRA: which of them is known when the file is opened."""
    from sdops.dialects import ORDER
    from sdops.verbs._convert_wish import TARGETS, check, parse_dtypes

    to = arguments.get("to", "safetensors")
    if to not in (*TARGETS, *ORDER):
        close = suggest(to, (*TARGETS, *ORDER))
        hint = f"did you mean `{close}`?" if close else f"choose one of {', '.join((*TARGETS, *ORDER))}"
        raise UsageError(f"cannot be `{to}`", hint=hint, option="to")
    if to in TARGETS:
        check(to, arguments.get("ema", "keep"), arguments.get("shard"))
        try:
            parse_dtypes(arguments.get("dtype"), to)
        except UsageError as error:
            error.data["option"] = "dtype"
            raise


_CHECKS: Mapping[str, Callable[[Mapping[str, Any]], None]] = {
    "extract": _ranks,
    "resize": _ranks,
    "convert": _conversion,
}
