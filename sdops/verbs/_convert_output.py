"""From a draft to a sink: containers, shards, GGUF types, and metadata."""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

from sdops.core.assembled import Assembled, Constants, rows
from sdops.core.sink import SafetensorsSink, Sink, check_inputs
from sdops.core.source import Source
from sdops.core.spec import Spec
from sdops.errors import OutputError, UsageError
from sdops.verbs import _convert_extra
from sdops.verbs._convert_draft import Draft, Entry, stale_hashes
from sdops.verbs._convert_wish import Wish

_TORCH = (".ckpt", ".pt", ".pth", ".bin")
_NOT_BESIDE = ("format", "state_dict")  # metadata that a torch file cannot have, or does not need, beside its tensors
_GGUF_ROW = 256  # numbers in a row of what is stored in another shape
_CONVOLUTION = r"(input_blocks\.[1-9]|middle_block|output_blocks)(?!.*(norm|proj_in|proj_out)).*\.weight"
# What ComfyUI's loaders look for in `general.architecture`.
_GGUF_NAMES = {
    "sd1": "sd1", "sd2": "sd1", "sdxl": "sdxl", "sdxl_refiner": "sdxl", "sd3": "sd3", "flux1": "flux", "chroma": "flux",
    "flux2": "flux2", "wan": "wan", "lumina2": "lumina2", "z_image": "lumina2", "qwen_image": "qwen_image",
    "text_encoder": "t5encoder",
}  # fmt: skip


def check_output(path: Path, inputs: list[Path]) -> None:
    """Refuse an output that is an input, or a folder that holds one.

    Raises:
        OutputError: naming the input.
    """
    check_inputs(path, inputs)
    target = Path(os.path.realpath(path))
    for source in inputs:
        if target in Path(os.path.realpath(source)).parents and path.is_dir():
            raise OutputError(
                f"the output `{path}` holds the input `{source}`",
                hint="write to another folder with `-o`, inputs stay as they are",
            )


def check_ending(path: Path, to: str) -> None:
    """Refuse an output whose ending is that of another container. Names that begin with a dot are nobody's.

    Raises:
        UsageError: saying which endings fit.
    """
    fitting = {"ckpt": _TORCH, "gguf": (".gguf",), "diffusers": ()}.get(to, (".safetensors", *_TORCH))
    if path.suffix in (".safetensors", ".gguf", *_TORCH) and path.suffix not in fitting and path.name[0] != ".":
        hint = f"end its name in `{fitting[0]}`" if fitting else "name a folder"
        raise UsageError(f"`{path}` is not the name of what `{to}` makes", hint=f"{hint}, or leave `-o` away")


def file_sink(source: Source, draft: Draft, path: Path, wish: Wish, family: str, *, force: bool) -> tuple[Source, Sink]:
    """A single file, or shards.

    Args:
        source: The output's tensors, cast.
        draft: What they are.
        path: Where to; `.ckpt` and the like make a torch checkpoint.
        wish: The request.
        family: As in archs, for GGUF.
        force: Replace what is there.

    Raises:
        OutputError: it cannot be written.
    """
    if wish.to == "gguf":
        return _gguf(source, draft, path, wish, family, force=force)
    if wish.to == "ckpt" or path.suffix in _TORCH:
        from sdops.core.sink_torch import TorchSink

        beside = {key: text for key, text in draft.metadata.items() if key not in _NOT_BESIDE}
        return source, TorchSink(path, source.specs, beside, force=force)
    if draft.header and not wish.shard:
        from sdops.core.sink_header import SameDataSink

        return source, SameDataSink(path, source.specs, draft.header, force=force)
    if wish.shard:
        from sdops.core.sink_shards import create_shards

        return source, create_shards(path, source.specs, draft.metadata, shard=wish.shard, force=force)
    return source, SafetensorsSink(path, source.specs, draft.metadata, force=force)


def folder_sink(source: Source, draft: Draft, path: Path, wish: Wish, *, force: bool) -> Sink:
    """A folder of diffusers.

    Args:
        source: The output's tensors, cast: those of the folder, and those of the side file under their names there.
        draft: What they are.
        path: Where to.
        wish: The request.
        force: Replace what is there.

    Raises:
        OutputError: it cannot be written.
    """
    from sdops.core.sink_folder import FolderSink, Tensors

    files: dict[str, bytes | Tensors] = dict(draft.files)
    specs: dict[str, dict[str, Spec]] = {prefix: {} for prefix in draft.stems}
    for key in draft.tensors:
        prefix = key[: key.find("/") + 1]
        specs[prefix][key.removeprefix(prefix)] = source.specs[key]
    for prefix, tensors in specs.items():
        files[f"{prefix}{draft.stems[prefix]}.safetensors"] = Tensors(tensors, {"format": "pt"}, wish.shard)
    aside = {key: spec for key, spec in source.specs.items() if key not in draft.tensors}
    if draft.metadata:
        files[_convert_extra.NAME] = Tensors(aside, draft.metadata)
    return FolderSink(path, files, force=force)


