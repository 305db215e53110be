"""Whether a recipe makes sense, before any file is looked at: verbs, keys, types, ranges, names, circles.

Everything here comes from texts: the recipe's, and those of verbs and merge methods (`_verb_card`, `card`). What is
wrong is told by its path, with the word that was meant. No torch, no numpy, no import of a verb.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from pathlib import PurePosixPath
from typing import Any

from sdops.card import Card, Knob, find, method_name, names
from sdops.errors import UsageError
from sdops.text import suggest
from sdops.verbs._merge_adapters_wish import METHODS
from sdops.verbs._merge_request import check_count
from sdops.verbs._recipe_check_embed import check_embed
from sdops.verbs._recipe_check_value import WORDS, check_value
from sdops.verbs._recipe_text import Recipe, Scalar, Step, checked_value, shown, wrong
from sdops.verbs._recipe_values import check_values
from sdops.verbs._verb_card import RUNNING, VERBS, VerbParameter, lora_merge_card, verb_card

MARK = re.compile(r"\$([a-z][a-z0-9_]*)")
MOST_RECORDS = 5000
_DEFAULT_METHOD = "weighted-sum"


@dataclass(frozen=True, slots=True)
class CheckedStep:
    """A step that can be planned.

    Attributes:
        step: As it was written.
        arguments: With the parameters' values in place; files still by name.
        uses: The inputs and steps that it reads, as often as it names them.
    """

    step: Step
    arguments: Mapping[str, Any]
    uses: tuple[str, ...]

    @property
    def id(self) -> str:
        """How others call it."""
        return self.step.id


@dataclass(frozen=True, slots=True)
class Checked:
    """A recipe that makes sense as far as its text goes.

    Attributes:
        recipe: As it was written.
        values: Of all parameters.
        steps: In an order in which every step comes after what it uses.
        warnings: One sentence each.
    """

    recipe: Recipe
    values: Mapping[str, Scalar]
    steps: tuple[CheckedStep, ...]
    warnings: tuple[str, ...] = ()

    @property
    def result(self) -> CheckedStep:
        """The step whose output is the recipe's: the one that is written last."""
        return next(step for step in self.steps if step.id == self.recipe.steps[-1].id)


def check_recipe(recipe: Recipe, settings: Mapping[str, object] | None = None) -> Checked:
    """Check all of a recipe.

    Args:
        recipe: Any.
        settings: Parameter -> value, where it is not the default.

    Raises:
        UsageError: with the path of what is wrong.
    """
    values = parameter_values(recipe, settings or {})
    found = [_check_step(recipe, step, values) for step in recipe.steps]
    _check_outputs(found)
    ordered = _ordered(found)
    _check_record(ordered)
    wanted = _needed(found)
    for step in found:
        if step.id not in wanted:
            raise wrong(
                step.step.path,
                f"nothing uses `{step.id}`",
                f"name `{step.id}` in a later step, or give it an `output`; the last step is the result",
            )
    return Checked(recipe, values, tuple(ordered), tuple(_idle(recipe, found)))


def parameter_values(recipe: Recipe, settings: Mapping[str, object]) -> dict[str, Scalar]:
    """The values of all parameters.

    Raises:
        UsageError: there is no such parameter, or a value does not fit.
    """
    for name in settings:
        if name not in recipe.parameters:
            close = suggest(name, recipe.parameters)
            known = ", ".join(recipe.parameters) or "none"
            hint = f"did you mean `--set {close}=...`?" if close else f"its parameters: {known}"
            raise UsageError(f"`{recipe.name}` has no parameter `{name}`", hint=hint, parameter=name)
    return {
        name: checked_value(one, settings.get(name, one.default), f"parameters.{name}")
        for name, one in recipe.parameters.items()
    }


# ------------------------------------------------------------------------------------------------------------ one step


