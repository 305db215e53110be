"""Tables that come with sdops as TOML, read the way Python reads modules: compiled once, then from `__pycache__`.

The tables of all families take 14 ms to parse and 2 ms to read compiled, every time a command starts. Whether a
compiled file is the current one (size and time of its source), and whether and where any is kept, is decided by the
import system, as for every module beside it. Such a file is a module that has the whole `document`.
"""

from __future__ import annotations

import json
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any


class _TomlLoader(SourceFileLoader):
    """Makes a module of a TOML file, in which `document` is what the file says."""

    @staticmethod
    def source_to_code(data: Any, path: Any = "", *, _optimize: int = -1) -> CodeType:
        """Compile the document as JSON: a literal in Python takes as long to compile as TOML to parse."""
        import tomllib

        text = json.dumps(tomllib.loads(data.decode("utf-8")))
        code = f"import json\ndocument = json.loads({text!r})"
        return compile(code, path, "exec", dont_inherit=True, optimize=_optimize)


def read_toml(path: Path) -> dict[str, Any]:
    """What a TOML file of the package says. Not for files of users: it may leave a compiled file beside them."""
    module = ModuleType(path.stem)
    _TomlLoader(path.stem, str(path)).exec_module(module)
    document: dict[str, Any] = module.document
    return document
