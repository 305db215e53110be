"""The weights that an adapter was made for, by target: for families whose change depends on them."""

from __future__ import annotations

import os
from contextlib import suppress

import torch
from torch import Tensor

from sdops.core.assembled import Assembled, Made, joined, rows
from sdops.core.patch import Adapter, Target
from sdops.core.source import read
from sdops.core.stream import TORCH_DTYPES
from sdops.errors import MismatchError
from sdops.verbs._adapter_family import check_family
from sdops.verbs._extract_pairs import canonical
from sdops.verbs._inputs import open_model

_KINDS = ("model", "text_encoder")  # of components that adapters change


class Base:
    """A checkpoint whose tensors are asked for by target.

    Args:
        path: The checkpoint.
        adapter: What it shall fit.

    Raises:
        SdopsError: it cannot be read.
        MismatchError: it is of another architecture.
    """

    def __init__(self, path: str | os.PathLike[str], adapter: Adapter) -> None:
        self.model = open_model(path)
        check_family(adapter, self.model.detection, self.model.name)
        made: dict[str, Made] = {}
        for part in self.model.detection.components:
            if part.kind in _KINDS:
                with suppress(MismatchError):  # a component without names in adapters has no targets either
                    for key, pieces in canonical(self.model, part).items():
                        tensors = [rows(self.model.source, p.key, p.share, p.operation) for p in pieces]
                        made[f"{part.name}:{key}"] = joined(tensors) if len(tensors) > 1 else tensors[0]
        self.source = Assembled(self.model.name, made, {})

    def shape(self, target: Target, part: str = "weight") -> tuple[int, ...] | None:
        """Of a target's rows; None if the checkpoint has no such tensor."""
        spec = self.source.specs.get(_key(target, part))
        if spec is None:
            return None
        start, stop, total = target.share or (0, 1, 1)
        return ((stop - start) * spec.shape[0] // total, *spec.shape[1:])

    def tensor(self, target: Target, part: str = "weight") -> Tensor:
        """A target's rows of the weight or bias, float32, stored as the patch stores them (`Target.swapped`).

        Raises:
            MismatchError: the checkpoint has no such tensor.
        """
        key = _key(target, part)
        spec = self.source.specs.get(key)
        if spec is None:
            raise MismatchError(
                f"`{self.model.name}` has no {part} for `{target}`",
                hint="name the checkpoint that the adapter was made for with `--base`",
                target=target,
            )
        whole = torch.frombuffer(read(self.source, key), dtype=TORCH_DTYPES[spec.dtype]).reshape(spec.shape)
        start, stop, total = target.share or (0, 1, 1)
        wanted = whole[start * len(whole) // total : stop * len(whole) // total].float()
        return torch.cat(wanted.chunk(2)[::-1]) if target.swapped else wanted

    def close(self) -> None:
        """Close the checkpoint."""
        self.model.source.close()


def _key(target: Target, part: str) -> str:
    return f"{target.component}:{target.module}.{part}"
