"""A limit on what threads may hold at the same time."""

from __future__ import annotations

import threading


class Budget:
    """Lets threads hold whole tensors only as long as their sum stays below a limit; one is always let in."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._held = 0
        self._changed = threading.Condition()

    def hold(self, nbytes: int) -> _Hold:
        """A context manager that waits for room."""
        return _Hold(self, nbytes)

    def take(self, nbytes: int) -> None:
        """Wait until `nbytes` fit, or nothing else is held."""
        with self._changed:
            self._changed.wait_for(lambda: self._held == 0 or self._held + nbytes <= self.limit)
            self._held += nbytes

    def give(self, nbytes: int) -> None:
        """Return what was taken."""
        with self._changed:
            self._held -= nbytes
            self._changed.notify_all()


class _Hold:
    def __init__(self, budget: Budget, nbytes: int) -> None:
        self.budget, self.nbytes = budget, nbytes

    def __enter__(self) -> None:
        if self.nbytes:
            self.budget.take(self.nbytes)

    def __exit__(self, *_: object) -> None:
        if self.nbytes:
            self.budget.give(self.nbytes)
