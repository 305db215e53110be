"""What the result of an apply is written as: one file, shards, or a folder of diffusers if the model is one."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from sdops.core.blas import one_thread
from sdops.core.run import run
from sdops.core.sink import SafetensorsSink, Sink
from sdops.core.source import Source
from sdops.core.spec import Spec
from sdops.errors import OutputError
from sdops.formats.diffusers import DiffusersFolder
from sdops.report import Progress
from sdops.verbs._hashes import Hashes
from sdops.verbs._inputs import Opened
from sdops.verbs._provenance import RECIPE, with_hashes, without_hashes

if TYPE_CHECKING:
    from sdops.core.sink_folder import Tensors

SUFFIX = ".safetensors"
INDEX = f"{SUFFIX}.index.json"
_SHARD = 5_000_000_000  # bytes, where the model has no shards whose size could be taken over
_OTHERS = (".gguf", ".ckpt", ".pt", ".pth", ".bin")
_PIPELINE = "model_index.json"
_PART = re.compile(r"(?:-\d{1,5}-of-\d{1,5})?(?:\.\w+)?$")


def is_folder(model: Opened) -> bool:
    """Whether a model is a folder of diffusers: a pipeline or one component."""
    return isinstance(model.origin, DiffusersFolder)


def is_pipeline(model: Opened) -> bool:
    """Whether it is a folder of several components, whose names no single file has."""
    return is_folder(model) and any(part.prefix.endswith("/") for part in model.detection.components)


def stem_of(model: Opened) -> str:
    """A model's name without suffix, and without what tells one of several files."""
    return _PART.sub("", model.name.removesuffix(INDEX)) if is_sharded(model) else Path(model.name).stem


def is_sharded(model: Opened) -> bool:
    """Whether a model is several files that are no folder of diffusers."""
    return len(model.files) > 1 and not is_folder(model)


def is_file(path: Path) -> bool:
    """Whether an output of this name is a file; others are folders, where the model is one."""
    return path.name.endswith((SUFFIX, INDEX))


def sink_of(specs: Mapping[str, Spec], model: Opened, path: Path, header: Mapping[str, str], *, force: bool) -> Sink:
    """The output in the making; all checks are done, nothing is there yet.

    Args:
        specs: The tensors of the result, under the model's names.
        model: The model.
        path: `NAME.safetensors`, `NAME.safetensors.index.json` for shards, or a folder.
        header: Metadata; of a folder's files only the recipe.
        force: Replace what is there.

    Raises:
        OutputError: it exists, cannot be written, is an input, or does not fit on the disk.
    """
    from sdops.verbs._convert_output import check_output  # steps of recipes that others read come without outputs

    if path.suffix in _OTHERS:
        raise OutputError(
            f"the result is safetensors, `{path}` is called as another kind of file",
            hint=f"`-o {path.with_suffix(SUFFIX)}`, and `sdops convert` makes other kinds of it",
        )
    check_output(path, [file for leaf in model.leaves() for file in leaf.files])
    if path.name.endswith(INDEX):
        from sdops.core.sink_shards import ShardedSink, split

        limit = max((file.stat().st_size for file in model.files), default=_SHARD) if is_sharded(model) else _SHARD
        whole = path.with_name(path.name.removesuffix(".index.json"))
        return ShardedSink(whole, split(specs, limit), header, force=force)
    if isinstance(model.origin, DiffusersFolder) and not is_file(path):
        from sdops.core.sink_folder import FolderSink

        return FolderSink(path, _files(specs, model.origin, header), force=force)
    return SafetensorsSink(path, specs, header, force=force)


def save(
    made: Source,
    parts: Sequence[Opened],
    path: Path,
    header: Mapping[str, str],
    *,
    jobs: int,
    force: bool,
    hash_inputs: bool,
    progress: Progress,
) -> str:
    """Write a result; returns its recipe, with the inputs' hashes in it.

    Args:
        made: The result.
        parts: The model first, then what is added to it.
        path: As for `sink_of`.
        header: Metadata with a recipe.
        jobs: Threads.
        force: Replace what is there.
        hash_inputs: Put the inputs' SHA-256 into the recipe.
        progress: Called as `progress(label, total_bytes)`.

    Raises:
        OutputError, FormatError, ChangedError: as in all verbs that write.
    """
    recipe = header[RECIPE] if hash_inputs else without_hashes(header[RECIPE])
    with sink_of(made.specs, parts[0], path, {**header, RECIPE: recipe}, force=force) as sink:
        with Hashes(parts, enabled=hash_inputs) as hashes:
            with progress("applying", sink.nbytes) as advance, one_thread():
                run(made, sink, jobs=jobs, progress=advance)
            digests = hashes.wait(progress)
        for part in parts:
            part.check_unchanged()
        if hash_inputs:
            recipe = with_hashes(recipe, digests)
        sink.commit({RECIPE: recipe})
    return recipe


def _files(specs: Mapping[str, Spec], model: DiffusersFolder, header: Mapping[str, str]) -> dict[str, bytes | Tensors]:
    """The weights of every component, and all the small files as they are."""
    from sdops.core.sink_folder import Tensors
    from sdops.verbs._convert_folder import small_files

    found: dict[str, bytes | Tensors] = dict(small_files(model.path, set(model.components)))
    if (model.path / _PIPELINE).is_file():
        found[_PIPELINE] = (model.path / _PIPELINE).read_bytes()
    for name, component in model.components.items():
        stem = "diffusion_pytorch_model"
        own = any(file.name.startswith(stem) for file in component.files)
        shard = max(file.stat().st_size for file in component.files) if len(component.files) > 1 else 0
        prefix = f"{name}/" if name else ""
        metadata = {"format": "pt", RECIPE: header[RECIPE]}
        found[f"{prefix}{stem if own else 'model'}{SUFFIX}"] = Tensors(_below(specs, prefix), metadata, shard)
    return found


def _below(specs: Mapping[str, Spec], prefix: str) -> dict[str, Spec]:
    return {key.removeprefix(prefix): spec for key, spec in specs.items() if key.startswith(prefix)}
