"""How the C library keeps memory, for runs that shall stay small: what is freed goes back to the system at once."""

from __future__ import annotations

import ctypes
import sys

_TRIM_THRESHOLD, _MMAP_THRESHOLD, _ARENA_MAX = -1, -3, -8  # M_... of malloc.h in the GNU C library
_LARGE = 128 << 10


def stay_small() -> None:
    """Map every large block by itself, and let all threads share one heap.

    By default the first large block that is freed moves the threshold beyond its size: from then on such blocks leave
    holes in a heap that every thread has for itself.
    """
    if sys.platform == "linux" and hasattr(library := ctypes.CDLL(None), "mallopt"):
        library.mallopt(_ARENA_MAX, 1)
        library.mallopt(_MMAP_THRESHOLD, _LARGE)
        library.mallopt(_TRIM_THRESHOLD, _LARGE)
