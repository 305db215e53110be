"""What the environment says. Only this module reads `os.environ` (click reads `SDOPS_<COMMAND>_<OPTION>`).

SDOPS_CACHE        folder of the cache; default: the platform's cache folder + `sdops`
SDOPS_DEBUG        1 shows the traceback behind an error
SDOPS_NATIVE       0 computes with numpy where compiled code would be used
RANK, LOCAL_RANK, WORLD_SIZE            set by torchrun for each of several processes that train together
SDOPS_HUB_RETRIES  how often a request to the Hub that fails is made again; default: 5
HF_HOME, HF_HUB_CACHE                   where downloads are kept; HF_TOKEN, HF_ENDPOINT and the others are read by
                                        huggingface_hub itself
NO_COLOR, FORCE_COLOR, TERM=dumb        as elsewhere
"""

from __future__ import annotations

import os
import sys
from pathlib import Path


def cache_directory() -> Path:
    """Where sdops keeps what it can compute again. The folder need not exist."""
    if own := os.environ.get("SDOPS_CACHE"):
        return Path(own).expanduser()
    home = Path.home()
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or home / "AppData" / "Local") / "sdops" / "cache"
    if sys.platform == "darwin":
        return home / "Library" / "Caches" / "sdops"
    xdg = Path(os.environ.get("XDG_CACHE_HOME") or home / ".cache")
    return (xdg if xdg.is_absolute() else home / ".cache") / "sdops"  # the XDG text says: ignore relative paths


def hub_cache_directory() -> Path:
    """Where huggingface_hub keeps downloads, by its own rules and without importing it."""
    if own := os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE"):
        return Path(os.path.expandvars(os.path.expanduser(own)))
    xdg = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    home = os.environ.get("HF_HOME") or os.path.join(xdg, "huggingface")
    return Path(os.path.expandvars(os.path.expanduser(home))) / "hub"


def hub_endpoint() -> str:
    """The Hub's address, if it is another than huggingface.co."""
    return os.environ.get("HF_ENDPOINT", "").rstrip("/")


def hub_retries() -> int:
    """How often a request to the Hub is made again while it is busy or the connection breaks."""
    text = os.environ.get("SDOPS_HUB_RETRIES", "")
    return int(text) if text.isdigit() else 5


def debug() -> bool:
    """Whether errors show their traceback."""
    return os.environ.get("SDOPS_DEBUG", "") not in ("", "0")


def native() -> bool:
    """Whether compiled code may be used."""
    return os.environ.get("SDOPS_NATIVE", "") != "0"


def launched() -> tuple[int, int, int] | None:
    """Number of this process, its number on this machine, and of all, if torchrun started it; else None."""
    try:
        rank, local, size = (int(os.environ[name]) for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"))
    except (KeyError, ValueError):
        return None
    return rank, local, size


def colour_wish() -> bool | None:
    """What the environment asks for: True = colour even in a pipe, False = none, None = no opinion."""
    if os.environ.get("NO_COLOR"):
        return False
    if os.environ.get("FORCE_COLOR", "") not in ("", "0"):
        return True
    if os.environ.get("TERM") == "dumb":
        return False
    if sys.platform == "win32" and not ("WT_SESSION" in os.environ or "TERM" in os.environ):
        return False  # the old Windows console shows escape sequences as text
    return None


def completion_request() -> str | None:
    """What the shell's completion script asks for (`bash_complete`, ...), or None."""
    return os.environ.get("_SDOPS_COMPLETE") or None
