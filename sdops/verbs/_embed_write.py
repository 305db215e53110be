"""Writes embeddings in any layout and container, atomically."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sdops.core.casting import cast, raw_dtype
from sdops.core.sink import FileSink, SafetensorsSink
from sdops.core.sink_shards import BytesSink
from sdops.core.sink_torch import TreeSink
from sdops.core.spec import Spec
from sdops.core.tree import Leaf
from sdops.embeddings import WRITABLE, layout
from sdops.embeddings._types import AMBIGUOUS, Embedding, Vectors, Written
from sdops.errors import MismatchError, UsageError
from sdops.text import suggest

DTYPES = {"fp32": "F32", "fp16": "F16", "bf16": "BF16", "fp64": "F64"}
_CONTAINERS = {".pt": "torch", ".bin": "torch", ".ckpt": "torch", ".safetensors": "safetensors", ".png": "png"}


def check_layout(name: str) -> str:
    """The name of a layout that sdops writes, `-` for `_` allowed.

    Raises:
        UsageError: there is none.
    """
    plain = name.replace("-", "_")
    if plain not in WRITABLE:
        close = suggest(plain, WRITABLE)
        hint = f"did you mean `{close}`?" if close else f"one of {', '.join(WRITABLE)}"
        raise UsageError(f"there is no layout `{name}` to write", hint=hint)
    return plain


def container_of(name: str, output: Path | None) -> str:
    """What a layout lies in: as the output's ending says, else as is usual.

    Raises:
        UsageError: the layout is never in such a file.
    """
    module = layout(name)
    if output is None or not output.suffix:
        return str(module.CONTAINERS[0])
    endings = {ending: container for container, ending in module.ENDING.items()}
    wanted = endings.get(output.suffix) or _CONTAINERS.get(output.suffix.lower(), "")
    if wanted not in module.CONTAINERS:
        raise UsageError(
            f"`{name}` embeddings are never `{output.suffix}` files",
            hint=f"`-o {output.with_suffix(next(iter(module.ENDING.values())))}`",
        )
    return str(wanted)


def ending_of(name: str, container: str) -> str:
    """How files of a layout end."""
    return str(layout(name).ENDING[container])


def file_name(embedding_name: str) -> str:
    """A name as a file's: what separates folders, and what no keyboard types, becomes `_`."""
    plain = re.sub(r"[^\w.()<>@+ -]", "_", embedding_name).strip(". ")
    return plain[:100] or "embedding"


def check_kinds(embeddings: Sequence[Embedding]) -> None:
    """Refuse to write what may be one thing or another.

    Raises:
        MismatchError: an embedding's kind is not known.
    """
    for one in embeddings:
        if one.kind == AMBIGUOUS:
            raise MismatchError(
                f"`{one.name}` may be a word's vector or a CLIP image vector (aesthetic), the file does not say which",
                hint="say it with `--kind tokens` or `--kind clip-image`",
            )


def save(files: Sequence[Written], paths: Sequence[Path], container: str, *, force: bool, dtype: str | None) -> None:
    """Write files, all of them sealed before the first gets its name.

    Args:
        files: From a layout's `write`.
        paths: One each.
        container: `torch`, `safetensors` or `png`.
        force: Replace existing ones.
        dtype: Round to it; None keeps what the values were stored in.

    Raises:
        OutputError: a target exists or cannot be written.
    """
    with ExitStack() as stack:
        sinks = []
        for file, path in zip(files, paths, strict=True):
            sink, tensors = _sink(file, path, container, force=force, dtype=dtype)
            sinks.append(stack.enter_context(sink))
            for key, raw in tensors.items():
                sink.write(key, 0, memoryview(raw))
            sink.seal()
        for sink in sinks:
            sink.publish()


def _sink(
    file: Written, path: Path, container: str, *, force: bool, dtype: str | None
) -> tuple[FileSink, Mapping[str, bytes]]:
    if container == "png":
        return BytesSink(path, file.tree, force=force), {}
    tensors: dict[str, bytes] = {}
    specs: dict[str, Spec] = {}

    def named(value: Any, key: str) -> Any:
        """The tree with Leafs; tensors go to `tensors` under the last names on their way."""
        if type(value) is dict:
            return {name: named(item, str(name)) for name, item in value.items()}
        if type(value) is list:
            return [named(item, key) for item in value]
        if type(value) is not Vectors:
            return value
        key = key if container == "safetensors" else str(len(specs))
        raw, specs[key] = stored(value, dtype)
        tensors[key] = raw.tobytes()
        return Leaf(key, specs[key])

    tree = named(file.tree, "")
    if container == "safetensors":
        return SafetensorsSink(path, specs, file.metadata, force=force), tensors
    return TreeSink(path, tree, specs, force=force), tensors


def stored(vectors: Vectors, dtype: str | None) -> tuple[NDArray[Any], Spec]:
    """The raw values as they lie in a file."""
    values = np.ascontiguousarray(vectors.values)
    if values.dtype.kind != "f":
        return values, Spec("I64", values.shape)
    wide = "F64" if values.dtype == np.float64 else "F32"
    target = dtype or vectors.dtype
    out = np.empty(values.shape, raw_dtype(target)).reshape(-1)
    cast(values.reshape(-1).view(raw_dtype(wide)), wide, out, target)
    return out, Spec(target, values.shape)


def plan_paths(
    name: str, embeddings: Sequence[Embedding], output: str | os.PathLike[str] | None, folder: Path
) -> tuple[str, list[tuple[Path, list[Embedding]]]]:
    """The container, and which embeddings go into which file.

    A layout that holds one embedding gives a file for each; then `output` is a folder.

    Raises:
        UsageError: several embeddings would have to go into one such file, or the ending is wrong.
    """
    path = None if output is None or os.fspath(output).endswith("/") or Path(output).is_dir() else Path(output)
    container = container_of(name, path)
    many = layout(name).HOLDS_MANY or len(embeddings) == 1
    if path is not None:
        if not many:
            raise UsageError(
                f"`{name}` files hold one embedding, here are {len(embeddings)}",
                hint=f"name a folder: `mkdir {path.with_suffix('')}`, `-o {path.with_suffix('')}/`; or `--only NAME`",
            )
        return container, [(path, list(embeddings))]
    base = folder if output is None else Path(output)
    groups = [list(embeddings)] if many else [[one] for one in embeddings]
    ending = ending_of(name, container)
    return container, [(base / (file_name(group[0].label) + ending), group) for group in groups]
