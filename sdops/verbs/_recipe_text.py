"""A recipe as text: read from TOML against a closed schema (`_recipe_toml.py` writes it back).

    name = "mixed"                                          what the result is called
    about = "One sentence"
    [inputs]
    base = "v1-5.safetensors"                               beside the recipe, or in this folder
    tuned = { file = "hf://owner/repo/x.safetensors", sha256 = "..." }
    model = { about = "any fine-tune" }                     a role: `--model FILE` gives it
    [parameters]
    strength = { default = 0.8, range = [0, 1.5], about = "..." }      `--set strength=0.5`
    [[steps]]
    id = "both"                                             how later steps call it
    verb = "merge"
    models = ["base", "tuned"]                              inputs and steps by name
    alpha = "$strength"                                     every other key is a parameter of the verb

A recipe holds no code and no expressions. Whatever is wrong is told with its path: `steps.2.alpha`. No torch, no numpy.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from math import isfinite
from pathlib import Path
from typing import Any

from sdops import standin
from sdops.errors import SdopsError, UsageError
from sdops.hub.reference import parse
from sdops.text import escaped, shorten, suggest

MOST_BYTES = 1_000_000
MOST_STEPS = 100  # a chain of steps is read through so many Sources
MOST_INPUTS = 1000
MOST_LEVELS = 20  # lists and tables within each other
LARGEST = 2**63  # whole numbers are smaller, as TOML has it

_NAME = re.compile(r"[a-z][a-z0-9_]{0,62}")
_SHA256 = re.compile(r"[0-9a-fA-F]{64}")
_TOP = ("format", "name", "about", "notes", "tags", "source", "hash_inputs", "inputs", "parameters", "steps")
_INPUT = ("file", "sha256", "about")
_PARAMETER = ("default", "range", "choices", "about")
# Options of `sdops build` that no input may take the place of.
RESERVED = frozenset(
    {"set", "output", "force", "dry_run", "jobs", "memory", "root", "hash", "no_hash", "html", "json", "quiet"}
    | {"verbose", "color", "progress", "no_progress", "help", "ignore_hashes", "cluster", "stream", "workers"}
)

Scalar = str | int | float | bool


@dataclass(frozen=True, slots=True)
class Input:
    """A file that a recipe reads.

    Attributes:
        name: How steps call it, and the option that gives another file.
        file: A path, `hf://...`, or empty if it has to be given.
        sha256: What it must hash to; empty for anything.
        about: For people.
    """

    name: str
    file: str = ""
    sha256: str = ""
    about: str = ""


@dataclass(frozen=True, slots=True)
class Parameter:
    """A value that `--set` changes; its type is that of the default.

    Attributes:
        name: How steps call it, with `$` before it.
        default: Where it is not set.
        range: The least and the largest number, or empty.
        choices: The values that are allowed, or empty.
        about: For people.
    """

    name: str
    default: Scalar
    range: tuple[float, ...] = ()
    choices: tuple[Scalar, ...] = ()
    about: str = ""


@dataclass(frozen=True, slots=True)
class Step:
    """One call of a verb.

    Attributes:
        id: How others call it.
        verb: The verb's name as typed: `merge`, `embed make`.
        arguments: The verb's parameters as the recipe has them, with names and `$parameters` in them.
        path: Where it stands: `steps.2`.
    """

    id: str
    verb: str
    arguments: Mapping[str, Any]
    path: str


@dataclass(frozen=True, slots=True)
class Recipe:
    """A recipe as it is written. Whether its steps make sense is for `_recipe_check` to say.

    Attributes:
        name: Of the result.
        about, notes, source: For people: one sentence, more of them, where it comes from.
        tags: Words to find it by.
        hash_inputs: Whether the result records its inputs' hashes.
        folder: Where the recipe lies; None for one that came from elsewhere.
    """

    name: str
    inputs: Mapping[str, Input]
    parameters: Mapping[str, Parameter]
    steps: tuple[Step, ...]
    about: str = ""
    notes: str = ""
    source: str = ""
    tags: tuple[str, ...] = ()
    hash_inputs: bool = True
    folder: Path | None = field(default=None, compare=False)


def wrong(path: str, problem: str, hint: str | None = None, **data: Any) -> UsageError:
    """What is raised for everything that is wrong in a recipe, by its path."""
    return UsageError(f"`{shorten(escaped(path), 120)}`: {problem}", hint=hint, path=path, **data)


def read_recipe(path: Path) -> Recipe:
    """A recipe from a TOML file.

    Raises:
        SdopsError: there is no such file.
        UsageError: it is no recipe; the message has the line or the path.
    """
    try:
        is_small = path.stat().st_size <= MOST_BYTES  # nothing large is downloaded to be refused
        data = standin.content(path, MOST_BYTES + 1) if is_small else b"\0"
    except OSError as error:
        raise SdopsError(
            f"`{path}` cannot be read: {(error.strerror or str(error)).lower()}",
            hint="`sdops presets` lists the recipes that come with sdops",
            path=path,
        ) from None
    if len(data) > MOST_BYTES or b"\0" in data:
        raise UsageError(f"`{path}` is no recipe: recipes are small texts", hint=_foreign_hint(path), file=path)
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError:
        raise UsageError(f"`{path}` is no recipe: it is not text", hint=_foreign_hint(path), file=path) from None
    return parse_recipe(text, name=path.stem, folder=path.parent, title=str(path))


def _foreign_hint(path: Path) -> str:
    return f"`sdops recipe from {path}` takes the recipe out of a model, and of what other programs write"


def parse_recipe(text: str, *, name: str, folder: Path | None = None, title: str = "the recipe") -> Recipe:
    """A recipe from its text.

    Args:
        text: TOML.
        name: What it is called if the text does not say.
        folder: Where its relative paths begin.
        title: How messages call the text.

    Raises:
        UsageError: it is no TOML, or no recipe.
    """
    try:
        document = tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # ValueError also for thousands of digits
        hint = "YAML and metadata of other programs are turned into recipes by `sdops recipe from FILE`"
        raise UsageError(f"`{title}` is no TOML: {error}", hint=hint) from None
    return from_document(document, name=name, folder=folder, title=title)


def from_document(document: Mapping[str, Any], *, name: str, folder: Path | None, title: str) -> Recipe:
    """A recipe from the values of its text.

    Raises:
        UsageError: an unknown key, a value of the wrong type, or no step.
    """
    _check_bounds("", document)
    _known("", document, _TOP)
    if document.get("format", 1) != 1:
        raise wrong("format", f"is {document['format']!r}, known is 1", "a newer sdops may know it")
    texts = {key: _text(key, document.get(key, "")) for key in ("about", "notes", "source")}
    steps = document.get("steps", [])
    if not isinstance(steps, list) or not steps or not all(isinstance(step, dict) for step in steps):
        raise UsageError(
            f"`{title}` has no steps", hint='`[[steps]]`, then `verb = "merge"`; `sdops recipe cp` copies an example'
        )
    if len(steps) > MOST_STEPS:
        raise wrong("steps", f"{len(steps)} steps are too many", f"at most {MOST_STEPS}")
    files = _table("inputs", document)
    if len(files) > MOST_INPUTS:
        raise wrong("inputs", f"{len(files):,} inputs are too many", f"at most {MOST_INPUTS:,}")
    inputs = {key: _input(f"inputs.{key}", key, value) for key, value in files.items()}
    parameters = {
        key: _parameter(f"parameters.{key}", key, value) for key, value in _table("parameters", document).items()
    }
    found = tuple(_step(f"steps.{number}", number, step) for number, step in enumerate(steps, start=1))
    _distinct(inputs, found)
    hash_inputs = document.get("hash_inputs", True)
    if not isinstance(hash_inputs, bool):
        raise wrong("hash_inputs", "is neither true nor false")
    own = _text("name", document.get("name", name))
    if not own or re.search(r"[/\\]", own) or not own.isprintable() or own.startswith(".") or len(own.encode()) > 150:
        raise wrong("name", f"`{own}` cannot be part of a file name", "letters, digits, dots, dashes")
    tags = tuple(_text("tags", tag) for tag in _list("tags", document.get("tags", [])))
    return Recipe(own, inputs, parameters, found, **texts, tags=tags, hash_inputs=hash_inputs, folder=folder)


def _check_bounds(path: str, value: object, level: int = 0) -> None:
    """Refuse numbers and nestings that only harm."""
    if level > MOST_LEVELS:
        raise wrong(path, "is nested too deeply", f"at most {MOST_LEVELS} lists or tables within each other")
    if isinstance(value, int) and not -LARGEST <= value < LARGEST:
        raise wrong(path, "is too large a number", "whole numbers have at most 64 bits")
    if isinstance(value, dict | list):
        items = value.items() if isinstance(value, dict) else enumerate(value, start=1)
        for name, item in items:
            _check_bounds(f"{path}.{name}".lstrip("."), item, level + 1)


def _known(path: str, table: Mapping[str, Any], allowed: Iterable[str]) -> None:
    """Refuse keys that nobody reads."""
    allowed = tuple(allowed)
    for key in table:
        if key not in allowed:
            close = suggest(key, allowed)
            where = f"{path}.{key}" if path else key
            hint = f"did you mean `{close}`?" if close else f"known are {', '.join(allowed)}"
            raise wrong(where, "is unknown", hint)


def _table(key: str, document: Mapping[str, Any]) -> Mapping[str, Any]:
    table = document.get(key, {})
    if not isinstance(table, dict):
        raise wrong(key, "is no table", f"write `[{key}]`")
    for name in table:
        if not _NAME.fullmatch(name):
            raise wrong(f"{key}.{name}", "is no name", "small letters, digits and `_`, beginning with a letter")
        if key == "inputs" and name in RESERVED:
            raise wrong(f"{key}.{name}", f"`--{name.replace('_', '-')}` is an option of `sdops build`", "rename it")
    return table


def _text(path: str, value: object) -> str:
    if not isinstance(value, str):
        raise wrong(path, f"is {_kind(value)}, not a text")
    return value


def _list(path: str, value: object) -> list[Any]:
    if not isinstance(value, list):
        raise wrong(path, f"is {_kind(value)}, not a list")
    return value


def _kind(value: object) -> str:
    """A value's type in words."""
    words = {bool: "true or false", int: "a whole number", float: "a number", str: "a text", list: "a list"}
    return words.get(type(value), "a table" if isinstance(value, dict) else "a date")


