"""An adapter in the making: tensors that were computed or are copied, on their way into a file of any dialect."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from math import prod
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

from sdops.core.patch import Adapter, Patch, Target
from sdops.core.source import Source, read
from sdops.core.spec import Spec
from sdops.core.stream import TORCH_DTYPES
from sdops.errors import FormatError
from sdops.verbs._adapter_source import AdapterSource, Lazy
from sdops.verbs._extract_store import Place, Store

DTYPES = {"keep": "", "fp16": "F16", "bf16": "BF16", "fp32": "F32"}


class Pieces:
    """Tensors and patches of an adapter to be, in the order in which they are added.

    Args:
        folder: Where computed tensors wait: the output's, which has to have room for them anyway.
        name: For messages.
    """

    def __init__(self, folder: Path, name: str) -> None:
        self.name = name
        self.patches: list[Patch] = []
        self.extras: dict[str, str] = {}
        self._store = Store(folder, name)
        self._tensors: dict[str, Lazy] = {}
        self._sources: list[Source] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._store.close()

    def add_factors(self, target: Target, shape: tuple[int, ...], up: Tensor, down: Tensor, dtype: str) -> None:
        """A LoRA of a layer: `up` [o, r] and `down` [r, i kh kw], alpha = r, so that the scale is 1.

        Raises:
            FormatError: a number is too large for the dtype.
        """
        rank, kernel = up.shape[1], shape[2:]
        up, down = rounded(target, up, dtype), rounded(target, down, dtype)
        parts = {
            "up": self._put(f"{target}.up", up.reshape(shape[0], rank, *[1] * len(kernel)), dtype),
            "down": self._put(f"{target}.down", down.reshape(rank, *shape[1:]), dtype),
            "lora_alpha": self._put(f"{target}.alpha", torch.tensor(float(rank)), "F32"),
        }
        self.patches.append(Patch(target, "lora", parts))

    def add_full(self, target: Target, dtype: str, *, dense: Tensor | None = None, bias: Tensor | None = None) -> None:
        """A plain difference of a layer's weight or bias."""
        parts = {
            part: self._put(f"{target}.{part}", rounded(target, values, dtype), dtype)
            for part, values in (("diff", dense), ("diff_b", bias))
            if values is not None
        }
        self.patches.append(Patch(target, "full", parts))

    def keep(self, adapter: Adapter, patch: Patch) -> None:
        """A patch as it is, bit for bit."""
        parts = {part: self._copy(adapter, key) for part, key in patch.parts.items()}
        self.patches.append(Patch(patch.target, patch.family, parts, patch.settings))

    def keep_extras(self, adapter: Adapter) -> list[str]:
        """Embeddings and the like, bit for bit; returns those that another adapter had brought already."""
        double = [what for what in adapter.extras.values() if what in self.extras.values()]
        for key, what in adapter.extras.items():
            if what not in double:
                self.extras[self._copy(adapter, key)] = what
        return double

    def adapter(self, like: Adapter, metadata: Mapping[str, str]) -> Adapter:
        """All of it, for the architecture and in the dialect of another adapter."""
        source = AdapterSource(self.name, self._tensors, metadata)
        return Adapter(
            source, like.dialect, like.architecture, tuple(self.patches), dict(self.extras), variant=like.variant
        )

    def _put(self, key: str, values: Tensor, dtype: str) -> str:
        place: Place = self._store.put(values)
        spec = Spec(dtype, tuple(values.shape))
        self._store.name_tensor(key, spec, place)
        self._tensors[key] = Lazy(spec, partial(read, self._store, key))
        return key

    def _copy(self, adapter: Adapter, key: str) -> str:
        if adapter.source not in self._sources:
            self._sources.append(adapter.source)
        name = f"{self._sources.index(adapter.source)}:{key}"
        self._tensors[name] = Lazy(adapter.source.specs[key], partial(read, adapter.source, key))
        return name


def rounded(target: Target, values: Tensor, dtype: str) -> Tensor:
    """Values in the dtype of a file.

    Raises:
        FormatError: one is too large for it.
    """
    found = values.to(TORCH_DTYPES[dtype])
    if not bool(torch.isfinite(found).all()):
        raise FormatError(
            f"the change of `{target}` does not fit into {dtype}", hint="`--dtype fp32` holds it", target=target
        )
    return found


def dtype_of(adapter: Adapter, patch: Patch, wish: str) -> str:
    """The dtype of what is computed: the wish, or that of the patch's largest tensor."""
    if DTYPES[wish]:
        return DTYPES[wish]
    largest = max((adapter.source.specs[key] for key in patch.parts.values()), key=lambda spec: prod(spec.shape))
    return largest.dtype if largest.dtype in ("F16", "BF16", "F32") else "F32" if largest.dtype == "F64" else "F16"
