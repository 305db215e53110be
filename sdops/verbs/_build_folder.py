"""Build all recipes of a folder, and tell of many builds as one."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdops import hub
from sdops.errors import OutputError, SdopsError, UsageError
from sdops.report import Progress, Report, Section, silent
from sdops.text import count, duration, size, suggest
from sdops.verbs._recipe_inputs import FilePath
from sdops.verbs._recipe_text import Recipe
from sdops.verbs._recipe_told import of_recipe

if TYPE_CHECKING:
    from sdops.verbs._many_jobs import Build
    from sdops.verbs._recipe_build import Job
    from sdops.verbs._recipe_sheet import Cell


def recipes_in(folder: Path) -> list[Recipe]:
    """All recipes of a folder, by name.

    Raises:
        SdopsError: there is none.
        UsageError: one of the files is no recipe.
    """
    from sdops.verbs.build import find_recipe

    files = sorted(folder.glob("*.toml"))
    if not files:
        raise SdopsError(f"`{folder}` holds no recipes", hint="recipes are `.toml` files; `sdops recipe cp` copies one")
    found = []
    for file in files:
        with of_recipe(file):
            found.append(find_recipe(file))
    return found


def build_folder(
    folder: FilePath,
    *,
    set_: Mapping[str, object] | None = None,
    inputs: Mapping[str, FilePath] | None = None,
    output: FilePath | None = None,
    workers: int | None = None,
    cluster: str | None = None,
    dry_run: bool = False,
    progress: Progress = silent,
    **options: Any,
) -> Report:
    """Build every recipe of a folder.

    Args:
        folder: With recipes, `*.toml`.
        set_: Parameter -> value, for the recipes that have it.
        inputs: Input -> file, for the recipes that have it.
        output: The folder to write to, made if it is not there; default: this one.
        workers: Processes; default: one per core; 1 = one build after the other.
        cluster: Address of a dask scheduler whose workers build.
        dry_run: Check everything, write nothing.
        progress: Called as `progress(label, total_bytes)`.
        options: root, ignore_hashes, hash_inputs, jobs, memory, force: as for `sdops.build`.

    Raises:
        UsageError: a recipe makes no sense, or none has a parameter or input that is given.
        SdopsError: as `build_many`.
    """
    from sdops.verbs._build_name import derived_name
    from sdops.verbs._many import build_many, is_there
    from sdops.verbs._many_jobs import Build
    from sdops.verbs.build import build

    recipes = recipes_in(Path(folder))
    given, settings = dict(inputs or {}), dict(set_ or {})
    several = next((name for name, value in settings.items() if isinstance(value, list | tuple)), None)
    if several is not None:
        hint = f"`sdops build RECIPE --set {several}=...` builds one recipe for several values"
        raise UsageError(f"`{several}` has several values, but recipes of a folder are built once each", hint=hint)
    _check_names(settings, {name for one in recipes for name in one.parameters}, "parameter", folder)
    _check_names(given, {name for one in recipes for name in one.inputs}, "input", folder)
    place = Path() if output is None else Path(output)
    builds = []
    for one in recipes:
        own = {name: value for name, value in settings.items() if name in one.parameters}
        files = {name: os.fspath(file) for name, file in given.items() if name in one.inputs}
        how = {**options, "root": tuple(os.fspath(each) for each in options.get("root", ()))}
        build_ = Build(one, own, files, "", stream=hub.is_streaming(), **how)
        with of_recipe(one.name):
            builds.append(replace(build_, output=str(place / derived_name(build_.checked(), own, files))))
    begin = time.monotonic()
    with results_folder(place, keep=not dry_run):
        if dry_run:
            done: list[Report | SdopsError] = []
            for each in builds:
                how = {**options, "set_": each.settings, "inputs": each.inputs, "output": each.output}
                with of_recipe(each.recipe.name):
                    is_kept = is_there(each, progress)
                    done.append(
                        Report("build", data={"kept": True}) if is_kept else build(each.recipe, dry_run=True, **how)
                    )
        else:
            done = build_many(builds, workers=workers, cluster=cluster, progress=progress)
    return many_report(builds, done, time.monotonic() - begin, dry_run=dry_run)


@contextmanager
def results_folder(path: Path, *, keep: bool) -> Iterator[None]:
    """A folder for results; a new one goes again if nothing was built, or is not to be kept.

    Raises:
        OutputError: it is not there and cannot be made.
    """
    if path.exists() and not path.is_dir():
        raise OutputError(f"several results need a folder, `{path}` is a file", hint="`-o FOLDER`")
    new = not path.exists()
    if new:
        try:
            path.mkdir()
        except OSError as error:
            raise OutputError(
                f"the folder `{path}` cannot be made: {error.strerror}", hint="choose another place with `-o`"
            ) from None
    built = False
    try:
        yield
        built = keep
    finally:
        if new and not built:
            with suppress(OSError):  # something is in it
                path.rmdir()


def build_all(jobs: Sequence[Job], running: Mapping[str, Any]) -> list[tuple[Report, Cell]]:
    """Do the builds of a sweep side by side; all that can be done are, before the first error is raised.

    Args:
        jobs: What.
        running: As for `build_job`, and workers and cluster.

    Returns:
        Of each its report, and how far the result is from the inputs.

    Raises:
        SdopsError: as the builds, or as `build_many`.
    """
    from sdops.verbs._many import build_many

    builds = [replace(_build_of(job, running), measured=True) for job in jobs]
    done = []
    results = build_many(builds, workers=running["workers"], cluster=running["cluster"], progress=running["progress"])
    for job, result in zip(jobs, results, strict=True):
        if isinstance(result, SdopsError):
            raise result
        done.append((result, replace(result.data.pop("cell"), output=job.output)))
    return done


def try_all(jobs: Sequence[Job], running: Mapping[str, Any]) -> list[tuple[Report, Cell]]:
    """The same as a trial: nothing is written or measured."""
    from sdops.verbs._many import is_there
    from sdops.verbs._recipe_build import build_job
    from sdops.verbs._recipe_sheet import Cell

    done = []
    for job in jobs:
        kept = is_there(_build_of(job, running), running["progress"])
        report = Report("build", data={"kept": True}) if kept else build_job(job, running)
        done.append((report, Cell(job.settings, job.output, 0.0, {})))
    return done


def _build_of(job: Job, running: Mapping[str, Any]) -> Build:
    from sdops.verbs._many_jobs import Build

    return Build(
        job.recipe,
        job.settings,
        {name: os.fspath(file) for name, file in job.inputs.items()},
        str(job.output),
        tuple(os.fspath(one) for one in job.root),
        job.ignore_hashes,
        stream=hub.is_streaming(),
        **{name: running[name] for name in ("hash_inputs", "jobs", "memory", "force")},
    )


def _check_names(given: Iterable[str], known: set[str], what: str, folder: FilePath) -> None:
    for name in given:
        if name not in known:
            close = suggest(name, known)
            hint = f"did you mean `{close}`?" if close else f"there are {', '.join(sorted(known)) or 'none'}"
            raise UsageError(f"no recipe in `{folder}` has the {what} `{name}`", hint=hint)


def many_report(
    builds: Sequence[Build], results: Sequence[Report | SdopsError], seconds: float, *, dry_run: bool = False
) -> Report:
    """The report of many builds: a line for each, and what went wrong."""
    report = Report("build", data={"builds": [], "dry_run": dry_run, "seconds": round(seconds, 3)})
    rows = []
    for build, result in zip(builds, results, strict=True):
        facts: dict[str, Any] = {
            "recipe": build.recipe.name,
            "output": build.output,
            "parameters": dict(build.settings),
        }
        if isinstance(result, SdopsError):
            rows.append([build.recipe.name, build.output, "", "", f"failed: {result.message}"])
            facts |= {"error": result.message, "hint": result.hint}
            report.failed = True
            report.hints += [result.hint] if result.hint and result.hint not in report.hints else []
        else:
            took = result.data.get("seconds", 0)
            nbytes = Path(build.output).stat().st_size if Path(build.output).is_file() and not dry_run else 0
            state = "there already" if result.data.get("kept") else "would be built" if dry_run else "built"
            rows.append([build.recipe.name, build.output, size(nbytes) if nbytes else "", duration(took), state])
            facts |= {"seconds": took, "bytes": nbytes, "kept": result.data.get("kept", False)}
            report.result += result.result
            report.warnings += [text for text in result.warnings if text not in report.warnings]
        report.data["builds"].append(facts)
    report.sections = [Section(count(len(builds), "build"), rows, ("recipe", "output", "size>", "time>", ""))]
    if dry_run:
        report.hints.append("nothing was written; leave `--dry-run` away to build")
    elif len(builds) > 1:
        report.sections.append(Section("", [["all", duration(seconds)]]))
    return report
