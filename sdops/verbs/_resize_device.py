"""The changes of a LoRA's layers in terms of their singular vectors, made on a device, many layers at once."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import replace

from sdops.core import accel
from sdops.core.patch import Adapter, Patch
from sdops.verbs._adapter_changes import Change, change_of, has_factors

BATCH = 64  # layers that are read and decomposed together


class Decomposed:
    """Reads changes as `change_of` does; those that are products come with orthogonal factors. For several threads.

    Args:
        adapter: The file.
        most: Per patch, see `change_of`.
        device: Where the work is done.
    """

    def __init__(self, adapter: Adapter, most: Sequence[int | None], device: str) -> None:
        self._adapter, self._device = adapter, device
        work = [(p, limit) for p, limit in zip(adapter.patches, most, strict=True) if has_factors(p)]
        batches = [work[begin : begin + BATCH] for begin in range(0, len(work), BATCH)]
        self._batches = {id(patch): batch for batch in batches for patch, _ in batch}
        self._made: dict[int, Change] = {}
        self._lock = threading.Lock()

    def __call__(self, patch: Patch) -> Change:
        """A patch's change; each is asked for once, about in the file's order."""
        with self._lock:
            if id(patch) not in self._made:
                self._decompose(self._batches[id(patch)])
            return self._made.pop(id(patch))

    def _decompose(self, batch: Sequence[tuple[Patch, int | None]]) -> None:
        changes = [change_of(self._adapter, patch, most=most) for patch, most in batch]
        found = dict(zip((id(patch) for patch, _ in batch), changes, strict=True))
        products = {key: change for key, change in found.items() if change.up is not None and not change.is_svd}
        sent = [[part.to(self._device) for part in change.factors] for change in products.values()]
        factors = accel.kernels().singular_factors(*zip(*sent, strict=True)) if sent else []
        for (key, change), (up, down) in zip(products.items(), factors, strict=True):
            found[key] = replace(change, up=up.cpu(), down=down.cpu(), is_svd=True)
        self._made |= found
