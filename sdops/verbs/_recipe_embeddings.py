"""Embeddings that steps make for other steps: worked out while a recipe is planned, in files that vanish with the plan.

They are a few kilobytes, made in no time, and verbs for embeddings read files: so a dry run knows as much as a build.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from sdops.errors import SdopsError
from sdops.report import Report, silent
from sdops.verbs._build_place import place
from sdops.verbs._recipe_calls import Call
from sdops.verbs._recipe_told import told

_RUNNING = {"force": False, "dry_run": False, "progress": silent}


class Embeddings:
    """The folder of a plan's embeddings, made when the first one is."""

    def __init__(self) -> None:
        self._stack = ExitStack()
        self._folder: Path | None = None
        self._made: dict[str, str] = {}

    def made(self, call: Call) -> str:
        """The file that a step makes, under the name that the step asks for or its id; made once.

        Raises:
            SdopsError: as the verb.
        """
        if call.id not in self._made:
            if self._folder is None:
                import tempfile

                self._folder = self._stack.enter_context(place(Path(tempfile.gettempdir())))
            own = self._folder / call.id
            own.mkdir()
            self._made[call.id] = self.save(call, own / _name(call), _RUNNING).result[0]
        return self._made[call.id]

    def save(self, call: Call, output: Path, running: Mapping[str, Any]) -> Report:
        """As the step's own `save`; report and errors speak of steps, not of files that nobody will find.

        Raises:
            SdopsError: as the verb.
        """
        try:
            report = call.save(output, running)
        except SdopsError as error:
            error.message, error.hint = self._by_id(error.message), error.hint and self._by_id(error.hint)
            error.args = (error.message,)
            raise
        report.data = self._by_id(report.data)
        return report

    def close(self) -> None:
        """Remove them."""
        self._stack.close()

    def _by_id(self, value: Any) -> Any:
        """A value with ids of steps in place of their files."""
        if isinstance(value, str):
            for name, path in self._made.items():
                value = value.replace(path, name)
            return value
        if isinstance(value, list):
            return [self._by_id(item) for item in value]
        return {key: self._by_id(item) for key, item in value.items()} if isinstance(value, dict) else value


def _name(call: Call) -> str:
    """As the file would be called if the step were the last; with an ending that its layout has."""
    if call.output:
        return Path(call.output).name
    from sdops.verbs._embed_write import check_layout, container_of, ending_of

    if not (to := call.arguments.get("to")):
        return f"{call.id}.safetensors"
    with told(call.step.step, call.arguments):
        layout = check_layout(to)
    return f"{call.id}{ending_of(layout, container_of(layout, None))}"
