"""A recipe out of the metadata that sdops writes into every result. Building it again gives the same bytes.

What stands in a file is a stranger's: it is turned into the values of a recipe's text, which are checked as any are.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from itertools import chain, count
from typing import Any

from sdops.errors import FormatError
from sdops.verbs._recipe_check import MOST_RECORDS
from sdops.verbs._recipe_text import MOST_INPUTS, MOST_STEPS, RESERVED, Recipe, from_document

LONGEST = 5_000_000  # characters of a record: far more than `MOST_RECORDS` steps need

_ROLES = ("base", "unet", "vae", "text_encoder", "reference")  # beside the models of a merge or conversion
_RECORD = ("version", "verb", "inputs", "knobs", "rounded")  # of a step's record: what is no parameter of the verb


def from_provenance(text: str, *, name: str, file: str) -> Recipe:
    """The recipe of a result.

    Args:
        text: What its metadata says under `sdops`.
        name: What the recipe is called.
        file: The result, for messages.

    Raises:
        FormatError: the text is no record of sdops, or of a verb that recipes do not have.
        UsageError: it says something that no recipe may say.
    """
    try:
        made = json.loads(text) if len(text) <= LONGEST else None
    except (ValueError, RecursionError):
        made = None
    if not isinstance(made, dict) or "verb" not in made:
        raise FormatError(
            f"`{file}` says in a way that is not understood how it was made",
            hint=f"`sdops meta {file}` shows what it says",
        )
    writer = _Writer(file)
    try:
        writer.step(made)
    except RecursionError:
        raise writer.wrong("its steps are nested too deeply") from None
    document: dict[str, Any] = {
        "name": name,
        "about": f"How {file} was made, by sdops {made.get('version', '?')}",
        "inputs": writer.inputs,
        "steps": writer.steps,
    }
    if writer.inputs and not any("sha256" in one for one in writer.inputs.values()):
        document["hash_inputs"] = False
    return from_document(document, name=name, folder=None, title=file)


class _Writer:
    """Collects inputs and steps, each once."""

    def __init__(self, file: str) -> None:
        self.file = file
        self.inputs: dict[str, dict[str, str]] = {}
        self.steps: list[dict[str, Any]] = []
        self._known: dict[str, str] = {}  # what an input or step is made of -> its name
        self._records = 0

    def step(self, made: Mapping[str, Any]) -> str:
        """Add the steps of a record; gives the last one's id."""
        self._records += 1
        if self._records > MOST_RECORDS:
            raise self.wrong(f"its steps use each other {MOST_RECORDS:,} times over")
        verb = str(made.get("verb"))
        arguments = dict(self._arguments(verb, made))
        identity = json.dumps([verb, arguments], sort_keys=True)
        if identity not in self._known:
            if len(self.steps) >= MOST_STEPS:
                raise self.wrong(f"it has more than {MOST_STEPS} steps")
            self._known[identity] = self._free(verb.replace(" ", "_"))
            self.steps.append({"id": self._known[identity], "verb": verb, **arguments})
        return self._known[identity]

    def _arguments(self, verb: str, made: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
        inputs = self._items(made)
        plain = {key: value for key, value in made.items() if key not in _RECORD}
        if verb == "merge":
            yield from self._merge(inputs, made)
        elif verb == "apply" and made.get("rounded") == "once":
            yield from self._merge_with_loras(inputs, made)
            return
        elif verb == "apply":
            yield "model", self._file(inputs[0])
            yield "lora", [self._lora(item) for item in inputs[1:]]
        elif verb == "extract":
            yield from ((str(item["role"]), self._file(item)) for item in inputs)
        elif verb == "resize":
            yield "lora", self._file(inputs[0])
        elif verb == "convert":
            roles = {"a": "file"}
            yield from ((roles.get(str(item["role"]), str(item["role"])), self._file(item)) for item in inputs)
        else:
            raise self.wrong(f"it was made by `{verb}`, which recipes do not have")
        yield from plain.items()

    def _merge(self, inputs: list[dict[str, Any]], made: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
        yield "models", [self._file(item) for item in inputs if item["role"] not in _ROLES]
        yield from ((str(item["role"]), self._file(item)) for item in inputs if item["role"] in _ROLES)
        knobs = made.get("knobs", {})
        if not isinstance(knobs, dict):
            raise self.wrong("its knobs are no table")
        yield from knobs.items()

    def _merge_with_loras(self, inputs: list[dict[str, Any]], made: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
        """A merge with `lora`, which is recorded as LoRAs on a merge."""
        merged = inputs[0].get("recipe")
        if not isinstance(merged, dict) or merged.get("verb") != "merge":
            raise self.wrong("LoRAs are said to be rounded with a merge that is none")
        yield "verb", "merge"
        yield from self._arguments("merge", merged)
        yield "lora", [self._lora(item) for item in inputs[1:]]
        del made

    def _items(self, made: Mapping[str, Any]) -> list[dict[str, Any]]:
        items = made.get("inputs")
        if not isinstance(items, list) or not items or not all(isinstance(item, dict) for item in items):
            raise self.wrong("a step of it has no inputs")
        return [{"role": "", **item} for item in items]

    def _lora(self, item: Mapping[str, Any]) -> list[Any]:
        strength = item.get("strength", 1.0)
        if isinstance(strength, dict):
            options = [f"{key}={value}" for key, value in strength.items() if key != "strength"]
            strength = ":".join([str(strength.get("strength", 1.0)), *options])
        return [self._file(item), strength]

    def _file(self, item: Mapping[str, Any]) -> str:
        """The name of an input, or the id of the step that makes it."""
        if isinstance(item.get("recipe"), dict):
            return self.step(item["recipe"])
        found = {"file": item.get("hub") or item.get("file") or "", "sha256": item.get("sha256", "")}
        entry = {key: str(value) for key, value in found.items() if value}
        identity = json.dumps(entry, sort_keys=True)
        if identity not in self._known:
            if len(self.inputs) >= MOST_INPUTS:
                raise self.wrong(f"it has more than {MOST_INPUTS:,} inputs")
            self._known[identity] = self._free(str(item.get("file", "model")).rpartition(".")[0] or "model")
            self.inputs[self._known[identity]] = entry
        return self._known[identity]

    def _free(self, text: str) -> str:
        """A name that is not taken yet."""
        stem = re.sub(r"[^a-z0-9]+", "_", text.lower()).strip("_")[:40]
        stem = stem if stem[:1].isalpha() else f"model_{stem}".rstrip("_")
        taken = {*self._known.values(), *RESERVED}
        return next(name for name in chain([stem], (f"{stem}_{n}" for n in count(2))) if name not in taken)

    def wrong(self, why: str) -> FormatError:
        """What is raised for a record that makes no recipe."""
        return FormatError(
            f"`{self.file}` cannot be made again: {why}", hint=f"`sdops meta {self.file}` shows what it says"
        )
