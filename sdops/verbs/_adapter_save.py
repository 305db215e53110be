"""Writes an adapter: checks beforehand, hashes of its inputs beside the work, and the files beside it. No torch."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from sdops.archs.detect import detect
from sdops.core.patch import Adapter
from sdops.core.run import run
from sdops.core.sink import check_inputs
from sdops.report import Progress
from sdops.verbs._adapter_lists import written
from sdops.verbs._adapter_path import check_place
from sdops.verbs._adapter_sink import adapter_sink
from sdops.verbs._adapters import Spelled
from sdops.verbs._hashes import Hashes
from sdops.verbs._inputs import Opened
from sdops.verbs._provenance import RECIPE, with_hashes, without_hashes


def opened(adapter: Adapter) -> Opened:
    """An adapter as an input of a run: hashed, and watched for changes."""
    return Opened(adapter.source, adapter.source, detect(adapter.source.specs))


def check_output(path: Path, inputs: Sequence[Opened], companions: Iterable[str], *, force: bool) -> None:
    """Everything that is known to go wrong before the work.

    Raises:
        OutputError: the output, or a file that belongs beside it, exists or cannot be written.
    """
    check_inputs(path, [file for part in inputs for file in part.files])
    check_place(path, tuple(companions), force=force)


def save(
    made: Spelled,
    path: Path,
    inputs: Sequence[Opened],
    *,
    jobs: int,
    force: bool,
    hash_inputs: bool | None,
    progress: Progress,
    hashes: Hashes | None = None,
) -> int:
    """Write an adapter and what belongs beside it; returns the size in bytes.

    Args:
        made: The adapter.
        path: The file.
        inputs: What it is made of.
        jobs: Threads.
        force: Replace an existing file.
        hash_inputs: Whether the inputs' hashes are put into the recipe in the header; None: there is no recipe of this
            run, the header is written as it is.
        progress: Called as `progress(label, total_bytes)`.
        hashes: The inputs' hashes, if they have been begun with the work.

    Raises:
        OutputError, FormatError, ChangedError: as in all verbs that write.
    """
    header: dict[str, Any] = dict(made.source.metadata)
    if hash_inputs is False:
        header[RECIPE] = without_hashes(header[RECIPE])
    with adapter_sink(path, made.source.specs, header, made.companions, force=force) as sink:
        with nullcontext(hashes) if hashes else Hashes(inputs, enabled=bool(hash_inputs)) as running:
            with progress("writing", sink.nbytes) as advance:
                run(made.source, sink, jobs=jobs, progress=advance)
            digests = running.wait(progress)
        for part in inputs:
            part.check_unchanged()
        if hash_inputs:
            header[RECIPE] = with_hashes(header[RECIPE], digests)
        sink.commit({RECIPE: header[RECIPE]} if hash_inputs else None)
    return sum(os.path.getsize(file) for file in written(path, made.source.specs))