def shown(value: object) -> str:
    """A value as messages show it: as in TOML, on one line, and never long."""
    return shorten(str(value).lower() if isinstance(value, bool) else escaped(str(value)), 60)


def spelled(value: Scalar) -> str:
    """A parameter's value as people type it: as few digits as tell it from all others."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return short if float(short := f"{value:g}") == value else repr(value)
    return str(value)


def _input(path: str, name: str, value: object) -> Input:
    if isinstance(value, str):
        value = {"file": value}
    if not isinstance(value, dict):
        raise wrong(path, f"is {_kind(value)}", f'`{name} = "FILE"`, or `{name} = {{ about = "..." }}` for a role')
    _known(path, value, _INPUT)
    texts = {key: _text(f"{path}.{key}", text) for key, text in value.items()}
    digest = texts.get("sha256", "")
    if digest and not _SHA256.fullmatch(digest):
        raise wrong(f"{path}.sha256", "is no SHA-256", "64 digits; `sdops hash FILE` tells it")
    if texts.get("file", "").startswith("hf://"):
        try:
            parse(texts["file"])
        except UsageError as error:
            raise wrong(f"{path}.file", error.message, error.hint) from None
    return Input(name, texts.get("file", ""), digest.lower(), texts.get("about", ""))


def _parameter(path: str, name: str, value: object) -> Parameter:
    if not isinstance(value, dict):
        value = {"default": value}
    _known(path, value, _PARAMETER)
    if "default" not in value:
        raise wrong(path, "has no default", f"`{name} = {{ default = 0.5 }}`")
    default = value["default"]
    if not isinstance(default, Scalar):
        raise wrong(f"{path}.default", f"is {_kind(default)}", "a number, a text, true or false")
    span = _list(f"{path}.range", value.get("range", []))
    if span and (isinstance(default, bool | str)):
        raise wrong(f"{path}.range", f"is for numbers, `{name}` is {_kind(default)}", "`choices = [...]` lists values")
    if span and (len(span) != 2 or not all(type(end) in (int, float) for end in span) or not span[0] <= span[1]):
        raise wrong(f"{path}.range", "is not the least and the largest number", "`range = [0, 1]`")
    choices = tuple(_list(f"{path}.choices", value.get("choices", [])))
    for number, one in enumerate(choices, start=1):
        if type(one) is not type(default):
            raise wrong(f"{path}.choices.{number}", f"`{shown(one)}` is {_kind(one)}, the default is {_kind(default)}")
    found = Parameter(name, default, tuple(span), choices, _text(f"{path}.about", value.get("about", "")))
    checked_value(found, default, f"{path}.default")
    return found


def checked_value(parameter: Parameter, value: object, path: str) -> Scalar:
    """A value for a parameter, of its type and in its range. Whole numbers serve where any number does.

    Raises:
        UsageError: it does not fit.
    """
    _check_bounds(path, value)
    kind = type(parameter.default)
    if kind is int and any(isinstance(end, float) for end in parameter.range):
        kind = float
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is not kind or (isinstance(value, float) and not isfinite(value)):
        wanted = _kind(kind())
        hint = f"`{parameter.name}` is {wanted}, e.g. {shown(parameter.default)}"
        raise wrong(path, f"`{shown(value)}` is not {wanted}", hint)
    if parameter.choices and value not in parameter.choices:
        close = suggest(str(value), map(str, parameter.choices))
        hint = f"did you mean `{close}`?" if close else f"choose one of {', '.join(map(str, parameter.choices))}"
        raise wrong(path, f"cannot be `{shown(value)}`", hint)
    if parameter.range and isinstance(value, int | float):
        low, high = parameter.range
        if not low <= value <= high:
            raise wrong(path, f"is {value:g}", f"choose `{parameter.name}` between {low:g} and {high:g}")
    return value


def read_value(parameter: Parameter, text: str) -> Scalar:
    """A parameter's value as people type it.

    Raises:
        UsageError: it is of another type.
    """
    default, text = parameter.default, text.strip()
    path = f"parameters.{parameter.name}"
    if isinstance(default, str):
        return text
    if isinstance(default, bool):
        known = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
        if text.lower() not in known:
            raise wrong(path, f"`{text}` is neither true nor false", f"`--set {parameter.name}=true`")
        return known[text.lower()]
    try:
        return int(text) if re.fullmatch(r"[+-]?\d{1,20}", text) else float(text)
    except ValueError:
        raise wrong(path, f"`{shown(text)}` is no number", f"`--set {parameter.name}={default!r}`") from None


def _step(path: str, number: int, table: Mapping[str, Any]) -> Step:
    if "verb" not in table:
        raise wrong(path, "has no verb", '`verb = "merge"`')
    identity = _text(f"{path}.id", table.get("id", f"step{number}"))
    if not _NAME.fullmatch(identity):
        raise wrong(f"{path}.id", f"`{identity}` is no name", "small letters, digits and `_`, beginning with a letter")
    arguments = {key: value for key, value in table.items() if key not in ("id", "verb")}
    return Step(identity, _text(f"{path}.verb", table["verb"]), arguments, path)


def _distinct(inputs: Mapping[str, Input], steps: Iterable[Step]) -> None:
    """Names are names of one thing."""
    seen = dict.fromkeys(inputs, "an input")
    for step in steps:
        if step.id in seen:
            raise wrong(f"{step.path}.id", f"`{step.id}` is {seen[step.id]} already", "rename one of them")
        seen[step.id] = f"`{step.path}`"
