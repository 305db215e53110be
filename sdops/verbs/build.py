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
from typing import TYPE_CHECKING, Any

from sdops import hub
from sdops.errors import OutputError, SdopsError, UsageError
from sdops.report import Progress, Report, silent
from sdops.text import suggest
from sdops.verbs._recipe_check import check_recipe
from sdops.verbs._recipe_inputs import FilePath, check_hashes, find_inputs
from sdops.verbs._recipe_text import Recipe, read_recipe

if TYPE_CHECKING:
    from sdops.verbs._recipe_build import Job


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
    html: FilePath | None = None,
    workers: int | None = None,
    cluster: str | None = None,
    progress: Progress = silent,
) -> Report:
    """Build a recipe, or for every combination of some parameters' values.

    The steps are composed, not run one after the other: every tensor goes through all of them while it is read, and the
    bytes are those that the same commands would give with a file after each step. Of a sweep or a folder, outputs that
    are there already and record the same inputs and parameters are kept: a run that was cut short goes on.

    Args:
        recipe: A TOML file or a folder of them, here or on the Hub, the name of a preset, or a Recipe.
        set_: Parameter -> value, or a list of values, which makes a sweep. `--set` on the command line.
        inputs: Input -> file, for those that have to be given or shall be others. `--NAME FILE` on the command line.
        output: Where to write, of a sweep a folder; default: `NAME.safetensors` in this folder, with the parameters
            that were set.
        root: Folders to look for the recipe's files in, besides its own and this one.
        ignore_hashes: Take inputs that do not hash to what the recipe expects.
        jobs: Threads; default: one per core.
        memory: Bytes to stay below.
        dry_run: Check everything, report what would be done, write nothing.
        force: Replace an existing output.
        hash_inputs: Record the inputs' SHA-256 (remembered between runs).
        html: Of a sweep: write the table of distances and norms as a page, too.
        workers: Of a sweep, or for a folder: processes that build side by side; default: one per core if outputs are
            large, 1 = one build after the other.
        cluster: Address of a dask scheduler whose workers build instead.
        progress: Called as `progress(label, total_bytes)`.

    Returns:
        A report: inputs, steps, what was written; of a sweep the distances of all results from the inputs, by block.

    Raises:
        UsageError: the recipe makes no sense, with the path of what is wrong; an input is missing.
        MismatchError: an input is not the file that the recipe expects, or inputs do not fit each other.
        FormatError: an input is damaged.
        OutputError: an output exists, is an input, or does not fit on the disk.
    """
    side_by_side: dict[str, Any] = {"workers": workers, "cluster": cluster}
    if not isinstance(recipe, Recipe) and (folder := hub.located(recipe)).is_dir():
        from sdops.verbs._build_folder import build_folder

        if html is not None:
            raise _no_sweep()
        how: dict[str, Any] = {
            "root": root,
            "ignore_hashes": ignore_hashes,
            "jobs": jobs,
            "memory": memory,
            "force": force,
        }
        how |= side_by_side | {"dry_run": dry_run, "hash_inputs": hash_inputs, "progress": progress}
        return build_folder(folder, set_=set_, inputs=inputs, output=output, **how)
    text = recipe if isinstance(recipe, Recipe) else find_recipe(recipe)
    running: dict[str, Any] = {
        "jobs": jobs,
        "memory": memory,
        "force": force,
        "hash_inputs": hash_inputs,
        "dry_run": dry_run,
        "progress": progress,
        **side_by_side,
    }
    settings, given = dict(set_ or {}), dict(inputs or {})
    if any(isinstance(value, list | tuple) for value in settings.values()):
        return _sweep(text, settings, given, output, tuple(root), html, running, ignore_hashes=ignore_hashes)
    if html is not None:
        raise _no_sweep()
    checked = check_recipe(text, settings)
    from sdops.verbs._build_name import derived_name
    from sdops.verbs._recipe_build import Job, build_job

    path = Path(output) if output is not None else Path(derived_name(checked, settings, given))
    return build_job(Job(text, checked.values, given, path, tuple(root), ignore_hashes), running)


def _no_sweep() -> UsageError:
    return UsageError("a page shows a sweep", hint="give a parameter of a recipe several values: `--set NAME=0:1:0.1`")


