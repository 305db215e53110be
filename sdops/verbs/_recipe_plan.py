"""A recipe with its files: opened, planned step by step, ready to be written in one pass.

plan_recipe(checked, found)      every check that headers allow; nothing is computed
build_recipe(planned, output)    the result, and the outputs that steps ask for
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from sdops.core.sink import check_inputs, check_target
from sdops.core.source import Source
from sdops.errors import OutputError
from sdops.report import Report
from sdops.verbs._recipe_calls import Call, File
from sdops.verbs._recipe_check import Checked, CheckedStep
from sdops.verbs._recipe_check_embed import is_embed
from sdops.verbs._recipe_embeddings import Embeddings
from sdops.verbs._recipe_inputs import Found, check_stays
from sdops.verbs._recipe_sources import NamedFile, SharedStep
from sdops.verbs._recipe_work import placeholder, worker

if TYPE_CHECKING:
    from sdops.verbs._recipe_convert import Converted
    from sdops.verbs.apply import Apply
    from sdops.verbs.merge import Merge


class Planned:
    """A planned recipe.

    Args:
        checked: The recipe.
        found: Its inputs.
        folder: Where steps write the outputs that they ask for.
        memory: Bytes that each step shall stay below.
        work: Does a step that has to be done before others can be planned (`_recipe_work`); None = plan those on what
            is known of it before.
        embeddings: Those that steps make for others.

    Attributes:
        calls: The steps by id, in order.
        is_trial: Whether some step was planned on less than another one will give.

    Raises:
        SdopsError: an input cannot be read, or a step makes no sense for it; with the step's path.
    """

    def __init__(
        self,
        checked: Checked,
        found: Mapping[str, Found],
        folder: Path,
        memory: int | None = None,
        work: Callable[[Call], Source] | None = None,
        embeddings: Embeddings | None = None,
    ) -> None:
        self.checked = checked
        self.found = found
        self.folder = folder
        self.memory = memory
        self.calls: dict[str, Call] = {}
        self._readers = Counter(name for step in checked.steps for name in step.uses)
        self._files: dict[str, File] = {}
        self.is_trial = False
        self.embeddings = embeddings or Embeddings()
        try:
            for step in checked.steps:
                self._plan(step, work)
        except BaseException:
            self.embeddings.close()
            raise

    def _plan(self, step: CheckedStep, work: Callable[[Call], Source] | None) -> None:
        """Add a step, whose files are there."""
        call = Call(step, self._paths(step) if is_embed(step.step) else self._handles(step), self.memory)
        self.calls[step.id] = call
        if call.is_lazy:
            self._files[step.id] = self._shared(step.id, call.lazy())
        elif not self._readers[step.id]:
            return
        elif is_embed(step.step):
            self._files[step.id] = self.embeddings.made(call)
        elif call.is_conversion:
            self._files[step.id] = self._shared(step.id, call.converted(self.folder))
        else:
            self._files[step.id] = (work or placeholder)(call)
            self.is_trial = self.is_trial or work is None

    def _paths(self, step: CheckedStep) -> Mapping[str, File]:
        """The files that a step of embeddings reads: inputs, and what other such steps have made."""
        return {name: self.found[name].address if name in self.found else self._files[name] for name in step.uses}

    def _handles(self, step: CheckedStep) -> Mapping[str, File]:
        """What stands for the files that a step reads; each is opened once."""
        for name in step.uses:
            if name in self.found and name not in self._files:
                self._files[name] = _handle(self.found[name])
        return self._files

    def again(self, work: Callable[[Call], Source]) -> Planned:
        """The same, now with somebody to do the steps that cannot wait."""
        return Planned(self.checked, self.found, self.folder, self.memory, work, self.embeddings)

    @property
    def result(self) -> Call:
        """The last step."""
        return self.calls[self.checked.result.id]

    def _shared(self, name: str, made: Merge | Apply | Converted) -> Source:
        """A step's Source, which remembers its last piece if several others read it."""
        if self._readers[name] < 2:
            return cast("Source", made)
        return SharedStep(made)

    def check(self, output: Path, *, force: bool) -> None:
        """Refuse outputs that exist or are inputs, before anything is computed.

        Raises:
            OutputError: naming the file; or a step on the way would write the result's.
            UsageError: a link leads a step's own output elsewhere.
        """
        files = [file for one in self.found.values() for file in one.files()]
        for call in self.calls.values():
            folder = Path() if call is self.result else self.folder
            if call.output and (call is not self.result or output.resolve() == Path(call.output).resolve()):
                check_stays(call.output, folder, call.step.step.path)
        for name, path in self.outputs().items():
            if path.resolve() == output.resolve():
                hint = f"`-o` names another file; `{output}` is what the step `{name}` writes"
                raise OutputError(f"`{output}` would be written twice", hint=hint, path=output)
        for target in (output, *self.outputs().values()):
            check_inputs(target, files)
            check_target(target, force=force)

    def rehearse(self, output: Path, running: Mapping[str, Any]) -> bool:
        """Let verbs that do not compute while they are read refuse now what they would refuse when it is their turn:
        after other steps' work, after inputs were hashed or downloaded. Embeddings are worked out in no time.

        Args:
            output: Where the result goes.
            running: As for `build_recipe`.

        Returns:
            Whether a verb was asked; it closes the files that it was given, so that all has to be planned again.

        Raises:
            SdopsError: as the verbs.
        """
        late = [call for call in self.calls.values() if not call.is_lazy and not is_embed(call.step.step)]
        if not self.is_trial and not any(one.input.sha256 for one in self.found.values()):
            return False
        asked = {**self.outputs(), self.checked.result.id: output}
        for call in late:
            path = asked.get(call.id, self.folder / f".sdops-{call.id}.safetensors")
            call.save(path, {**running, "dry_run": True})
        return bool(late)

    def outputs(self) -> dict[str, Path]:
        """Steps, but for the last, that ask for a file -> the file."""
        result = self.result.id
        return {call.id: self.folder / call.output for call in self.calls.values() if call.output and call.id != result}

    def warnings(self) -> list[str]:
        """What the steps before the last one warn of."""
        lazy = [call.lazy() for call in self.calls.values() if call.is_lazy and call is not self.result]
        return [text for one in lazy for text in (one.warnings if hasattr(one, "warnings") else one.plan.warnings)]

    def by_id(self, text: str) -> str:
        """A text with the ids of steps in place of the names that their results would have as files."""
        for name in sorted(self._names, key=len, reverse=True):
            text = text.replace(name, self._names[name])
        return text

    @cached_property
    def _names(self) -> dict[str, str]:
        return {call.lazy().name: call.id for call in self.calls.values() if call.is_lazy and call is not self.result}

    def close(self) -> None:
        """Close all inputs, and remove the embeddings that steps have made for others."""
        self.embeddings.close()
        for one in self.found.values():
            one.close()