def extra_tensors(draft: Draft, header: bytes) -> dict[str, Entry]:
    """The side file's tensors under their names there."""
    found = {f"{_convert_extra.EXTRA}{key}": entry for key, entry in draft.aside.items()}
    if header:
        constants = Constants("header", {_convert_extra.HEADER: _convert_extra.compressed(header)})
        made = rows(constants, _convert_extra.HEADER)
        found[_convert_extra.HEADER] = Entry(made, "header", _convert_extra.HEADER)
    return found


def assembled(name: str, tensors: Mapping[str, Entry], metadata: Mapping[str, str] | None = None) -> Assembled:
    """The tensors as a Source."""
    return Assembled(name, {key: entry.made for key, entry in tensors.items()}, metadata or {})


def carried_metadata(metadata: Mapping[str, str], made: Mapping[str, Any] | None) -> dict[str, str]:
    """The metadata of a file that is made of another: hashes that are no longer true go, the recipe comes.

    Args:
        metadata: The other file's.
        made: What was done to the values, or None if nothing was.
    """
    stale = set(stale_hashes(metadata))
    kept = {"format": "pt"} | {key: text for key, text in metadata.items() if key not in stale}
    if made is None:
        return kept
    return kept | {"sdops": json.dumps(made, ensure_ascii=False, separators=(",", ":"))}


def _gguf(source: Source, draft: Draft, path: Path, wish: Wish, family: str, *, force: bool) -> tuple[Source, Sink]:
    from sdops.core.ggml_view import Packed
    from sdops.core.sink_gguf import FILE_TYPES, GgufSink

    types = _gguf_types(source, draft, wish)
    sizes: Counter[str] = Counter()
    for key, (kind, _) in types.items():
        sizes[kind] += source.specs[key].numel
    fields: dict[str, Any] = {
        "general.architecture": _GGUF_NAMES.get(family, family),
        "general.quantization_version": 2,
        "general.file_type": FILE_TYPES.get(wish.gguf_type or max(sizes, key=sizes.__getitem__, default=""), 0),
    }
    for key, (_, shape) in types.items():
        if shape != source.specs[key].shape:
            fields[f"comfy.gguf.orig_shape.{key}"] = list(source.specs[key].shape)
    return Packed(source, types), GgufSink(path, types, fields, force=force)


def _gguf_types(source: Source, draft: Draft, wish: Wish) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Name -> (GGML type, shape in the file)."""
    from sdops.archs.delicate import is_coarse
    from sdops.core.ggml import PLAIN, TYPES
    from sdops.core.ggml_view import choose_types
    from sdops.verbs._convert_dtypes import asked_for, type_before

    specs, wanted, delicate = dict(source.specs), {}, set()
    in_blocks = wish.gguf_type != "" and TYPES[wish.gguf_type].block > 1
    for key, entry in draft.tensors.items():
        wanted[key] = wish.gguf_type if asked_for(key, wish) else ""
        if not wanted[key] and specs[key].dtype == "F32" and type_before(entry) not in PLAIN:
            wanted[key] = "F16"  # its blocks, or fp8 and its scale, were made float32
        flat = _in_rows(specs[key]) if in_blocks and wanted[key] and re.match(_CONVOLUTION, entry.name) else None
        if flat:  # these are half of a U-Net
            specs[key] = flat
        elif not is_coarse(entry.name, entry.made.spec):
            delicate.add(key)
    types = choose_types(specs, wanted, delicate)
    # GGUF has four dimensions; ComfyUI-GGUF reads the shape that it was
    return {
        key: (kind, shape if len(shape) <= 4 else (*shape[:3], prod(shape[3:]))) for key, (kind, shape) in types.items()
    }


def _in_rows(spec: Spec) -> Spec | None:
    """A convolution as rows of whole blocks, as ComfyUI-GGUF has it and makes its own shape of again."""
    if len(spec.shape) != 4 or spec.numel % _GGUF_ROW or spec.shape[-1] % _GGUF_ROW == 0:
        return None
    return Spec(spec.dtype, (spec.numel // _GGUF_ROW, _GGUF_ROW))