def _sweep(
    recipe: Recipe,
    settings: Mapping[str, object],
    inputs: Mapping[str, FilePath],
    output: FilePath | None,
    root: tuple[FilePath, ...],
    html: FilePath | None,
    running: Mapping[str, Any],
    *,
    ignore_hashes: bool,
) -> Report:
    """Build every combination, and measure the results."""
    begin = time.monotonic()
    jobs = sweep_jobs(recipe, settings, inputs, output, root, ignore_hashes=ignore_hashes)
    from sdops.verbs._build_folder import build_all, results_folder, try_all
    from sdops.verbs._recipe_sheet import sheet_report

    _check_page(html, force=running["force"])
    with results_folder(jobs[0].output.parent, keep=not running["dry_run"]):
        if not ignore_hashes:  # once, before the first is built
            _check_hashes(recipe, inputs, root, running["progress"])
        done = (try_all if running["dry_run"] else build_all)(jobs, running)
    sheet = [replace(cell, settings={name: cell.settings[name] for name in settings}) for _, cell in done]
    kept = [cell.output for one, cell in done if one.data.get("kept")]
    report = sheet_report(recipe.name, sheet, kept, time.monotonic() - begin, dry_run=running["dry_run"])
    report.warnings = list(dict.fromkeys(text for one, _ in done for text in one.warnings))
    if not running["dry_run"] and not sheet[0].distances:
        report.hints.append("no distances: the results have other tensors, or other names of them, than the inputs")
    if html is not None and not running["dry_run"]:
        from sdops.verbs._recipe_sheet_page import write_page

        write_page(Path(html), recipe, sheet)
        report.data["html"] = str(html)
        report.result.append(str(html))
    return report


def _check_hashes(
    recipe: Recipe, inputs: Mapping[str, FilePath], root: tuple[FilePath, ...], progress: Progress
) -> None:
    found = find_inputs(recipe, inputs, root).values()
    try:
        check_hashes(found, progress)
    finally:
        for one in found:
            one.close()


def sweep_jobs(
    recipe: Recipe,
    settings: Mapping[str, object],
    inputs: Mapping[str, FilePath],
    output: FilePath | None = None,
    root: tuple[FilePath, ...] = (),
    *,
    ignore_hashes: bool = False,
) -> list[Job]:
    """The builds of a sweep, none of which needs another one; their outputs are named by what was set.

    Raises:
        UsageError: a value does not fit, or `output` is a file.
    """
    folder = Path() if output is None else Path(output)
    if folder.suffix in (".safetensors", ".ckpt", ".gguf") or folder.is_file():
        raise UsageError(f"a sweep writes several files, `{folder}` is one", hint="`-o FOLDER`")
    from sdops.verbs._recipe_sweep import cells

    grid = cells(recipe, settings)
    from sdops.verbs._build_name import derived_name
    from sdops.verbs._recipe_build import Job

    return [
        Job(recipe, checked.values, inputs, folder / derived_name(checked, one, inputs), root, ignore_hashes)
        for one, checked in grid
    ]


def _check_page(html: FilePath | None, *, force: bool) -> None:
    if html is not None and Path(html).exists() and not force:
        raise OutputError(f"`{html}` exists already", hint="`--force` replaces it", path=html)


def find_recipe(name: FilePath) -> Recipe:
    """A recipe by its file, or a preset by its name.

    Raises:
        SdopsError: there is neither.
        UsageError: it is no recipe.
    """
    from sdops.presets import is_preset_file

    path = recipe_file(name)
    found = read_recipe(path)
    return replace(found, folder=None) if is_preset_file(path) else with_references(found, path)


def with_references(recipe: Recipe, path: Path) -> Recipe:
    """A recipe on the Hub with the files that lie beside it there by their references, wherever it is built.

    Args:
        recipe: Any.
        path: The file that it was read from; of one that is not on the Hub nothing changes.
    """
    from sdops.verbs._hashes import reference_of

    if not (own := reference_of([path])):
        return recipe
    beside = own.rpartition("/")[0]
    inputs = {
        name: replace(one, file=f"{beside}/{one.file}")
        if one.file and not _leads_outside(one.file) and (path.parent / one.file).exists()
        else one
        for name, one in recipe.inputs.items()
    }
    return replace(recipe, inputs=inputs, folder=None)


def _leads_outside(file: str) -> bool:
    return file.startswith(("/", "hf:")) or ".." in Path(file).parts


def recipe_file(name: FilePath) -> Path:
    """Where a recipe lies: a file that there is, also one on the Hub, or the preset of that name.

    Raises:
        SdopsError: there is neither; a similar preset is suggested.
        HubError: it is not on the Hub, or cannot be had.
    """
    from sdops.presets import names, preset_file

    path = hub.located(name)
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