def _handle(found: Found) -> File:
    """What verbs take: an opened model, or of LoRAs the path, which may be a folder of PEFT's or a list of tensors.

    A file that hashes to what the recipe expects takes the name that it has there, so that the result is the same.
    """
    from sdops.verbs._adapter_peek import is_adapter

    name = Path(found.input.file).name
    if found.input.sha256 and found.given and name and name != Path(found.address).name:
        return NamedFile(found.open(), name)
    return found.address if is_adapter(found.address) else found.open()


def plan_recipe(checked: Checked, found: Mapping[str, Found], folder: Path, memory: int | None = None) -> Planned:
    """Open the inputs and plan all steps.

    Args:
        checked: The recipe.
        found: Its inputs.
        folder: Where steps write the outputs that they ask for.
        memory: Bytes to stay below.

    Raises:
        SdopsError: as `Planned`.
    """
    return Planned(checked, found, folder, memory)


def build_recipe(
    planned: Planned, output: Path, running: Mapping[str, Any], place: Path | None = None
) -> tuple[Report, dict[str, Report]]:
    """Write the result; before it, the outputs that steps ask for.

    Args:
        planned: The recipe.
        output: Where the result goes.
        running: jobs, memory, force, hash_inputs, dry_run, progress.
        place: Where LoRAs lie until they are used; default: beside the output.

    Returns:
        The last step's report, and those of the steps that wrote a file.

    Raises:
        SdopsError: as the verbs.
    """
    planned.check(output, force=running["force"])
    if planned.is_trial and not running["dry_run"]:
        with worker(place or output.absolute().parent, running) as work:
            return _write(planned.again(work), output, running)
    return _write(planned, output, running)


def _write(planned: Planned, output: Path, running: Mapping[str, Any]) -> tuple[Report, dict[str, Report]]:
    asked: dict[str, Report] = {}
    for name, path in planned.outputs().items():
        asked[name] = planned.embeddings.save(planned.calls[name], path, running)
    return planned.embeddings.save(planned.result, output, running), asked
