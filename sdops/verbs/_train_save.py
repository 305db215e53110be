"""What a training gives, written as files: LoRAs in any dialect, embeddings in any layout."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sdops.core.patch import Adapter, Patch, Target
from sdops.core.spec import Spec
from sdops.core.stream import TORCH_DTYPES
from sdops.embeddings._types import Embedding, Vectors
from sdops.layouts.tables import aliases
from sdops.report import silent
from sdops.training.product import Layer
from sdops.verbs._adapter_output import DTYPES, rounded, save
from sdops.verbs._adapter_source import AdapterSource, Lazy
from sdops.verbs._adapters import spelled
from sdops.verbs._embed_convert import write as write_embeddings

_TEXT = "text_model."


def write_lora(
    layers: Sequence[Layer],
    family: str,
    path: Path,
    metadata: Mapping[str, str],
    *,
    to: str,
    dtype: str,
    force: bool,
    bundled: Mapping[str, Mapping[str, Tensor]] | None = None,
) -> list[Path]:
    """Write a LoRA-like file, and what belongs beside it.

    Args:
        layers: What was learnt.
        family: Of the model.
        path: Where to.
        metadata: Of the header.
        to: The dialect.
        dtype: fp16, bf16 or fp32.
        force: Replace an existing file.
        bundled: New word -> encoder -> vectors that lie in the same file.

    Raises:
        FormatError: a number is too large for the dtype.
        MismatchError: the dialect cannot hold it.
        OutputError: it cannot be written.
    """
    made = spelled(adapter_of(layers, family, path.name, dtype, bundled or {}), to, metadata)
    save(made, path, [], jobs=1, force=force, hash_inputs=None, progress=silent)
    return [path, *(path.parent / name for name in made.companions)]


def adapter_of(
    layers: Sequence[Layer], family: str, name: str, dtype: str, bundled: Mapping[str, Mapping[str, Tensor]]
) -> Adapter:
    """Layers as an adapter whose tensors are in memory."""
    tensors: dict[str, Lazy] = {}
    patches = []
    for layer in layers:
        target = target_of(layer, family)
        parts = {}
        for part, values in layer.parts.items():
            key = f"{target}.{part}"
            tensors[key] = _in_memory(rounded(target, values, DTYPES[dtype]), DTYPES[dtype])
            parts[part] = key
        patches.append(Patch(target, layer.family, parts, layer.settings))
    extras = {}
    for word, encoders in bundled.items():
        for encoder, rows in encoders.items():
            key = f"{word}.{encoder}"
            tensors[key] = _in_memory(rows.to(TORCH_DTYPES[DTYPES[dtype]]), DTYPES[dtype])
            extras[key] = f"embedding {encoder} {word}"
    return Adapter(AdapterSource(name, tensors, {}), "kohya", family, tuple(patches), extras)


def target_of(layer: Layer, family: str) -> Target:
    """The layer as sdops calls it: the original repository's names for the UNet, `text_model...` for encoders."""
    if layer.component != "unet":
        module = layer.module if layer.module.startswith(_TEXT) else _TEXT + layer.module
        return Target(layer.component, module)
    found = aliases(family, "unet").get(layer.module)
    if found is None:
        return Target("unet", layer.module)
    return Target("unet", found.key, found.share)


def _in_memory(values: Tensor, dtype: str) -> Lazy:
    values = values.detach().cpu().contiguous()
    return Lazy(Spec(dtype, tuple(values.shape)), partial(_bytes, values))


def _bytes(values: Tensor) -> memoryview:
    return values.reshape(-1).view(torch.uint8).numpy().data


def write_words(
    words: Mapping[str, Mapping[str, Tensor]],
    path: Path,
    *,
    to: str,
    dtype: str,
    force: bool,
    step: int,
    checkpoint_name: str,
) -> list[Path]:
    """Write new words in a layout of embeddings; several words that a layout cannot hold together give a file each.

    Raises:
        MismatchError: the layout cannot hold them.
        OutputError: it cannot be written.
    """
    embeddings = [_embedding(word, encoders, step, checkpoint_name) for word, encoders in words.items()]
    written: list[Path] = []
    for output, group in files_of(embeddings, path, to):
        report = write_embeddings(group, to, output, path.parent, [], DTYPES[dtype], force=force, dry_run=False)
        written += [Path(name) for name in report.data["outputs"]]
    return written


def files_of(embeddings: Sequence[Embedding], path: Path, to: str) -> list[tuple[Path, list[Embedding]]]:
    """Which embeddings go into which file: all into one if the layout holds many, else `OUTPUT-WORD.ending` each."""
    from sdops.embeddings import layout
    from sdops.verbs._embed_write import file_name

    if len(embeddings) == 1 or layout(to).HOLDS_MANY:
        return [(path, list(embeddings))]
    return [(path.with_name(f"{path.stem}-{file_name(one.name)}{path.suffix}"), [one]) for one in embeddings]


def _embedding(word: str, encoders: Mapping[str, Tensor], step: int, checkpoint_name: str) -> Embedding:
    vectors: dict[str, Any] = {name: Vectors(rows.detach().cpu().float().numpy()) for name, rows in encoders.items()}
    return Embedding(word, vectors, placeholder=word, step=step, checkpoint_name=checkpoint_name)
