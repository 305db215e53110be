"""Steps that have to be done before others can read them: LoRAs, whose ranks are known when they are worked out.

They are written into a folder that vanishes when the recipe is built; it lies beside the output, where there is room.
In memory they would take more than all else that a build holds: hundreds of megabytes for a LoRA of SDXL.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sdops.archs.detect import detect
from sdops.core.source import Source
from sdops.formats import open_source
from sdops.verbs._build_place import place
from sdops.verbs._inputs import Opened, open_model
from sdops.verbs._recipe_calls import Call, File
from sdops.verbs._recipe_sources import MadeFile
from sdops.verbs._recipe_told import told

_ORDER = {"extract": ("tuned", "base"), "resize": ("lora",), "merge": ("models", "base"), "convert": ("file", "base")}


def placeholder(call: Call) -> Source:
    """A Source to plan on: the layers of the LoRA to be, in rank 1 or in those that they have now.

    Raises:
        SdopsError: as the verb's own checks.
    """
    first = _inputs(call)[0]
    if call.verb != "extract":
        return open_source(first) if isinstance(first, str) else first
    from sdops.verbs._adapters import spelled
    from sdops.verbs._extract_output import rank_one
    from sdops.verbs._extract_pairs import pairs

    with told(call.step.step, call.arguments):
        tuned, base = open_model(first), open_model(_inputs(call)[1])
        chosen = [call.arguments.get(key, ()) for key in ("include", "exclude")]
        found = pairs(tuned, base, *chosen)
        return spelled(rank_one(found.layers, tuned), call.arguments.get("to", "kohya")).source


@contextmanager
def worker(folder: Path, running: Mapping[str, Any]) -> Iterator[Callable[[Call], Source]]:
    """Gives what does a step and hands over its result.

    Args:
        folder: Where the folder that vanishes is made.
        running: As for `Call.save`.
    """
    with place(folder) as own:
        opened: list[Source] = []

        def work(call: Call) -> Source:
            inputs = _inputs(call)
            stem = Path(_name(inputs[0])).stem
            path = own / call.id / f"{stem}.{call.verb}.safetensors"
            path.parent.mkdir()
            call.save(path, running)
            made = open_source(path)
            opened.append(made)
            return MadeFile(made, {str(number): _opened(one) for number, one in enumerate(inputs)})

        try:
            yield work
        finally:
            for made in opened:
                made.close()


def _inputs(call: Call) -> list[File]:
    """What a step is made of, in the order of its record."""
    found: list[File] = []
    for key in _ORDER[call.verb]:
        value = call.arguments.get(key)
        found += value if isinstance(value, list) else [] if value is None else [value]
    return found


def _name(file: File) -> str:
    return Path(file).name if isinstance(file, str) else file.name


def _opened(file: File) -> Opened:
    source = open_source(file) if isinstance(file, str) else file
    return Opened(source, source, detect(source.specs))
