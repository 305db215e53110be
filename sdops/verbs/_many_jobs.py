"""What a worker does: one build, or one step that several builds share, stored in a file. Told in plain values.

A job may be done twice, and by another process than the one that began it: it writes the same bytes to the same name,
and the name appears when all of them are there.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field, replace
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from sdops import __version__, hub
from sdops.core.source import Source
from sdops.core.view import View
from sdops.errors import SdopsError
from sdops.hub import is_reference
from sdops.report import Report, silent
from sdops.verbs._recipe_calls import Call
from sdops.verbs._recipe_check import Checked, check_recipe
from sdops.verbs._recipe_embeddings import Embeddings
from sdops.verbs._recipe_inputs import Found, check_hashes, find_inputs
from sdops.verbs._recipe_plan import Planned, build_recipe
from sdops.verbs._recipe_text import Recipe
from sdops.verbs._recipe_work import worker

if TYPE_CHECKING:
    from sdops.verbs._recipe_convert import Converted
    from sdops.verbs._recipe_sheet import Cell
    from sdops.verbs.apply import Apply
    from sdops.verbs.merge import Merge


@dataclass(frozen=True, slots=True)
class Build:
    """One of many builds; all of it can be sent to another machine.

    Attributes:
        recipe: What to build.
        settings: Parameter -> value.
        inputs: Input -> file.
        output: The file to write.
        root: More folders to look for inputs in.
        ignore_hashes, hash_inputs, jobs, memory, force: As in `sdops.build`.
        stream: Whether files on the Hub are kept nowhere; until all builds are done they lie in `place`.
        measured: Whether to measure the result, too: it is in memory still, and workers share that work.
        finished: Whether the output is there already.
        place: A folder for what is worked out on the way; default: the output's own.
        stored: Key of a step (see `step_keys`) -> file that holds its result, or will.
    """

    recipe: Recipe
    settings: Mapping[str, Any]
    inputs: Mapping[str, str]
    output: str
    root: tuple[str, ...] = ()
    ignore_hashes: bool = False
    hash_inputs: bool = True
    jobs: int | None = None
    memory: int | None = None
    force: bool = False
    stream: bool = False
    measured: bool = False
    finished: bool = False
    place: str = ""
    stored: Mapping[str, str] = field(default_factory=dict)

    def anywhere(self) -> Build:
        """The same with whole paths, for a process that works in another folder."""
        inputs = {name: file if is_reference(file) else os.path.abspath(file) for name, file in self.inputs.items()}
        folder = self.recipe.folder and Path(os.path.abspath(self.recipe.folder))
        return replace(
            self,
            recipe=replace(self.recipe, folder=folder),
            inputs=inputs,
            output=os.path.abspath(self.output),
            root=(*map(os.path.abspath, self.root), os.getcwd()),
        )

    def checked(self) -> Checked:
        """The recipe with its parameters in place."""
        return check_recipe(self.recipe, self.settings)

    def found(self, checked: Checked) -> dict[str, Found]:
        """Its input files."""
        used = {name for step in checked.steps for name in step.uses}
        return find_inputs(self.recipe, self.inputs, self.root, used=used)


class StoredStep(View):
    """A step whose result lies in a file, which says of itself how it is made, as the step does.

    Args:
        made: The planned step.
        file: The stored result.
    """

    def __init__(self, made: Merge | Apply | Converted, file: Source) -> None:
        super().__init__(file, made.specs)
        self.name = made.name
        self.metadata = made.metadata
        self.parts = made.parts
        self.made = made.made


class StoredCall(Call):
    """A step that has been done: its file is there.

    Args:
        call: The step.
        file: What it made.
    """

    def __init__(self, call: Call, file: Path) -> None:
        vars(self).update(vars(call))
        self._file = file

    def save(self, output: Path, running: Mapping[str, Any]) -> Report:
        """Give the file another name."""
        del running
        try:
            os.link(self._file, output)
        except OSError:
            shutil.copyfile(self._file, output)
        return Report(self.verb, result=[str(output)])


class PlannedWithStored(Planned):
    """A planned recipe that takes shared steps from files as far as they are there.

    Args:
        stored: Key of a step -> its file.
        others: As for `Planned`.
    """

    def __init__(
        self,
        checked: Checked,
        found: Mapping[str, Found],
        folder: Path,
        stored: Mapping[str, str],
        memory: int | None = None,
        work: Callable[[Call], Source] | None = None,
        embeddings: Embeddings | None = None,
    ) -> None:
        keys = step_keys(checked, found) if stored else {}
        self._by_key = stored
        self._stored = {name: Path(stored[key]) for name, key in keys.items() if key in stored}
        super().__init__(checked, found, folder, memory, work and self._sparing(work), embeddings)

    def again(self, work: Callable[[Call], Source]) -> Planned:
        """As Planned's."""
        others = (self.folder, self._by_key, self.memory, work, self.embeddings)
        return PlannedWithStored(self.checked, self.found, *others)

    def _sparing(self, work: Callable[[Call], Source]) -> Callable[[Call], Source]:
        """Work that is not done where a file has its result."""

        def spared(call: Call) -> Source:
            path = self._stored.get(call.id)
            return work(StoredCall(call, path) if path is not None and path.is_file() else call)

        return spared

    def _shared(self, name: str, made: Merge | Apply | Converted) -> Source:
        path = self._stored.get(name)
        if path is None or not path.is_file():
            return super()._shared(name, made)
        from sdops.formats import open_source

        return cast("Source", StoredStep(made, open_source(path)))


