"""What a bug report needs to know of the machine. The one verb that imports torch to ask for devices."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from sdops import __version__, settings
from sdops.report import Report, Section
from sdops.text import size

PACKAGES = ("torch", "numpy", "safetensors", "huggingface_hub", "click", "rich", "triton")


def env() -> Report:
    """Versions, devices, memory and cache folders. The home folder is written as `~`, no other path is shown."""
    facts: dict[str, dict[str, str]] = {
        "versions": {"sdops": __version__, "python": platform.python_version(), **_packages()},
        "machine": {
            "system": platform.platform(),
            "processor": f"{_processor()}, {os.cpu_count()} threads",
            "memory": _memory(),
        },
        "devices": _devices(),
        "folders": {"cache": _short(settings.cache_directory()), "hub": _short(settings.hub_cache_directory())},
    }
    sections = [Section(name, [[key, value] for key, value in rows.items()]) for name, rows in facts.items()]
    return Report("env", data=dict(facts), sections=sections, result=[f"sdops {__version__}"])


def _packages() -> dict[str, str]:
    return {name: _version(name) for name in PACKAGES}


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _memory() -> str:
    try:
        return size(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    except (AttributeError, ValueError, OSError):  # Windows has no sysconf
        return "unknown"


def _devices() -> dict[str, str]:
    """Device -> description. A torch that does not import is what the report may be about."""
    try:
        import torch
    except (ImportError, OSError, RuntimeError) as error:
        return {"torch": f"does not import: {error}"}
    devices = {"cpu": f"{torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"}
    for index in range(torch.cuda.device_count()):
        about = torch.cuda.get_device_properties(index)
        runtime = f"ROCm {torch.version.hip}" if torch.version.hip else f"CUDA {torch.version.cuda}"
        devices[f"cuda:{index}"] = f"{about.name}, {size(about.total_memory)}, {runtime}"
    if torch.backends.mps.is_available():
        devices["mps"] = "Metal"
    return devices


def _short(path: Path) -> str:
    home = Path.home()
    return f"~/{path.relative_to(home).as_posix()}" if path.is_relative_to(home) else str(path)
