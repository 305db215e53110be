"""Deltas of whole adapters, and files of the fixtures."""

from __future__ import annotations

from pathlib import Path

import torch

from fixtures import loras
from sdops import adapters
from sdops.core.patch import Adapter
from sdops.core.run import run
from sdops.core.sink import SafetensorsSink
from sdops.core.source import read
from sdops.verbs._adapters import Spelled, open_adapter, read_parts


def fixture(folder: Path, dialect: str, architecture: str, family: str = "lora") -> Adapter:
    layers = loras.SPELLINGS[dialect, architecture]
    path = loras.save(folder / f"{dialect}-{architecture}-{family}.safetensors", loras.tensors(dialect, layers, family))
    return open_adapter(path)


def save(spelled: Spelled, folder: Path) -> Path:
    """Through the run and the sink, with its companions beside it."""
    folder.mkdir(exist_ok=True)
    path = folder / "adapter_model.safetensors"
    with SafetensorsSink(path, spelled.source.specs, spelled.source.metadata, force=True) as sink:
        run(spelled.source, sink, jobs=2)
        sink.commit()
    for name, text in spelled.companions.items():
        (folder / name).write_text(text)
    return path


def bytes_of(adapter: Adapter) -> dict[str, tuple[object, bytes]]:
    return {key: (spec, bytes(read(adapter.source, key))) for key, spec in adapter.source.specs.items()}


def deltas(adapter: Adapter) -> dict[str, torch.Tensor]:
    """`component:module` -> the change of the whole weight as a matrix, of families that need no base."""
    found: dict[str, torch.Tensor] = {}
    for patch in adapter.patches:
        family = adapters.family(patch.family)
        parts = read_parts(adapter, patch)
        facts = family.check({part: tuple(value.shape) for part, value in parts.items()}, None)
        assert facts.rows is not None
        assert facts.columns is not None
        delta = family.delta(parts, (facts.rows, facts.columns), None, **patch.settings)
        if patch.target.swapped:
            delta = torch.cat(delta.chunk(2)[::-1])
        start, stop, total = patch.target.share or (0, 1, 1)
        rows = facts.rows * total // (stop - start)
        name = f"{patch.target.component}:{patch.target.module}"
        whole = found.setdefault(name, torch.zeros(rows, facts.columns))
        whole[rows * start // total : rows * stop // total] += delta
    return found


def assert_same_deltas(one: Adapter, other: Adapter, tolerance: float = 1e-6) -> None:
    left, right = deltas(one), deltas(other)
    assert left.keys() == right.keys()
    for name, delta in left.items():
        assert torch.linalg.norm(delta - right[name]) <= tolerance * torch.linalg.norm(delta), name
