"""cloneofsimo's first files: torch lists `[up0, down0, up1, ...]`, in which nothing has a name. Up to three are a LoRA:

x.pt                  the U-Net's list
x.text_encoder.pt     the text encoder's; where there is no U-Net, x.pt
x.ti.pt               {token: vector}
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sdops.core.sink_shards import FilesSink
from sdops.core.sink_torch import TreeSink
from sdops.core.spec import Spec
from sdops.core.tree import Leaf

SUFFIX = ".pt"
_PARTS = ("up", "down")


def list_sink(path: Path, specs: Mapping[str, Spec], *, force: bool) -> FilesSink:
    """The files of an adapter whose tensors are named in the dialect cloneofsimo. They have no place for metadata.

    Args:
        path: The first of them.
        specs: Of the tensors.
        force: Replace what is there.

    Raises:
        OutputError: one of them exists or cannot be written.
    """
    files = []
    for file, tree in _trees(path, specs).items():
        leaves = tree.values() if isinstance(tree, dict) else tree
        files.append(TreeSink(file, tree, {leaf.key: leaf.spec for leaf in leaves}, force=force))
    return FilesSink(files, path, force=force)


def written(path: Path, specs: Mapping[str, Spec]) -> list[Path]:
    """The files that an adapter's tensors go to: one, or several lists."""
    return list(_trees(path, specs)) if path.suffix == SUFFIX else [path]


def _trees(path: Path, specs: Mapping[str, Spec]) -> dict[Path, Any]:
    """File -> what it holds."""
    trees: dict[Path, Any] = {}
    for model in ("unet", "text_encoder"):
        count = sum(key.startswith(f"{model}:") for key in specs) // len(_PARTS)
        names = [f"{model}:{number}:{part}" for number in range(count) for part in _PARTS]
        if names:
            trees[_beside(path, model) if trees else path] = [Leaf(name, specs[name]) for name in names]
    tokens = {key: Leaf(key, spec) for key, spec in specs.items() if ":" not in key}
    if tokens:
        trees[_beside(path, "ti")] = tokens
    return trees


def _beside(path: Path, what: str) -> Path:
    return path.with_name(f"{path.stem}.{what}{SUFFIX}")
