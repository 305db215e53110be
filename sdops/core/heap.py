"""How memory is kept: by the C library for runs that shall stay small, by Python while it makes what will be kept."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager

_TRIM_THRESHOLD, _MMAP_THRESHOLD, _ARENA_MAX = -1, -3, -8  # M_... of malloc.h in the GNU C library
_LARGE = 128 << 10


def stay_small() -> None:
    """Map every large block by itself, and let all threads share one heap.

    By default the first large block that is freed moves the threshold beyond its size: from then on such blocks leave
    holes in a heap that every thread has for itself.
    """
    import ctypes

    if sys.platform == "linux" and hasattr(library := ctypes.CDLL(None), "mallopt"):
        library.mallopt(_ARENA_MAX, 1)
        library.mallopt(_MMAP_THRESHOLD, _LARGE)
        library.mallopt(_TRIM_THRESHOLD, _LARGE)


@contextmanager
def no_garbage_collection() -> Iterator[None]:
    """Nothing that headers and plans are made of is garbage, and looking for some takes time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
