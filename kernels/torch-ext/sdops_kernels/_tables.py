"""Lists of tensors as tables that one launch can walk, and which tensors may share a launch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["CODES", "Device", "address_table", "aligned", "default_backend", "device_of", "same_device", "warps"]

#: dtype -> what the kernels call it (`_rounding.py`).
CODES = {
    torch.float16: 0,
    torch.bfloat16: 1,
    torch.float32: 2,
    torch.float8_e4m3fn: 3,
    torch.float8_e5m2: 4,
}

Device = torch.device


def default_backend(device: Device) -> str:
    """`triton` on a GPU where Triton can be imported, else `torch`."""
    if device.type not in ("cuda", "xpu"):
        return "torch"
    try:
        import triton  # noqa: F401
    except ImportError:
        return "torch"
    return "triton"


def same_device(tensors: Sequence[Tensor]) -> Device:
    """The device of all tensors.

    Raises:
        ValueError: there are several, or no tensors.
    """
    devices = {tensor.device for tensor in tensors}
    if len(devices) != 1:
        raise ValueError(f"all tensors must be on one device, these are on {sorted(map(str, devices)) or 'none'}")
    return devices.pop()


def device_of(device: Device) -> int:
    """How many programs keep a device busy: a few per multiprocessor; a handful where there is none (interpreter)."""
    if device.type != "cuda":
        return 3
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def warps() -> int:
    """Of 1024 elements every thread shall read 16 bytes at once: 128 threads, and AMD's warps have 64."""
    return 4 if torch.version.hip is None else 2


def aligned(*addresses: int) -> bool:
    """Whether 16 bytes can be read at once from all of them."""
    return all(address % 16 == 0 for address in addresses)


def address_table(rows: Sequence[Sequence[int]], device: Device) -> Tensor:
    """int64 [problems, columns] on the device."""
    return torch.tensor(rows, dtype=torch.int64).to(device)
