"""One argument of a step: is it of the right type and within the range, and which inputs and steps does it name."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import isfinite
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any

from sdops.card import Knob
from sdops.text import suggest
from sdops.verbs._recipe_text import shown, wrong
from sdops.verbs._verb_card import VerbParameter

WORDS = {
    "text": "a text",
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "texts": "a list of texts",
    "floats": "a list of numbers",
    "ints": "a list of whole numbers",
    "file": "the name of an input or a step",
    "files": "a list of names of inputs and steps",
    "some": "the name of an input or a step, or a list of them",
    "loras": 'a list of LoRAs, e.g. `["style:0.8"]` or `[["style", 0.8]]`',
    "output": "a file name",
}


def check_value(parameter: VerbParameter | Knob, value: Any, path: str) -> Iterator[tuple[str, str]]:
    """Check one argument of a step.

    Args:
        parameter: What the verb or the merge method takes there.
        value: The argument, with the recipe's parameters in place.
        path: Where it stands in the recipe, for errors.

    Yields:
        The inputs and steps that it names, with their paths.

    Raises:
        UsageError: it is of another type or beyond the range, or names a file outside.
    """
    if isinstance(parameter, Knob):
        _check_knob(parameter, value, path)
        return
    kind = parameter.kind
    if kind == "file" or (kind == "some" and isinstance(value, str)):
        yield _a(str, value, kind, path), path
    elif kind == "files" or (kind == "some" and isinstance(value, list)):
        for number, item in enumerate(_a(list, value, kind, path), start=1):
            yield _a(str, item, "file", f"{path}.{number}"), f"{path}.{number}"
    elif kind == "some":
        raise wrong(path, f"`{shown(value)}` is not {WORDS[kind]}")
    elif kind == "loras":
        for number, item in enumerate(_a(list, value, kind, path), start=1):
            yield split_lora(item, f"{path}.{number}")[0], f"{path}.{number}"
    elif kind == "output":
        check_relative(_a(str, value, kind, path), path)
        if not value.isprintable():
            raise wrong(path, f"`{shown(value)}` has characters that are not for file names", "letters, digits, dots")
    else:
        _check_plain(kind, value, path)
        _check_choice(parameter.choices, value, path)


def _a(wanted: type[Any], value: Any, kind: str, path: str) -> Any:
    if not isinstance(value, wanted):
        raise wrong(path, f"`{shown(value)}` is not {WORDS[kind]}")
    return value


def _check_plain(kind: str, value: Any, path: str) -> None:
    """A value of a kind that TOML has, or a list of them."""
    if kind in ("texts", "floats", "ints"):
        for number, item in enumerate(_a(list, value, kind, path), start=1):
            _check_plain(kind.removesuffix("s"), item, f"{path}.{number}")
        return
    kinds: dict[str, tuple[type, ...]] = {"text": (str,), "int": (int,), "float": (int, float), "bool": (bool,)}
    is_number = not isinstance(value, float) or isfinite(value)
    if not isinstance(value, kinds[kind]) or (isinstance(value, bool) and kind != "bool") or not is_number:
        raise wrong(path, f"`{shown(value)}` is not {WORDS[kind]}")


def _check_choice(choices: Sequence[str], value: Any, path: str) -> None:
    if choices and value not in choices:
        close = suggest(str(value), choices)
        hint = f"did you mean `{close}`?" if close else f"choose one of {', '.join(choices)}"
        raise wrong(path, f"cannot be `{shown(value)}`", hint)


def _check_knob(knob: Knob, value: Any, path: str) -> None:
    """A merge method's knob. A float knob may also be a dial: text, table or list of block weights (core.dial)."""
    numbers: list[Any] = []
    if knob.type in ("float", "floats") and isinstance(value, list):
        numbers = value
    elif knob.type == "float" and isinstance(value, dict):
        numbers = list(value.values())
    elif knob.type == "float" and isinstance(value, str):
        return  # read when the model's blocks are known
    else:
        kind = {"str": "text"}.get(knob.type, knob.type)
        _check_plain(kind, value, path)
        numbers = [value] if kind in ("int", "float") else []
    for number in numbers:
        _check_plain("float", number, path)
        if not knob.allows(number):
            raise wrong(path, f"is {number:g}", f"`{knob.name}` goes from {knob.range}: {knob.help}")
    _check_choice(knob.choices, value, path)


def split_lora(item: Any, path: str) -> tuple[str, Any]:
    """The name of a LoRA and its strength: `"style"`, `"style:0.8:te=0.4"` or `["style", 0.8]`.

    Raises:
        UsageError: it is none of these.
    """
    if isinstance(item, str):
        name, _, strength = item.partition(":")
        return name.strip(), strength.strip() or 1.0
    if isinstance(item, list) and len(item) == 2 and isinstance(item[0], str):
        strength = item[1]
        plain = isinstance(strength, int | float | str) and not isinstance(strength, bool)
        if plain or isinstance(strength, list | dict):
            return item[0], strength
    raise wrong(path, f"`{shown(item)}` names no LoRA", '`"style:0.8"` or `["style", 0.8]`')


def check_relative(text: str, path: str) -> None:
    """Refuse paths that lead anywhere but downward.

    Raises:
        UsageError: absolute, with `..` or `~`, or an address.
    """
    windows = PureWindowsPath(text)
    parts = {*PurePosixPath(text).parts, *windows.parts}
    outside = windows.drive or windows.root or text.startswith(("/", "~")) or ".." in parts or "\0" in text
    if outside or not text or "://" in text:
        raise wrong(path, f"`{text}` leads outside", "recipes name files below their own folder, or `hf://` addresses")