def _check_step(recipe: Recipe, step: Step, values: Mapping[str, Scalar]) -> CheckedStep:
    if step.verb not in VERBS:
        raise _unknown_verb(step)
    files = [*recipe.inputs, *(each.id for each in recipe.steps)]
    arguments = {key: _filled(value, values, files, f"{step.path}.{key}", key) for key, value in step.arguments.items()}
    allowed, card = _allowed(step, arguments)
    uses: list[str] = []
    for key, value in arguments.items():
        path = f"{step.path}.{key}"
        if key not in allowed:
            raise _unknown_key(step, key, allowed)
        for file, place in check_value(allowed[key], value, path):
            if file not in files:
                raise _unknown_file(recipe, file, place, files)
            uses.append(file)
    for key, parameter in allowed.items():
        if isinstance(parameter, VerbParameter) and parameter.required and key not in arguments:
            raise wrong(step.path, f"`{step.verb}` needs `{key}`", f"`{key}`: {WORDS[parameter.kind]}")
    if step.verb == "embed make":
        uses += _files_of_formula(arguments["formula"], files, f"{step.path}.formula")
    check_embed(recipe, step, arguments, uses)
    if card is not None and "method" in arguments:
        _check_models(card, step, arguments)
    check_values(step, arguments)
    return CheckedStep(step, arguments, tuple(uses))


def _unknown_verb(step: Step) -> UsageError:
    path = f"{step.path}.verb"
    if step.verb.partition(" ")[0] == "train":
        return wrong(path, "recipes do not train", "`sdops train` first, and name its result under `[inputs]`")
    close = suggest(step.verb, VERBS)
    hint = f"did you mean `{close}`?" if close else f"there are {', '.join(VERBS)}"
    return wrong(path, f"there is no verb `{step.verb}`", hint)


def _filled(value: Any, values: Mapping[str, Scalar], files: Sequence[str], path: str, key: str) -> Any:
    """A value with parameters in place of `$name`; a text that is nothing else becomes the parameter's value."""
    if isinstance(value, list):
        return [_filled(item, values, files, f"{path}.{number}", key) for number, item in enumerate(value, start=1)]
    if isinstance(value, dict):
        return {name: _filled(item, values, files, f"{path}.{name}", key) for name, item in value.items()}
    if not isinstance(value, str):
        return value
    for mark in MARK.finditer(value):
        if mark[1] not in values and not (key == "formula" and mark[1] in files):
            close = suggest(mark[1], values)
            hint = f"did you mean `${close}`?" if close else f"declare it: `[parameters]`, `{mark[1]} = 0.5`"
            raise wrong(path, f"there is no parameter `${mark[1]}`", hint)
    if whole := MARK.fullmatch(value):
        return values.get(whole[1], value)
    return MARK.sub(lambda mark: _spelled(values[mark[1]]) if mark[1] in values else mark[0], value)


def _spelled(value: Scalar) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _allowed(step: Step, arguments: Mapping[str, Any]) -> tuple[dict[str, VerbParameter | Knob], Card | None]:
    """What the step may say; of merges also its method's knobs and what is for LoRAs."""
    card = verb_card(step.verb)
    allowed: dict[str, VerbParameter | Knob] = dict(card.parameters)
    if not card.knobs:
        return allowed, None
    method = arguments.get("method", _DEFAULT_METHOD)
    if not isinstance(method, str):
        raise wrong(f"{step.path}.method", f"`{method}` is no merge method", "`sdops methods` lists them")
    loras: dict[str, VerbParameter | Knob] = dict(lora_merge_card().parameters)
    del loras["files"]
    if method in METHODS and method_name(method) not in names():
        return loras | {"models": card.parameters["models"]}, None
    try:
        found = find(method)
    except UsageError as error:
        raise wrong(f"{step.path}.method", error.message, error.hint) from None
    return loras | allowed | {knob.name: knob for knob in found.knobs}, found


def _unknown_key(step: Step, key: str, allowed: Mapping[str, object]) -> UsageError:
    if key in RUNNING:
        return wrong(f"{step.path}.{key}", "is said when the recipe is built", "`sdops build --help`")
    close = suggest(key, allowed)
    method = f" with `{step.arguments['method']}`" if "method" in step.arguments else ""
    hint = f"did you mean `{close}`?" if close else f"there are {', '.join(allowed)}"
    return wrong(f"{step.path}.{key}", f"`{step.verb}`{method} has no `{shown(key)}`", hint)


