"""Many builds at once: side by side where an engine is, and what several of them share is made once.

build_many([Build(...), ...], workers=2)                           processes of this machine
build_many([Build(...), ...], cluster="tcp://10.0.0.1:8786")       workers of a dask cluster

The engine is dask.distributed (`pip install sdops[cluster]`). It does a job again whose worker was killed; finished
outputs are files, and stay: the next run takes them as they are. What is written does not depend on how many workers
there are, or on which does what.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from sdops.core.run import FORK_BYTES, default_jobs
from sdops.core.sink import remove_leftovers
from sdops.errors import OutputError, SdopsError, UsageError
from sdops.report import Progress, Report, silent
from sdops.text import count
from sdops.verbs._build_place import place
from sdops.verbs._many_finished import is_finished
from sdops.verbs._many_jobs import Build, Failed, PlannedWithStored, guarded, running, step_keys
from sdops.verbs._recipe_check import Checked
from sdops.verbs._recipe_check_embed import is_embed
from sdops.verbs._recipe_plan import Planned
from sdops.verbs._recipe_told import of_recipe

Result = Report | str | Failed


@dataclass(frozen=True, slots=True)
class Task:
    """Something for a worker to do.

    Attributes:
        name: Of its own.
        kind: build or store.
        arguments: Of the job, see `_many_jobs.guarded`.
        after: Names of tasks that must be done before.
        nbytes: What it writes.
    """

    name: str
    kind: str
    arguments: tuple[Any, ...]
    after: tuple[str, ...]
    nbytes: int


Engine = Callable[[Sequence[Task]], Iterator[tuple[Task, Result]]]


def build_many(
    builds: Sequence[Build],
    *,
    workers: int | None = None,
    cluster: str | None = None,
    progress: Progress = silent,
) -> list[Report | SdopsError]:
    """Do all builds; one that fails does not keep the others from being done.

    Args:
        builds: What to do.
        workers: Processes of this machine; default: one per core if all outputs are large, else 1; 1 = one after the
            other in this process, as it is where dask.distributed is not installed.
        cluster: Address of a dask scheduler whose workers do it instead. They see the same files under the same paths.
        progress: Called as `progress(label, total_bytes)`.

    Returns:
        What `sdops.build` would return or raise, build by build.

    Raises:
        SdopsError: before anything is done: what the first build that makes no sense would raise; outputs that exist
            already, or that two builds share; no scheduler or worker answers.
    """
    if not builds:
        return []
    given = [build.output for build in builds]
    checked, sizes = _checked(builds, progress)
    builds = [build.anywhere() for build in checked]
    wanted = _number_of(workers, sizes) if cluster is None else 0
    done: dict[str, Result] = {}
    with place(Path(builds[0].output).parent) as shared:
        try:
            with _engine(wanted, cluster) as (engine, threads):
                tasks = _tasks(builds, sizes, shared, threads)
                with progress(f"building {count(len(builds), 'file')}", sum(task.nbytes for task in tasks)) as advance:
                    for task, result in engine(tasks):
                        done[task.name] = result
                        advance(task.nbytes)
        finally:
            for build in builds:  # what killed workers left
                remove_leftovers(Path(build.output))
    return [_outcome(done[f"build {i}"], given[i], builds[i].output) for i in range(len(builds))]


def _number_of(workers: int | None, sizes: Sequence[int]) -> int:
    """How many processes of this machine shall work."""
    usual = default_jobs() if min(sizes) >= FORK_BYTES else 1  # starting processes takes seconds
    wanted = min(workers or usual, len(sizes))
    return wanted if workers or find_spec("distributed") else 1


def _outcome(result: Result, given: str, output: str) -> Report | SdopsError:
    """What came of a build, with its output as the user named it."""
    if isinstance(result, Failed):
        return replace(result, message=result.message.replace(output, given)).error()
    if isinstance(result, str):
        raise TypeError("a build returns a report")
    result.result = [line.replace(output, given) for line in result.result]
    result.data["output"] = given
    for section in result.sections:
        section.heading = section.heading.replace(output, given)
        section.rows = [[cell.replace(output, given) for cell in row] for row in section.rows]
    return result


def _checked(builds: Sequence[Build], progress: Progress) -> tuple[list[Build], list[int]]:
    """Plan every build from headers; returns them, told which are finished, and the sizes of their outputs."""
    targets = Counter(os.path.realpath(build.output) for build in builds)
    twice = next((build.output for build in builds if targets[os.path.realpath(build.output)] > 1), None)
    if twice is not None:
        raise OutputError(
            f"`{twice}` would be written by {targets[os.path.realpath(twice)]} builds",
            hint="give their recipes other names",
        )
    are_alike = len({build.recipe.name for build in builds}) == 1  # a sweep
    found = []
    for build in builds:
        with nullcontext() if are_alike else of_recipe(build.recipe.name):
            found.append(_checked_one(build, progress))
    return [build for build, _ in found], [nbytes for _, nbytes in found]


def _checked_one(build: Build, progress: Progress) -> tuple[Build, int]:
    path, checked = Path(build.output), build.checked()
    planned = PlannedWithStored(checked, build.found(checked), path.parent, {}, build.memory)
    try:
        finished = path.exists() and not build.force and is_finished(planned, path, progress)
        lazy = planned.result.lazy() if planned.result.is_lazy else None
        if not finished:
            planned.check(path, force=build.force)
            planned.rehearse(path, running(build))
            if lazy is not None:
                lazy.check(path, force=build.force)
        return replace(build, finished=finished), _bytes(planned)
    finally:
        planned.close()


def _bytes(planned: Planned) -> int:
    """How much the result will have; if that is not known yet, how much it is made of."""
    sources = [planned.result.lazy()] if planned.result.is_lazy else [one.open() for one in planned.found.values()]
    return max(1, sum(spec.nbytes for source in sources for spec in source.specs.values()))


def is_there(build: Build, progress: Progress) -> bool:
    """Whether `build_many` would find a build finished; for trial runs.

    Raises:
        SdopsError: as `build_many`.
    """
    return _checked_one(build, progress)[0].finished


def _tasks(builds: Sequence[Build], sizes: Sequence[int], folder: Path, threads: int | None) -> list[Task]:
    """All jobs, those that make shared steps first."""
    shared = _shared_steps(builds)
    stored = {key: str(folder / f"{key}.safetensors") for key in shared}
    ready = [
        replace(build, stored=stored, place=str(folder), force=True, jobs=build.jobs or threads) for build in builds
    ]
    tasks = [
        Task(f"store {key}", "store", (ready[index], key), tuple(f"store {name}" for name in needs), sizes[index])
        for key, (index, needs) in shared.items()
    ]
    for index, build in enumerate(ready):
        checked = build.checked()
        keys = () if build.finished else step_keys(checked, build.found(checked)).values()
        after = tuple(f"store {key}" for key in keys if key in shared)
        tasks.append(Task(f"build {index}", "build", (build,), after, sizes[index]))
    return tasks


def _shared_steps(builds: Sequence[Build]) -> dict[str, tuple[int, tuple[str, ...]]]:
    """Key of each step that is worth a file -> a build that has it, and the other such steps that it reads.

    Worth a file is what several builds have in common, where it meets what they do not: a step before that is read on
    the way, once. Embeddings are made again sooner than told about.
    """
    plans = {index: build.checked() for index, build in enumerate(builds) if not build.finished}
    keys = {index: step_keys(plan, builds[index].found(plan)) for index, plan in plans.items()}
    times = Counter(key for own in keys.values() for key in set(own.values()))
    found: dict[str, tuple[int, tuple[str, ...]]] = {}
    for index, plan in plans.items():
        own = keys[index]
        common = {step.id for step in plan.steps if times[own[step.id]] > 1} - {plan.result.id}
        common -= {step.id for step in plan.steps if is_embed(step.step)}
        edge = {name for step in plan.steps if step.id not in common for name in step.uses if name in common}
        for step in plan.steps:  # what a step reads comes before it
            if step.id in edge and own[step.id] not in found:
                found[own[step.id]] = index, tuple(own[name] for name in _ancestors(plan, step.id) & edge)
    return found


def _ancestors(plan: Checked, name: str) -> set[str]:
    """All steps that a step reads, directly or not."""
    uses = {step.id: step.uses for step in plan.steps}
    found: set[str] = set()
    waiting = [name]
    while waiting:
        for used in uses.get(waiting.pop(), ()):
            if used in uses and used not in found:
                found.add(used)
                waiting.append(used)
    return found


@contextmanager
def _engine(workers: int, cluster: str | None) -> Iterator[tuple[Engine, int | None]]:
    """Who does the tasks, and with how many threads each."""
    if workers == 1:
        yield _one_after_the_other, None
        return
    if find_spec("distributed") is None:
        raise _not_installed()
    from sdops.verbs import _many_dask

    with _many_dask.connected(workers, cluster) as client:
        yield (lambda tasks: _many_dask.run(client, tasks)), _many_dask.threads(client)


def _one_after_the_other(tasks: Sequence[Task]) -> Iterator[tuple[Task, Result]]:
    for task in tasks:
        yield task, guarded(task.kind, *task.arguments)


def _not_installed() -> UsageError:
    return UsageError(
        "several workers need dask.distributed, which is not installed", hint="`pip install 'sdops[cluster]'`"
    )
