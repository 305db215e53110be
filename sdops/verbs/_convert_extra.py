"""`sdops_extra.safetensors`: what a folder of diffusers cannot hold of the file that it was made from.

    header            that file's header, compressed: names, order, metadata, down to the last space
    extra/NAME        tensors that have no place in the folder, under their names in the file
    sdops_folder      in the metadata: JSON, how the components were spelled, what was invented

With it the folder becomes the same file again, byte for byte.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdops.core import files
from sdops.core.source import Source, read
from sdops.core.spec import DTYPE_BITS, Spec
from sdops.errors import FormatError
from sdops.formats import open_file
from sdops.formats.safetensors import SafetensorsFile

NAME = "sdops_extra.safetensors"
HEADER = "header"
EXTRA = "extra/"
FOLDER = "sdops_folder"  # metadata key
_LARGEST = 100_000_000  # bytes of a header


@dataclass(frozen=True, slots=True)
class Extra:
    """The side file of a folder.

    Attributes:
        source: The open file.
        tensors: Name in the single file -> tensor of the source.
        components: Component -> {"layout", "prefix"} in the single file.
        invented: Tensors of the folder that the single file does not have.
        header: Its header, or nothing.
        metadata: The file's metadata.
    """

    source: Source
    tensors: Mapping[str, str]
    components: Mapping[str, Mapping[str, str]]
    invented: tuple[str, ...]
    header: bytes
    metadata: Mapping[str, str]


def describe(
    components: Mapping[str, Mapping[str, str]], invented: Sequence[str], metadata: Mapping[str, str]
) -> dict[str, str]:
    """The side file's metadata; `metadata` is the single file's, where its header is not kept."""
    told = {"version": 1, "components": components, "invented": list(invented), "metadata": dict(metadata)}
    return {"format": "pt", FOLDER: json.dumps(told, separators=(",", ":"))}


def raw_header(source: Source) -> bytes:
    """The header of a safetensors file as it is; nothing for other sources."""
    if not isinstance(source, SafetensorsFile):
        return b""
    return files.read_bytes(source.fd, source.data_start, 0)


def compressed(header: bytes) -> tuple[Spec, bytes]:
    """A header as a tensor."""
    data = zlib.compress(header, 9)
    return Spec("U8", (len(data),)), data


def open_extra(folder: Path) -> Extra | None:
    """The side file of a folder, if it has one.

    Raises:
        FormatError: it is damaged.
    """
    path = folder / NAME
    if not path.is_file():
        return None
    source = open_file(path)
    try:
        told: dict[str, Any] = json.loads(source.metadata[FOLDER])
        tensors = {key.removeprefix(EXTRA): key for key in source.specs if key.startswith(EXTRA)}
        components = {
            str(name): {"layout": str(at["layout"]), "prefix": str(at["prefix"])}
            for name, at in told["components"].items()
        }
        header = _header(source)
        kept = json.loads(header[8:]).get("__metadata__", {}) if header else told["metadata"]
        metadata = {str(name): str(text) for name, text in kept.items()}
        return Extra(source, tensors, components, tuple(map(str, told["invented"])), header, metadata)
    except (KeyError, TypeError, ValueError, AttributeError, zlib.error) as error:
        source.close()
        raise FormatError(
            f"`{path}` is damaged: {error}", hint="without it the folder can be converted, too: move it away", path=path
        ) from error


def _header(source: Source) -> bytes:
    if HEADER not in source.specs:
        return b""
    unpack = zlib.decompressobj()
    data = unpack.decompress(bytes(read(source, HEADER)), _LARGEST)
    if unpack.unconsumed_tail or not unpack.eof:
        raise ValueError("its header is too long, or cut short")
    return data


def restored(header: bytes, specs: Mapping[str, Spec]) -> dict[str, Spec] | None:
    """The tensors of a header in the order of the data, if these are the ones at hand (their shapes may differ).

    Args:
        header: As `Extra.header`.
        specs: What there is.

    Returns:
        Name -> Spec as the header has it, or None if something is not as it was.
    """
    try:
        entries = json.loads(header[8:])
        entries.pop("__metadata__", None)
        ordered = sorted(entries.items(), key=lambda item: (*item[1]["data_offsets"], item[0]))
        found, position = {}, 0
        for name, entry in ordered:
            spec = Spec(entry["dtype"], tuple(entry["shape"]))
            begin, end = entry["data_offsets"]
            if begin != position or spec.dtype not in DTYPE_BITS or end - begin != spec.nbytes:
                return None
            found[name], position = spec, end
    except (ValueError, KeyError, TypeError, AttributeError):
        return None
    same = found.keys() == specs.keys() and all(
        spec.dtype == specs[name].dtype and spec.numel == specs[name].numel for name, spec in found.items()
    )
    return found if same and int.from_bytes(header[:8], "little") == len(header) - 8 else None
