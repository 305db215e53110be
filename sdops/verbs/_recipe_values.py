"""What verbs check of values alone: ranks, dtypes, forms. Asked of them before any file is looked for."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from math import isfinite
from typing import Any

from sdops.errors import UsageError
from sdops.text import instead_of
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
    with told(step, arguments):
        for key in arguments.keys() & _NAMES.keys():
            _NAMES[key](step.verb, arguments[key])
        if check := _CHECKS.get(step.verb):
            check(arguments)


def _device(verb: str, word: str) -> None:
    del verb
    from sdops.core.accel import DEVICES

    _check_known("device", word, DEVICES)


def _architecture(verb: str, word: str) -> None:
    del verb
    from sdops.verbs._adapter_names import ARCHITECTURES

    _check_known("architecture", word, dict.fromkeys(one.family for one in ARCHITECTURES))


def _layout(verb: str, word: str) -> None:
    if verb in ("extract", "resize"):
        from sdops.dialects import ORDER

        _check_known("to", word, ORDER)
    elif verb.startswith("embed "):
        from sdops.verbs._embed_write import check_layout

        check_layout(word)


def _mode(verb: str, word: str) -> None:
    from sdops.verbs._embed_merge import MODES

    if verb == "embed merge":
        _check_known("mode", word, MODES)


def _loras(verb: str, items: Sequence[Any]) -> None:
    """What is a number for any model; blocks are read when the model is known."""
    del verb
    for item in items:
        strength = item[1] if isinstance(item, list) else item.partition(":")[2]
        words = re.findall(r"(?:^|:(?:te|unet)=)\s*([^:,\s]+)\s*(?=:|$)", str(strength))
        for word in [strength] if isinstance(strength, float) else words:
            if _is_no_strength(word):
                raise UsageError(f"`{word}` is no strength", hint='`"style:0.8"` or `["style", 0.8]`', option="lora")


def _is_no_strength(word: object) -> bool:
    try:
        return not isfinite(float(str(word)))
    except ValueError:
        return False  # rules or block weights


def _check_known(key: str, word: str, known: Iterable[str]) -> None:
    if word not in (words := list(known)):
        raise UsageError(f"cannot be `{word}`", hint=instead_of(word, words), option=key)


def _ranks(arguments: Mapping[str, Any]) -> None:
    from sdops.verbs._rank_rules import checked

    checked(**{name: arguments[name] for name in _RANKS if name in arguments})


def _conversion(arguments: Mapping[str, Any]) -> None:
    """Of a checkpoint or of a LoRA: which of them is known when the file is opened."""
    from sdops.dialects import ORDER
    from sdops.verbs._convert_wish import TARGETS, check, parse_dtypes

    to = arguments.get("to", "safetensors")
    _check_known("to", to, (*TARGETS, *ORDER))
    if to in TARGETS:
        check(to, arguments.get("ema", "keep"), arguments.get("shard"))
        try:
            parse_dtypes(arguments.get("dtype"), to)
        except UsageError as error:
            error.data["option"] = "dtype"
            raise


_NAMES: Mapping[str, Callable[[str, Any], None]] = {
    "device": _device,
    "architecture": _architecture,
    "to": _layout,
    "mode": _mode,
    "lora": _loras,
}
_CHECKS: Mapping[str, Callable[[Mapping[str, Any]], None]] = {
    "extract": _ranks,
    "resize": _ranks,
    "convert": _conversion,
}
