"""What a recipe's result is called when nobody names it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from sdops.verbs._adapter_peek import is_adapter
from sdops.verbs._recipe_check import Checked, CheckedStep
from sdops.verbs._recipe_inputs import FilePath
from sdops.verbs._recipe_text import Scalar, spelled

_ENDINGS = {"ckpt": ".ckpt", "gguf": ".gguf", "diffusers": "", "peft": ".peft"}  # what is no safetensors file
_MADE_OF = {"merge": "models", "convert": "file"}  # these make LoRAs of LoRAs


def derived_name(checked: Checked, settings: Mapping[str, object], inputs: Mapping[str, FilePath]) -> str:
    """The first model that had to be given, the recipe's name, and the parameters that were set.

    Args:
        checked: The recipe.
        settings: Parameters that were set.
        inputs: Input -> file, as far as they were given.
    """
    own = checked.result.arguments.get("output")
    if isinstance(own, str) and not settings:
        return own
    roles = [name for name, one in checked.recipe.inputs.items() if not one.file and name in inputs]
    first = Path(os.fspath(inputs[roles[0]])).name.removesuffix(".safetensors") if roles else ""
    stem = Path(own).stem if isinstance(own, str) else ".".join(filter(None, [first, checked.recipe.name]))
    set_ = [f"{name}{_short(checked.values[name])}" for name in checked.recipe.parameters if name in settings]
    return ".".join([stem, *set_]) + (Path(own).suffix if isinstance(own, str) else _ending(checked, inputs))


def _short(value: Scalar) -> str:
    return "".join(sign if sign.isalnum() or sign in "+-._" else "_" for sign in spelled(value))[:60]


def _ending(checked: Checked, inputs: Mapping[str, FilePath]) -> str:
    """That of the result's container; a conversion to diffusers makes a folder, but of a LoRA a file."""
    last = checked.result
    to = str(last.arguments.get("to")) if last.step.verb == "convert" else ""
    if to == "diffusers" and _is_adapter(checked, last, inputs):
        to = ""
    return _ENDINGS.get(to, ".safetensors")


def _is_adapter(checked: Checked, step: CheckedStep, inputs: Mapping[str, FilePath]) -> bool:
    """Whether a step's result is a LoRA or one of its relatives."""
    key = _MADE_OF.get(step.step.verb)
    if key is None:
        return step.step.verb in ("extract", "resize")
    given = step.arguments[key]
    name = given[0] if isinstance(given, list) else given
    for other in checked.steps:
        if other.id == name:
            return _is_adapter(checked, other, inputs)
    one = checked.recipe.inputs.get(name)
    return one is not None and is_adapter(inputs.get(name) or (checked.recipe.folder or Path()) / one.file)
