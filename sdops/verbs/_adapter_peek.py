"""Is a file an adapter? Told from its header's bytes, because every merge asks. No torch, no parsing."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import cast

from sdops.archs.detect import detect
from sdops.core.source import Source
from sdops.errors import MismatchError, SdopsError
from sdops.formats import FileSource, open_source
from sdops.formats._file import InputFile
from sdops.hub import located

# A tensor whose name only adapters have. The text of metadata cannot look so: quotes within it are escaped.
_TENSOR = re.compile(
    rb'"[^"\\]*(?:lora_(?:up|down|embedding_[AB]|[AB])|ia3_l|lora_linear_layer|_lora\d?\.(?:up|down)|\.lora\.(?:up|down)|hada_w1|lokr_w'
    rb'|oft_(?:blocks|R)|on_input|\.b1\.weight|(?:unet|text_encoder):0:(?:up|down)|\.(?:diff|diff_b|[wb]_norm|set_weight|lambda_layer)")'
    rb'[^"\\]*"?\s*:\s*\{\s*"'
)
# What stands in every such name. To look for plain text is a hundred times as fast, and most models have none of it.
_MARKS = (
    b"lora", b"ia3_l", b"hada_w1", b"lokr_w", b"oft_", b"on_input", b".b1.weight", b":0:up", b":0:down", b'.diff"',
    b'.diff_b"', b'_norm"', b".set_weight", b".lambda_layer",
)  # fmt: skip
_HEADER = 100_000_000  # bytes; no header is longer


def are_adapters(models: Sequence[str | os.PathLike[str] | Source]) -> bool:
    """Whether all of them are adapters; False if none is.

    Raises:
        MismatchError: some are, some are not.
    """
    found = [is_adapter(model) for model in models]
    if any(found) and not all(found):
        lora, other = models[found.index(True)], models[found.index(False)]
        raise MismatchError(
            f"`{_name(lora)}` is an adapter (LoRA or the like), `{_name(other)}` is not",
            hint="`sdops apply MODEL --lora FILE` adds LoRAs to a model, also `sdops merge A B --lora FILE`",
        )
    return bool(found) and found[0]


def _name(model: str | os.PathLike[str] | Source) -> str:
    return Path(model).name if isinstance(model, str | os.PathLike) else model.name


def is_adapter(model: str | os.PathLike[str] | Source) -> bool:
    """Whether it holds a LoRA or one of its relatives; False also for what cannot be read."""
    if not isinstance(model, str | os.PathLike):
        detection = detect(model.specs)
        if detection.main and not detection.unclaimed and not any(part.table.ends for part in detection.components):
            return False  # all of it belongs to a model
        return _names_adapter("".join(f'"{key}":{{"' for key in model.specs).encode())
    path = located(model)
    if path.is_dir():
        return (path / "adapter_config.json").is_file()
    try:
        file = InputFile(path)
    except SdopsError:
        return False
    try:
        head = bytes(file.read(0, min(9, file.size)))
        length = int.from_bytes(head[:8], "little")
        if head[8:9] == b"{" and length <= min(_HEADER, file.size - 8):
            return _names_adapter(file.read(8, length))
    finally:
        file.close()
    return path.suffix in (".pt", ".bin") and _opens_as_adapter(path)


def _names_adapter(header: bytes | bytearray) -> bool:
    return any(mark in header for mark in _MARKS) and _TENSOR.search(header) is not None


def _opens_as_adapter(path: Path) -> bool:
    """Of torch files, whose names lie in a pickle."""
    from sdops.verbs._adapters import open_adapter

    try:
        open_adapter(path, allow_unknown=True).source.close()
    except SdopsError:
        return False
    return True


def open_adapter_file(path: Path) -> FileSource:
    """The file with an adapter's tensors: of a PEFT folder the one in it, of torch lists with names.

    Raises:
        SdopsError: it cannot be read.
    """
    from sdops.verbs._adapters import open_adapter

    path = located(path)
    if path.is_file() and path.suffix not in (".pt", ".bin"):
        return open_source(path)
    return cast("FileSource", open_adapter(path, allow_unknown=True).source)
