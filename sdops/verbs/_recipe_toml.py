"""Write a recipe as TOML, which `_recipe_text.parse_recipe` reads back to an equal one."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from sdops.text import escaped
from sdops.verbs._recipe_text import Input, Parameter, Recipe


def to_toml(recipe: Recipe, comment: str = "") -> str:
    """A recipe as TOML, which `parse_recipe` reads back to an equal one.

    Args:
        recipe: Any.
        comment: Lines for the top.
    """
    lines = [f"# {escaped(line)}".rstrip() for line in comment.splitlines()]
    lines += [f"name = {_value(recipe.name)}"]
    texts = {"about": recipe.about, "notes": recipe.notes, "source": recipe.source}
    lines += [f"{key} = {_value(text)}" for key, text in texts.items() if text]
    lines += [f"tags = {_value(list(recipe.tags))}"] if recipe.tags else []
    lines += [] if recipe.hash_inputs else ["hash_inputs = false"]
    lines += ["", "[inputs]", *(f"{one.name} = {_value(_input_table(one))}" for one in recipe.inputs.values())]
    if recipe.parameters:
        lines += ["", "[parameters]"]
        lines += [f"{one.name} = {_value(_parameter_table(one))}" for one in recipe.parameters.values()]
    for step in recipe.steps:
        lines += ["", "[[steps]]", f"id = {_value(step.id)}", f"verb = {_value(step.verb)}"]
        lines += [f"{key} = {_value(value)}" for key, value in step.arguments.items()]
    return "\n".join(lines) + "\n"


def _input_table(one: Input) -> Any:
    found = {"file": one.file, "sha256": one.sha256, "about": one.about}
    found = {key: text for key, text in found.items() if text}
    return found["file"] if found.keys() == {"file"} else found


def _parameter_table(one: Parameter) -> dict[str, Any]:
    found = {"default": one.default, "range": list(one.range), "choices": list(one.choices), "about": one.about}
    return {key: value for key, value in found.items() if key == "default" or value}


def _value(value: Any) -> str:
    """A value in TOML; JSON's strings are TOML's, but for what stands above the first plane."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return escaped(json.dumps(re.sub("[\ud800-\udfff]", "�", value), ensure_ascii=False))
    if isinstance(value, Mapping):
        inside = ", ".join(f"{_key(key)} = {_value(item)}" for key, item in value.items())
        return f"{{ {inside} }}" if inside else "{}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_value, value))}]"
    return repr(value)


def _key(key: str) -> str:
    return key if re.fullmatch(r"[A-Za-z0-9_-]+", key) else _value(key)
