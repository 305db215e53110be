"""A conversion that other steps of a recipe read: planned, and computed while it is read, as a merge is."""

from __future__ import annotations

from collections.abc import Mapping
from inspect import signature
from pathlib import Path
from typing import Any

from sdops import __version__
from sdops.archs.detect import detect
from sdops.core.run import piece_bytes
from sdops.core.source import Source
from sdops.core.view import View
from sdops.errors import UsageError
from sdops.verbs._convert_checkpoint import Conversion, derived_name
from sdops.verbs._hashes import part_record
from sdops.verbs._inputs import Opened
from sdops.verbs.convert import convert, planned

_FILES = ("safetensors", "original", "ckpt")  # forms that are one file of tensors as they are
_FORM = ("unet", "vae", "text_encoder", "tokenizer", "reference", "shard")  # files, and what changes no tensor


class Converted(View):
    """The tensors of a conversion, which says of itself how it is made.

    Args:
        conversion: What is read.
        arguments: The step's, with Sources in place.

    Attributes:
        parts: The inputs by role.
        made: The record, with placeholders for hashes.
    """

    def __init__(self, conversion: Conversion, arguments: Mapping[str, Any]) -> None:
        super().__init__(conversion.lazy, conversion.lazy.specs)
        self.name = derived_name(conversion.origin.path, conversion.wish).name
        self.metadata = conversion.draft.metadata
        self.warnings = conversion.warnings
        encoders = arguments.get("text_encoder")
        given = [("a", arguments["file"]), *((role, arguments.get(role)) for role in ("unet", "vae"))]
        given += [("text_encoder", one) for one in (encoders if isinstance(encoders, list) else [encoders])]
        self.parts = {f"{role}{number}": _opened(one) for number, (role, one) in enumerate(given) if one is not None}
        said = {key: value for key, value in arguments.items() if key not in ("file", *_FORM)}
        roles = [role for role, one in given if one is not None]
        inputs = [part_record(role, part) for role, part in zip(roles, self.parts.values(), strict=True)]
        self.made = {"version": __version__, "verb": "convert", "to": conversion.wish.to, **said, "inputs": inputs}

    def piece_bytes(self, key: str) -> int:
        """As the conversion's."""
        return piece_bytes(self.source, key)

    def close(self) -> None:
        """Nothing: the inputs belong to whoever opened them."""


def converted(arguments: Mapping[str, Any], place: Path) -> Converted:
    """A planned conversion.

    Args:
        arguments: Keywords of `convert`, Sources in place of files.
        place: A file that is not there, and never will be.

    Raises:
        UsageError: it makes something else than a file of tensors.
        SdopsError: as `convert`.
    """
    to = arguments.get("to") or "safetensors"
    if to not in _FILES:
        raise UsageError(
            f"other steps cannot read what is converted to {to}",
            hint='`to = "safetensors"`, or let it be the last step',
        )
    usual = {name: one.default for name, one in signature(convert).parameters.items()}
    options = {name: usual[name] for name in signature(planned).parameters}
    conversion = planned(**{**options, **arguments, "to": to, "output": place, "force": True})
    return Converted(conversion, arguments)


def _opened(source: Source) -> Opened:
    return Opened(source, source, detect(source.specs))
