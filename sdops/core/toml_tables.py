"""Tables that come with sdops as TOML, read the way Python reads modules: compiled once, then from `__pycache__`.

All families' tables take 15 ms to parse, a tenth of the start of most commands, and 1 ms to read compiled. Whether a
compiled file is the current one (size and time of its source), and whether and where any is kept, is decided by the
import system, as for every module beside it. Nothing is executed but the making of one literal.
"""

from __future__ import annotations

from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any


class _TomlLoader(SourceFileLoader):
    """Makes a module with one name, `document`, of a TOML file."""

    @staticmethod
    def source_to_code(data: Any, path: Any = "", *, _optimize: int = -1) -> CodeType:
        """Compile the document as a literal."""
        import tomllib

        document = tomllib.loads(data.decode("utf-8"))
        return compile(f"document = {document!r}", path, "exec", dont_inherit=True, optimize=_optimize)


def read_toml(path: Path) -> dict[str, Any]:
    """What a TOML file of the package says. Not for files of users: it may leave a compiled file beside them."""
    module = ModuleType(path.stem)
    _TomlLoader(path.stem, str(path)).exec_module(module)
    document: dict[str, Any] = module.document
    return document
