"""The kernels package, and the device that they run on: both optional, both looked for when they are needed.

`sdops_kernels` (folder kernels/torch-ext) imports nothing of sdops and works on a CPU as well, by torch functions.
"""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import Any

from sdops.errors import UsageError

DEVICES = ("cpu", "cuda")


def kernels() -> Any:
    """The kernels package.

    Raises:
        UsageError: it is not installed.
    """
    if find_spec("sdops_kernels") is None:
        raise UsageError(
            "this needs the package `sdops_kernels`, which is not installed",
            hint="`pip install --editable .` in the source folder installs it beside sdops",
        )
    return import_module("sdops_kernels")


def check_device(device: str) -> None:
    """Refuse a device that is not there, before a tensor is read.

    Raises:
        UsageError: it is unknown, or there is no GPU that torch can use, or Triton is missing.
    """
    if device not in DEVICES:
        raise UsageError(f"`device` cannot be `{device}`", hint=f"choose one of {', '.join(DEVICES)}")
    if device == "cpu":
        return
    import torch

    kernels()
    if not torch.cuda.is_available():
        built = torch.version.cuda or getattr(torch.version, "hip", None)
        reason = "finds none" if built else f"{torch.__version__} is built without CUDA"
        raise UsageError(
            f"`--device cuda` needs a GPU, and torch {reason}",
            hint="`sdops env` shows what is there; without `--device` the CPU does the same",
        )
    if find_spec("triton") is None:
        raise UsageError("`--device cuda` needs Triton", hint='`pip install "sdops[gpu]"` installs it')
