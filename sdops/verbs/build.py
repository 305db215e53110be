"""Build a recipe: all of its steps in one pass.

sdops.build("recipe.toml")
sdops.build("recipe.toml", set_={"strength": 0.8}, inputs={"model": "mine.safetensors"}, output="out.safetensors")
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from sdops.errors import SdopsError, UsageError
from sdops.report import Progress, Report, silent
from sdops.text import suggest
from sdops.verbs._recipe_check import Checked, check_recipe
from sdops.verbs._recipe_inputs import FilePath, check_hashes, find_inputs
from sdops.verbs._recipe_text import Recipe, read_recipe, read_value


def build(
    recipe: FilePath | Recipe,
    *,
    set_: Mapping[str, object] | None = None,
    inputs: Mapping[str, FilePath] | None = None,
    output: FilePath | None = None,
    root: Sequence[FilePath] = (),
    ignore_hashes: bool = False,
    jobs: int | None = None,
    memory: int | None = None,
    dry_run: bool = False,
    force: bool = False,
    hash_inputs: bool = True,
    progress: Progress = silent,
) -> Report:
    """Build a recipe.

    The steps are composed, not run one after the other: every tensor goes through all of them while it is read, and the
    bytes are those that the same commands would give with a file after each step.

    Args:
        recipe: A TOML file, the name of a preset, or a Recipe.
        set_: Parameter -> value. `--set` on the command line.
        inputs: Input -> file, for those that have to be given or shall be others. `--NAME FILE` on the command line.
        output: Where to write; default: `NAME.safetensors` in this folder, with the parameters that were set.
        root: Folders to look for the recipe's files in, besides its own and this one.
        ignore_hashes: Take inputs that do not hash to what the recipe expects.
        jobs: Threads; default: one per core.
        memory: Bytes to stay below.
        dry_run: Check everything, report what would be done, write nothing.
        force: Replace an existing output.
        hash_inputs: Record the inputs' SHA-256 (remembered between runs).
        progress: Called as `progress(label, total_bytes)`.

    Returns:
        A report: inputs, steps, what was written.

    Raises:
        UsageError: the recipe makes no sense, with the path of what is wrong; an input is missing.
        MismatchError: an input is not the file that the recipe expects, or inputs do not fit each other.
        FormatError: an input is damaged.
        OutputError: an output exists, is an input, or does not fit on the disk.
    """
    from sdops.verbs._recipe_plan import build_recipe, plan_recipe
    from sdops.verbs._recipe_report import build_report

    begin = time.monotonic()
    text = recipe if isinstance(recipe, Recipe) else find_recipe(recipe)
    checked = check_recipe(text, set_)
    used = {name for step in checked.steps for name in step.uses}
    found = find_inputs(text, inputs or {}, root, used=used)
    path = Path(output) if output is not None else Path(derived_name(checked, set_ or {}, inputs or {}))
    planned = plan_recipe(checked, found, path.parent if output is not None else Path())
    try:
        if not ignore_hashes:
            check_hashes(found.values(), progress)
        running = {
            "jobs": jobs,
            "memory": memory,
            "force": force,
            "hash_inputs": hash_inputs and text.hash_inputs,
            "dry_run": dry_run,
            "progress": progress,
        }
        done, asked = build_recipe(planned, path, running)
        return build_report(planned, path, done, asked, time.monotonic() - begin, dry_run=dry_run)
    finally:
        planned.close()


def find_recipe(name: FilePath) -> Recipe:
    """A recipe by its file, or a preset by its name.

    Raises:
        SdopsError: there is neither.
        UsageError: it is no recipe.
    """
    from sdops.presets import is_preset_file

    path = recipe_file(name)
    found = read_recipe(path)
    return replace(found, folder=None) if is_preset_file(path) else found


def recipe_file(name: FilePath) -> Path:
    """Where a recipe lies: a file that there is, or the preset of that name.

    Raises:
        SdopsError: there is neither; a similar preset is suggested.
    """
    from sdops.presets import names, preset_file

    path = Path(os.fspath(name))
    word = os.fspath(name).lower().replace("_", "-")
    if word in names() and not path.is_file():
        return preset_file(word)
    if path.exists() or path.suffix == ".toml":
        return path
    close = suggest(word, names())
    raise SdopsError(
        f"there is neither a recipe file nor a preset `{name}`",
        hint=f"did you mean `{close}`?" if close else "`sdops presets` lists the presets",
        recipe=str(name),
    )


def read_settings(recipe: FilePath | Recipe, words: Sequence[str]) -> dict[str, object]:
    """`NAME=VALUE` texts as values of the parameters' types.

    Raises:
        UsageError: a text has no `=`, or its value is of another type than the parameter.
    """
    text = recipe if isinstance(recipe, Recipe) else find_recipe(recipe)
    settings: dict[str, object] = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not equals:
            raise UsageError(f"`--set {word}` sets nothing", hint="`--set NAME=VALUE`")
        name = name.strip().replace("-", "_")
        one = text.parameters.get(name)
        settings[name] = value if one is None else read_value(one, value)
    return settings


def derived_name(checked: Checked, settings: Mapping[str, object], inputs: Mapping[str, FilePath]) -> str:
    """What the result is called when nobody names it: the first model that had to be given, the recipe's name, and the
    parameters that were set.
    """
    own = checked.result.arguments.get("output")
    if isinstance(own, str) and not settings:
        return own
    roles = [name for name, one in checked.recipe.inputs.items() if not one.file and name in inputs]
    first = Path(os.fspath(inputs[roles[0]])).name.removesuffix(".safetensors") if roles else ""
    stem = Path(own).stem if isinstance(own, str) else ".".join(filter(None, [first, checked.recipe.name]))
    set_ = [f"{name}{_short(checked.values[name])}" for name in checked.recipe.parameters if name in settings]
    return ".".join([stem, *set_]) + ".safetensors"


def _short(value: object) -> str:
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return "".join(sign if sign.isalnum() or sign in "+-._" else "_" for sign in text)[:60]