def step_keys(checked: Checked, found: Mapping[str, Found]) -> dict[str, str]:
    """Step -> what its result depends on, as a hash: verb, arguments, and the same of all that it reads."""
    keys = {name: f"{_address(one)} {one.input.sha256}" for name, one in found.items()}
    steps = {}
    for step in checked.steps:
        arguments = {key: _resolved(value, keys) for key, value in step.arguments.items() if key != "output"}
        text = json.dumps([__version__, step.step.verb, arguments], sort_keys=True, default=str)
        keys[step.id] = steps[step.id] = sha256(text.encode()).hexdigest()[:32]
    return steps


def _address(found: Found) -> str:
    return found.address if is_reference(found.address) else os.path.abspath(found.address)


def _resolved(value: Any, keys: Mapping[str, str]) -> Any:
    """A value with what the names in it stand for; `name:0.8` names a LoRA and its strength."""
    if isinstance(value, str):
        name, colon, rest = value.partition(":")
        return [keys[name], colon + rest] if name in keys else value
    if isinstance(value, Mapping):
        return {key: _resolved(part, keys) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_resolved(part, keys) for part in value]
    return value


def run_build(build: Build) -> Report:
    """Do one build, if that is not finished, and measure the result, if that is asked for.

    Raises:
        SdopsError: as `sdops.build`.
    """
    report = Report("build", result=[build.output]) if build.finished else _built(build)
    report.data["kept"] = build.finished
    if build.measured:
        report.data["cell"] = _measured(build)
    return report


def _built(build: Build) -> Report:
    from sdops.verbs._recipe_report import build_report

    begin, checked = time.monotonic(), build.checked()
    found, path = build.found(checked), Path(build.output)
    planned = PlannedWithStored(checked, found, path.parent, build.stored, build.memory)
    try:
        if not build.ignore_hashes:
            check_hashes(found.values(), silent)
        done, asked = build_recipe(planned, path, running(build), Path(build.place or path.parent))
        return build_report(planned, path, done, asked, time.monotonic() - begin, dry_run=False)
    finally:
        planned.close()


def _measured(build: Build) -> Cell:
    """How far the result is from the recipe's inputs."""
    from sdops.verbs._recipe_sheet import measured

    inputs = find_inputs(build.recipe, build.inputs, build.root)
    try:
        return measured(build.settings, Path(build.output), inputs, build.jobs, silent)
    finally:
        for one in inputs.values():
            one.close()


def store_step(build: Build, key: str) -> str:
    """Write the result of a step that several builds share; returns the file.

    Raises:
        SdopsError: as the step.
    """
    path = Path(build.stored[key])
    if path.is_file():
        return str(path)
    checked = build.checked()
    found = build.found(checked)
    (name,) = [step for step, own in step_keys(checked, found).items() if own == key][:1]
    others = {other: file for other, file in build.stored.items() if other != key}
    planned, how = PlannedWithStored(checked, found, path.parent, others, build.memory), running(build)
    try:
        if not planned.is_trial:
            planned.calls[name].save(path, how)
            return str(path)
        with worker(path.parent, how) as work, suppress(_Done):
            done = planned.again(_until(name, work, lambda call: call.save(path, how)))
            done.calls[name].save(path, how)
    finally:
        planned.close()
    return str(path)


class _Done(Exception):  # noqa: N818 -- it is no error
    """The step that was wanted is there; those behind it are not."""


def _until(name: str, work: Callable[[Call], Source], store: Callable[[Call], object]) -> Callable[[Call], Source]:
    """Work up to the step of a name, which is stored."""

    def stopping(call: Call) -> Source:
        if call.id != name:
            return work(call)
        store(call)
        raise _Done

    return stopping


def running(build: Build) -> dict[str, Any]:
    """How its steps are done, as `build_recipe` takes it."""
    return {
        "jobs": build.jobs,
        "memory": build.memory,
        "force": build.force,
        "hash_inputs": build.hash_inputs and build.recipe.hash_inputs,
        "dry_run": False,
        "progress": silent,
    }


def guarded(kind: str, build: Build, *key: str) -> Report | str | Failed:
    """Do a job by its kind, `build` or `store`; errors that a user can understand come back as values."""
    try:
        with hub.held(Path(build.place)) if build.stream else nullcontext():
            return run_build(build) if kind == "build" else store_step(build, *key)
    except SdopsError as error:
        return Failed(error.message, error.hint, type(error).__name__)


@dataclass(frozen=True, slots=True)
class Failed:
    """A job that did not work out, in words that can be sent.

    Attributes:
        message, hint: Of the error.
        kind: Name of its class.
    """

    message: str
    hint: str | None = None
    kind: str = "SdopsError"

    def error(self) -> SdopsError:
        """The error again."""
        from sdops import errors

        found: SdopsError = getattr(errors, self.kind, SdopsError)(self.message, hint=self.hint)
        return found
