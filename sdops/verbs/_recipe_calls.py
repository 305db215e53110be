"""The steps of a recipe as calls of verbs: a Source for the steps that use it, or a file.

`merge` and `apply` compute while they are read. What has to be known as a whole before its first byte is (the ranks of
a LoRA, an embedding) is worked out when its Source is asked for, and lies in a file without a name until it is used.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cached_property
from importlib import import_module
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from sdops.core.source import Source
from sdops.report import Report
from sdops.verbs._recipe_check import MARK, CheckedStep
from sdops.verbs._recipe_check_value import split_lora
from sdops.verbs._recipe_text import wrong
from sdops.verbs._recipe_told import told
from sdops.verbs._verb_card import VERBS, VerbParameter, lora_merge_card, verb_card

if TYPE_CHECKING:
    from sdops.verbs._recipe_convert import Converted
    from sdops.verbs.apply import Apply
    from sdops.verbs.merge import Merge

_FOLDERS = ("reference", "tokenizer")  # of which something else than tensors is read
File = Source | str  # what a step reads: another step, or a file


class Call:
    """A step with its files in place.

    Args:
        step: What the recipe says.
        files: Name of an input or step -> what stands for it.
        memory: Bytes that it shall stay below.

    Attributes:
        arguments: The verb's keywords; `models` and `files` are positional.
        output: The file that the step asks for itself, or empty.
    """

    def __init__(self, step: CheckedStep, files: Mapping[str, File], memory: int | None = None) -> None:
        self.step = step
        self.id = step.id
        self.verb = step.step.verb
        given = dict(step.arguments)
        self.output: str = given.pop("output", "")
        parameters = {**lora_merge_card().parameters} if verb_card(self.verb).knobs else {}
        parameters |= verb_card(self.verb).parameters
        self.arguments = {
            key: _in_place(parameters.get(key), value, files, f"{step.step.path}.{key}") for key, value in given.items()
        }
        if self.verb == "embed make":
            self.arguments["formula"] = _with_files(given["formula"], files, f"{step.step.path}.formula")
        self._memory = memory
        self._lazy: Merge | Apply | None = None

    @cached_property
    def is_lazy(self) -> bool:
        """Whether the result can be read before it is made."""
        return self.verb == "apply" or (self.verb == "merge" and not self.is_adapter)

    @cached_property
    def is_adapter(self) -> bool:
        """Whether a merge is one of LoRAs."""
        from sdops.verbs._adapter_peek import are_adapters

        return self.verb == "merge" and are_adapters(self.arguments["models"])

    @cached_property
    def is_conversion(self) -> bool:
        """Whether a checkpoint is converted: others read it while it is, but written it is by its own verb."""
        from sdops.verbs._adapter_peek import is_adapter

        return self.verb == "convert" and not is_adapter(self.arguments["file"])

    def lazy(self) -> Merge | Apply:
        """The planned merge or apply.

        Raises:
            SdopsError: as the verb.
        """
        if self._lazy is None:
            with told(self.step.step, self.arguments):
                self._lazy = cast("Merge | Apply", self._call({"memory": self._memory}))
        return self._lazy

    def converted(self, folder: Path) -> Converted:
        """The planned conversion.

        Args:
            folder: Where the recipe's results go.

        Raises:
            SdopsError: as the verb.
        """
        from sdops.verbs._recipe_convert import converted

        with told(self.step.step, self.arguments):
            return converted(self.arguments, folder / f".sdops-{self.id}.safetensors")

    def save(self, output: Path, running: Mapping[str, Any]) -> Report:
        """Write the result.

        Args:
            output: The file.
            running: jobs, memory, force, hash_inputs, dry_run, progress; what the verb does not know is left out.

        Raises:
            SdopsError: as the verb.
        """
        with told(self.step.step, self.arguments):
            if not self.is_lazy:
                return cast("Report", self._call({**running, "output": output}))
            lazy = self.lazy()
            if running["dry_run"]:
                return lazy.dry_run(output, force=running["force"], jobs=running["jobs"])
            return lazy.save(
                output,
                jobs=running["jobs"],
                force=running["force"],
                hash_inputs=running["hash_inputs"],
                progress=running["progress"],
            )

    def _call(self, more: Mapping[str, Any]) -> Any:
        module, name = VERBS[self.verb]
        function = getattr(import_module(f"sdops.verbs.{module}"), name)
        arguments = dict(self.arguments)
        if self.is_adapter:  # merge itself has no trial run for them
            from sdops.verbs._merge_adapters import merge_adapters

            return merge_adapters(arguments.pop("models"), **arguments, **_known(merge_adapters, more))
        starred = next((key for key, one in verb_card(self.verb).parameters.items() if one.kind == "files"), "")
        return function(*arguments.pop(starred, ()), **arguments, **_known(function, more))


def _with_files(formula: str, files: Mapping[str, File], path: str) -> str:
    """A formula with quoted files in place of `$name`."""

    def quoted(mark: re.Match[str]) -> str:
        file = str(files[mark[1]])
        if "'" in file and '"' in file:
            raise wrong(path, f"`{file}` has both kinds of quotes in its name", "rename it")
        return f'"{file}"' if "'" in file else f"'{file}'"

    return MARK.sub(quoted, formula)


def _known(function: Any, more: Mapping[str, Any]) -> dict[str, Any]:
    names = signature(function).parameters
    return {key: value for key, value in more.items() if key in names}


def _in_place(parameter: VerbParameter | None, value: Any, files: Mapping[str, File], path: str) -> Any:
    """A value with files in place of their names."""
    kind, key = (parameter.kind, parameter.name) if parameter else ("", "")
    if kind == "file" and key in _FOLDERS:
        return getattr(files[value], "path", files[value])
    if kind == "file" or (kind == "some" and isinstance(value, str)):
        return files[value]
    if kind in ("files", "some"):
        return [files[name] for name in value]
    if kind == "loras":
        return [(files[name], strength) for name, strength in (split_lora(item, path) for item in value)]
    return value
