"""Where an adapter is written: a file, or for PEFT a folder with a file of a fixed name and its configuration."""

from __future__ import annotations

import os
from pathlib import Path

from sdops.core.sink import check_parent, check_target
from sdops.errors import OutputError, UsageError

PEFT_WEIGHTS = "adapter_model.safetensors"
_SUFFIX = ".safetensors"
_TORCH = (".pt", ".pth", ".bin", ".ckpt")


def adapter_path(default: str, output: str | os.PathLike[str] | None, to: str) -> Path:
    """The file to write.

    Args:
        default: Name of the file where the user gives none, `x.safetensors`.
        output: What the user gives: for PEFT the folder, or the file in it.
        to: The dialect.

    Raises:
        UsageError: PEFT would not find a file of this name, or the name's ending promises another container.
    """
    if to != "peft":
        path = Path(default if output is None else output)
        if path.suffix in _TORCH and (path.suffix, to) != (".pt", "cloneofsimo"):
            raise UsageError(
                f"`{path}` would be a torch file, and LoRAs of the dialect `{to}` are safetensors",
                hint=f"`-o {path.with_suffix(_SUFFIX)}`; only `--to cloneofsimo` has torch files, `.pt`",
            )
        return path
    path = Path(default.removesuffix(_SUFFIX) if output is None else output)
    if path.name == PEFT_WEIGHTS:
        return path
    if path.suffix == _SUFFIX:
        raise UsageError(f"PEFT's adapters are folders, `{path}` is a file", hint=f"`-o {path.with_suffix('')}`")
    return path / PEFT_WEIGHTS


def shown(path: Path) -> Path:
    """What the user calls the result: of PEFT the folder."""
    return path.parent if path.name == PEFT_WEIGHTS else path


def workplace(path: Path) -> Path:
    """A folder that is there already, on the disk of the output."""
    folder = path.resolve().parent
    return folder if folder.is_dir() else folder.parent


def check_place(path: Path, companions: tuple[str, ...], *, force: bool) -> None:
    """Refuse what is there already, or cannot be written.

    Args:
        path: The file.
        companions: Names of files that belong beside it.
        force: Replace them.

    Raises:
        OutputError: naming it.
    """
    if path.name == PEFT_WEIGHTS and not path.parent.exists():
        check_parent(path.parent)  # the folder will be made
        return
    check_target(path, force=force)
    for name in companions:
        beside = path.parent / name
        if beside.exists() and not force:
            raise OutputError(f"`{beside}` exists already", hint="`--force` replaces it; `-o` names another folder")
