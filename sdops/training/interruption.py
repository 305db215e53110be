"""Ctrl-C and requests to end, held back until the step is done, so that what was learnt can be saved."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interruption:
    """Within it the first signal is only noted; a second one acts at once, as without it.

    Args:
        note: Told when the first one comes.
    """

    def __init__(self, note: Callable[[], None]) -> None:
        self._note = note
        self._usual: dict[int, Any] = {}
        self._came: int | None = None

    def __enter__(self) -> Interruption:
        if threading.current_thread() is threading.main_thread():  # no other may change handlers
            for number in _SIGNALS:
                usual = signal.getsignal(number)
                if usual not in (signal.SIG_IGN, None):
                    self._usual[number] = signal.signal(number, self._hold)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._give_back()

    @property
    def came(self) -> bool:
        """Whether the run is to end."""
        return self._came is not None

    def act(self) -> None:
        """Let the signal that came do what it usually does."""
        if self._came is not None:
            signal.raise_signal(self._came)

    def _hold(self, number: int, frame: FrameType | None) -> None:
        del frame
        self._came = number
        self._give_back()
        self._note()

    def _give_back(self) -> None:
        for number, usual in self._usual.items():
            signal.signal(number, usual)
        self._usual.clear()
