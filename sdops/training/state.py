"""Everything that a run needs to go on: values, moments and the step, in one safetensors file beside the output."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sdops import __version__
from sdops.core.sink import SafetensorsSink
from sdops.core.source import read
from sdops.core.spec import Spec
from sdops.errors import MismatchError, UsageError
from sdops.formats import open_file
from sdops.training.config import Config
from sdops.training.pictures import Picture

_KEY = "sdops.training"


@dataclass(frozen=True, slots=True)
class State:
    """Where a run stands.

    Attributes:
        step: Steps that are done.
        tensors: Of the optimizer, by name.
    """

    step: int
    tensors: dict[str, Tensor]


def identity(
    method: str, config: Config, batch: int, names: Sequence[str], pictures: Sequence[Picture]
) -> dict[str, Any]:
    """What a continuation must have in common with the run that it continues; `batch` counts all processes."""
    seen = [f"{picture.digest} {picture.caption}" for picture in pictures]
    return {
        "method": method,
        "settings": {**config.fixed(), "batch": batch},
        "parameters": _digest(names),
        "pictures": _digest(seen),
    }


def _digest(texts: Sequence[str]) -> str:
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()


def write(path: Path, state: State, identity: Mapping[str, Any]) -> None:
    """Write a state; the old one is there until the new one is complete.

    Raises:
        OutputError: it cannot be written.
    """
    flat = {name: value.detach().float().cpu().contiguous() for name, value in state.tensors.items()}
    specs = {name: Spec("F32", tuple(value.shape)) for name, value in flat.items()}
    told = {"version": __version__, "step": state.step, **identity}
    with SafetensorsSink(path, specs, {_KEY: json.dumps(told)}, force=True) as sink:
        for name, value in flat.items():
            sink.write(name, 0, value.reshape(-1).view(torch.uint8).numpy().data)
        sink.commit()


def load(path: Path, identity: Mapping[str, Any]) -> State:
    """Read the state of a run that is to go on.

    Raises:
        UsageError: settings differ that make it another run.
        MismatchError: the pictures are not the same.
    """
    source = open_file(path)
    try:
        told = json.loads(source.metadata.get(_KEY, "{}"))
        _compare(path, told, identity)
        tensors = {
            name: torch.frombuffer(read(source, name), dtype=torch.float32).reshape(spec.shape)
            for name, spec in source.specs.items()
        }
    finally:
        source.close()
    return State(int(told["step"]), tensors)


def _compare(path: Path, told: Mapping[str, Any], identity: Mapping[str, Any]) -> None:
    if not told:
        raise UsageError(f"`{path}` is no state of a training", hint="leave `--resume` away to begin")
    then, now = told["settings"], identity["settings"]
    names = [name for name in now if then.get(name) != now[name]]
    if told["method"] != identity["method"] or names:
        shown = ", ".join(f"`{name}` was {then.get(name)!r} and is {now[name]!r}" for name in names[:3])
        raise UsageError(
            f"this would not go on with the run in `{path}`: {shown or 'the method is another one'}",
            hint="give the settings of that run, or leave `--resume` away",
            settings=names,
        )
    for name in ("pictures", "parameters"):
        if told[name] != identity[name]:
            raise MismatchError(
                f"this would not go on with the run in `{path}`: the {name} are not the same",
                hint="put back what was there, or leave `--resume` away",
            )
