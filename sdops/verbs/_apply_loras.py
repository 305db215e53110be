"""The LoRAs of an `apply`, as the user names them: files, and how strongly each is to act where.

FILE                                      strength 1
FILE:0.8                                  one strength
FILE:0.8, IN00-IN05=0.2, *attn2*=0.5      a dial (core.dial): blocks, components, patterns
FILE:0.8:te=0.4:unet=0.7                  other strengths for the text encoders, for the U-Net or transformer
FILE:0.8:lbw=1,0,0,0,1,1,1,1,1,1,1,1      block weights that multiply the strength: numbers, a preset, or a dial
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sdops.archs.blocks import block_of, block_slots
from sdops.archs.detect import component_of, detect
from sdops.core.dial import Dial, DialValue, Place, parse_dial
from sdops.core.patch import Adapter
from sdops.errors import FormatError, UsageError
from sdops.hub import located
from sdops.verbs._adapters import AdapterFile, name_of, open_adapter
from sdops.verbs._file_strength import split_file
from sdops.verbs._inputs import Opened

Wish = AdapterFile | tuple[AdapterFile, DialValue]  # a LoRA as callers name it

_OPTIONS = ("te", "unet", "lbw")
_OPTION = re.compile(rf":\s*({'|'.join(_OPTIONS)})\s*=")


@dataclass(frozen=True, slots=True)
class Strength:
    """How strongly a LoRA acts on each tensor of a model.

    Attributes:
        dial: By block, component and name.
        given: The same as it was given, without what `te` and `unet` add.
        blocks: Factors beside it (`lbw`).
        te, unet: Of components that the model does not have, where it does not matter; None = as the dial says.
        encoders: Names of the components that are text encoders, for a model that lacks them.
    """

    dial: Dial
    given: Dial
    blocks: Dial | None = None
    te: float | None = None
    unet: float | None = None

    def of(self, model: Opened, key: str) -> float:
        """For one of the model's tensors."""
        place = key, block_of(model.detection, key), component_of(model.detection, key)
        return self.dial.resolve(*place) * (self.blocks.resolve(*place) if self.blocks else 1.0)

    def is_zero_for(self, component: str) -> bool:
        """Whether a component that the model does not have is not wanted anyway."""
        own = self.unet if component in ("unet", "transformer") else self.te
        return own == 0 or (own is None and self.dial.is_constant and self.dial.default == 0)

    def __str__(self) -> str:
        return f"{self.dial}" + (f", times block weights {self.blocks}" if self.blocks else "")

    def to_json(self) -> Any:
        """For the recipe: a number, or text that reads as the same strength; with the options in a table."""
        options = {"te": self.te, "unet": self.unet, "lbw": self.blocks.to_json() if self.blocks else None}
        given = {name: value for name, value in options.items() if value is not None}
        return {"strength": self.given.to_json(), **given} if given else self.given.to_json()


@dataclass(frozen=True, slots=True)
class Lora:
    """An opened adapter and its strength.

    Attributes:
        adapter: The file.
        opened: The same as the hashes want it.
        strength: How strongly it acts.
        spelled: The strength as the user wrote it, for file names.
    """

    adapter: Adapter
    opened: Opened
    strength: Strength
    spelled: str

    @property
    def name(self) -> str:
        """How messages call it."""
        return self.adapter.source.name


def open_loras(
    wishes: Sequence[Wish], model: Opened, *, allow_unknown: bool, architecture: str | None = None
) -> list[Lora]:
    """Open all adapters and read their strengths.

    Raises:
        UsageError: a strength is malformed, or names a block that the model does not have.
        FormatError: a file is no adapter, damaged, or not understood.
        SdopsError: there is no such file.
    """
    return [_open(wish, model, architecture, allow_unknown=allow_unknown) for wish in wishes]


def _open(wish: Wish, model: Opened, architecture: str | None, *, allow_unknown: bool) -> Lora:
    if isinstance(wish, tuple):
        path, given, options = wish[0], wish[1], dict[str, str]()
        if isinstance(given, str):
            given, options = split_options(given)
    elif isinstance(wish, str):
        path, text = split_file(wish)
        given, options = split_options(text)
    else:
        path, given, options = wish, 1.0, {}
    strength = _strength(given, options, model, name_of(path))
    try:
        adapter = open_adapter(path, allow_unknown=allow_unknown, architecture=architecture)
    except FormatError as error:
        if not isinstance(path, str | os.PathLike):
            raise
        from sdops.verbs._personal_files import not_a_lora

        raise not_a_lora(located(path), error) from None
    opened = Opened(adapter.source, adapter.source, detect(adapter.source.specs))
    spelled = f"{strength.dial.default:g}" if strength.dial.is_constant and not strength.blocks else "-blocks"
    return Lora(adapter, opened, strength, "" if spelled == "1" else spelled)


def split_options(text: str) -> tuple[str, dict[str, str]]:
    """The strength, and the options behind it."""
    found = list(_OPTION.finditer(f":{text}"))
    ends = [*(option.start() for option in found), len(text) + 1]
    options: dict[str, str] = {}
    for option, end in zip(found, ends[1:], strict=True):
        if option[1] in options:
            raise UsageError(f"`{option[1]}` is given twice in `{text}`", hint="give it once")
        options[option[1]] = f":{text}"[option.end() : end].strip()
    return f":{text}"[1 : max(ends[0], 1)].strip() or "1", options


def read_strength(given: DialValue, model: Opened, name: str) -> Strength:
    """A strength as it may stand behind a file's name, or a dial in any other form.

    Raises:
        UsageError: it is malformed, or names a block that the model does not have.
    """
    text, options = split_options(given) if isinstance(given, str) else (given, dict[str, str]())
    return _strength(text, options, model, name)


def _strength(given: DialValue, options: Mapping[str, str], model: Opened, name: str) -> Strength:
    """The dials of a LoRA, checked against the model."""
    detection = model.detection
    slots, parts = block_slots(detection), [part.name for part in detection.components]
    knob = f"strength of {name}"
    numbers = {
        option: _number(options[option], f"{option} of {name}") for option in ("te", "unet") if option in options
    }
    dial = plain = parse_dial(given, knob=knob, default=1.0, slots=slots, components=parts)
    kinds = {"te": "text_encoder", "unet": "model"}
    for option, number in numbers.items():
        own = {f"component:{part.name}": number for part in detection.components if part.kind == kinds[option]}
        more = parse_dial(own, knob=knob, default=dial.default, slots=slots, components=parts)
        dial = Dial(dial.knob, dial.default, dial.blocks, (*dial.rules, *more.rules), dial.notes)
    blocks = None
    if "lbw" in options:
        blocks = parse_dial(options["lbw"], knob=f"lbw of {name}", default=1.0, slots=slots, components=parts)
    ruled = [each for each in (dial, blocks) if each is not None and each.rules]
    if ruled:
        places = [Place(key, block_of(detection, key), component_of(detection, key)) for key in model.source.specs]
        for each in ruled:
            each.check(places)
    return Strength(dial, plain, blocks, numbers.get("te"), numbers.get("unet"))


def _number(text: str, knob: str) -> float:
    dial = parse_dial(text, knob=knob, default=1.0)
    if not dial.is_constant or dial.rules:
        raise UsageError(
            f"`{knob}` is one number, not `{text}`", hint="name blocks in the strength itself, or in `lbw=`"
        )
    return dial.default
