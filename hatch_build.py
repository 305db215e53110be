"""Compile sdops/core/*.c while a wheel is built, if there is a C compiler; sdops works without, only slower.

The library is plain C behind ctypes: it depends on the platform, but on no version of Python.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

FLAGS = ["-std=c11", "-D_POSIX_C_SOURCE=200809L", "-O3", "-funroll-loops", "-fPIC", "-shared"]
FLAGS += ["-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"]
X86 = ["-mavx2", "-mf16c", "-mfma"]  # what sdops_version asks the processor for
PROCESSOR = {"x86_64": X86, "AMD64": X86, "aarch64": [], "arm64": []}


class NativeHook(BuildHookInterface[Any]):
    """Adds the compiled library to wheels, and to the source folder of editable installs."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Called before files are collected."""
        del version
        folder = Path(self.root, "sdops", "core")
        if self.target_name != "wheel" or not compile_library(sorted(folder.glob("*.c")), folder / "libexact.so"):
            return
        build_data["artifacts"].append("sdops/core/libexact.so")
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{sysconfig.get_platform().replace('-', '_').replace('.', '_')}"


def compile_library(sources: list[Path], library: Path) -> bool:
    """Whether `library` was made; what the compiler says goes to stderr."""
    library.unlink(missing_ok=True)
    compiler = shutil.which(os.environ.get("CC", "cc"))
    if compiler is None or sys.platform == "win32" or platform.machine() not in PROCESSOR:
        print(f"no C compiler for {platform.machine()}: merges will use numpy and torch", file=sys.stderr)
        return False
    command = [compiler, *FLAGS, *PROCESSOR[platform.machine()], "-o", str(library), *map(str, sources), "-lm"]
    return subprocess.run(command, check=False).returncode == 0
