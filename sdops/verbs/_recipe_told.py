"""Errors of a verb as errors of a recipe: by the path of the step and its key, with hints that speak of keys."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from sdops.errors import SdopsError, UsageError
from sdops.verbs._recipe_text import Step
from sdops.verbs._verb_card import verb_card


@contextmanager
def told(step: Step, arguments: Mapping[str, Any]) -> Iterator[None]:
    """Let errors say which step, and which of its keys, they come from; hints speak of keys instead of options."""
    try:
        yield
    except SdopsError as error:
        if "path" not in error.data or not str(error.data["path"]).startswith("steps."):
            key = _key_of(error, arguments)
            path = f"{step.path}.{key}" if key else step.path
            error.hint = _as_keys(error.hint, step.verb) if error.hint else None
            message = _without_dashes(error.message, step.verb).removeprefix(f"`{key}`: ")
            error.message = f"`{path}`: {message}"
            error.args = (error.message,)
            error.data["path"] = path
        raise


@contextmanager
def of_recipe(name: object) -> Iterator[None]:
    """Let errors say which of many recipes they come from."""
    try:
        yield
    except SdopsError as error:
        if str(name) not in error.message:
            error.message = f"`{name}`: {error.message}"
            error.args = (error.message,)
        raise


def _key_of(error: SdopsError, arguments: Mapping[str, Any]) -> str:
    """The key that an error speaks of, or an empty text."""
    said = [str(error.data[name]) for name in ("knob", "option") if name in error.data]
    said += re.findall(r"`(?:--)?([a-z_-]+)\b[^`]*`", error.message)[:1] if isinstance(error, UsageError) else []
    keys = [word.replace("-", "_") for word in said]
    return next((key for key in keys if key in arguments), "")


def _without_dashes(message: str, verb: str) -> str:
    """`--conv-rank` as the recipe calls it: `conv_rank`."""
    parameters = verb_card(verb).parameters

    def spelled(found: re.Match[str]) -> str:
        key = found[1].replace("-", "_")
        return f"`{key}`" if key in parameters else found[0]

    return re.sub(r"`--([a-z-]+)`", spelled, message)


def _as_keys(hint: str, verb: str) -> str:
    """`--missing keep` as it stands in a recipe: `missing = "keep"`."""
    parameters = verb_card(verb).parameters

    def spelled(found: re.Match[str]) -> str:
        key, value = found[1].replace("-", "_"), (found[2] or "").strip("'\" ")
        if key not in parameters:
            return found[0]
        kind = parameters[key].kind
        if kind == "bool":
            return f"`{key} = true`"
        if kind in ("text", "texts"):
            return f'`{key} = "{value}"`' if kind == "text" else f'`{key} = ["{value}"]`'
        return f"`{key} = {value}`" if kind in ("int", "float") else f"`{key} = ...`"

    return re.sub(r"`--([a-z-]+)(?: ([^`]*))?`", spelled, hint)
