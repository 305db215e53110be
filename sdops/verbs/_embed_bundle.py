"""Puts embeddings into a LoRA: one file with both, as OneTrainer writes it and the web UIs read it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from sdops.core.source import read
from sdops.embeddings import bundle
from sdops.embeddings._types import Embedding
from sdops.errors import MismatchError
from sdops.formats import open_source
from sdops.verbs._adapter_sink import AdapterSink
from sdops.verbs._embed_write import stored


def add_to_lora(embeddings: Sequence[Embedding], lora: Path, output: Path, *, force: bool, dtype: str | None) -> None:
    """Copy a LoRA tensor by tensor, with embeddings beside them; those of the same name are replaced.

    Raises:
        SdopsError: the LoRA cannot be read.
        MismatchError: it is no LoRA, or the embeddings have no place in it.
        OutputError: the output exists or cannot be written.
    """
    (written,) = bundle.write(embeddings)
    source = open_source(lora)
    try:
        replaced = tuple(f"{bundle.PREFIX}{one.name}." for one in embeddings)
        kept = {key: spec for key, spec in source.specs.items() if not key.startswith(replaced)}
        if not any("lora" in key or "hada" in key or "lokr" in key or ":up" in key for key in kept):
            raise MismatchError(f"`{lora}` is no LoRA", hint=f"`sdops inspect {lora}` shows what it is")
        added = {key: stored(rows, dtype) for key, rows in written.tree.items()}
        specs = kept | {key: spec for key, (_, spec) in added.items()}
        with AdapterSink(output, specs, source.metadata, force=force) as sink:
            for key in kept:
                sink.write(key, 0, memoryview(read(source, key)))
            for key, (raw, _) in added.items():
                sink.write(key, 0, memoryview(raw.tobytes()))
            sink.commit()
    finally:
        source.close()