def _unknown_file(recipe: Recipe, file: str, path: str, files: Sequence[str]) -> UsageError:
    close = suggest(file, files)
    if close:
        return wrong(path, f"there is no input or step `{file}`", f"did you mean `{close}`?")
    looks = "." in file or "/" in file
    example = f'`[inputs]`, `model = "{file}"`, then `"model"` here' if looks else f'`[inputs]`, `{file} = "FILE"`'
    known = f"; there are {', '.join(recipe.inputs)}" if recipe.inputs and not looks else ""
    return wrong(path, f"there is no input or step `{file}`", f"declare it: {example}{known}")


def _check_models(card: Card, step: Step, arguments: Mapping[str, Any]) -> None:
    models = arguments.get("models", ())
    try:
        check_count(card, len(models), "base" in arguments)
    except UsageError as error:
        option = error.data["option"]
        hint = "name it: `base = ...`" if option == "base" and card.base else error.hint
        raise wrong(f"{step.path}.{option}", error.message, hint) from None


_FORMULA_FILE = re.compile(r"\.(pt|bin|safetensors|png|webp|pti|ckpt)\b", re.IGNORECASE)


def _files_of_formula(formula: str, files: Sequence[str], path: str) -> list[str]:
    """The inputs and steps in a formula, where they are written as `$name`."""
    if _FORMULA_FILE.search(formula):
        raise wrong(path, "names a file", "declare it under `[inputs]` and write `$name` in the formula")
    return [mark[1] for mark in MARK.finditer(formula) if mark[1] in files]


# ----------------------------------------------------------------------------------------------------------- all steps


def _ordered(steps: Sequence[CheckedStep]) -> list[CheckedStep]:
    """Steps after what they use, else as written.

    Raises:
        UsageError: there is a circle.
    """
    known = {step.id: step for step in steps}
    try:
        TopologicalSorter({step.id: [name for name in step.uses if name in known] for step in steps}).prepare()
    except CycleError as error:
        circle = list(reversed(error.args[1]))
        text = "` uses `".join(circle)
        raise wrong(known[circle[0]].step.path, f"`{text}`: a circle", "let one of them use an input instead") from None
    done: dict[str, CheckedStep] = {}
    while len(done) < len(steps):
        for step in steps:
            if step.id not in done and all(name in done for name in step.uses if name in known):
                done[step.id] = step
    return list(done.values())


def _check_record(ordered: Sequence[CheckedStep]) -> None:
    """Refuse recipes whose record in the result's header would be endless: it holds a step as often as it is used.

    Raises:
        UsageError: naming the step where it becomes too long.
    """
    sizes: dict[str, int] = {}
    for step in ordered:
        sizes[step.id] = 1 + sum(sizes.get(name, 1) for name in step.uses)
        if sizes[step.id] > MOST_RECORDS:
            hint = "give one of the steps that several others use an `output`, and build in two recipes"
            raise wrong(step.step.path, f"steps use each other {MOST_RECORDS:,} times over", hint)


def _check_outputs(steps: Sequence[CheckedStep]) -> None:
    """Refuse two steps that write one file.

    Raises:
        UsageError: naming the later one.
    """
    seen: dict[PurePosixPath, str] = {}
    for step in steps:
        if isinstance(output := step.arguments.get("output"), str):
            other = seen.setdefault(PurePosixPath(output), step.step.path)
            if other != step.step.path:
                raise wrong(f"{step.step.path}.output", f"`{output}` is written by `{other}` already", "rename one")


def _needed(steps: Sequence[CheckedStep]) -> set[str]:
    """The steps that the result, or an output that is asked for, depends on."""
    known = {step.id: step for step in steps}
    todo = [steps[-1].id, *(step.id for step in steps if "output" in step.arguments)]
    found: set[str] = set()
    while todo:
        name = todo.pop()
        if name in known and name not in found:
            found.add(name)
            todo += known[name].uses
    return found


def _idle(recipe: Recipe, steps: Sequence[CheckedStep]) -> Iterator[str]:
    """Declarations that nothing uses."""
    used = {name for step in steps for name in step.uses}
    yield from (f"`inputs.{name}` is used by no step" for name in recipe.inputs if name not in used)
    written = "\n".join(str(step.arguments) for step in recipe.steps)
    marks = {mark[1] for mark in MARK.finditer(written)}
    yield from (f"`parameters.{name}` is used by no step" for name in recipe.parameters if name not in marks)
