"""What a training gives, written as files: LoRAs in any dialect, embeddings and hypernetworks in any layout."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sdops import custom_diffusion, embeddings, hypernetworks
from sdops.core.patch import Adapter, Patch, Target
from sdops.core.spec import Spec
from sdops.core.stream import TORCH_DTYPES
from sdops.core.tree import Leaf
from sdops.custom_diffusion._types import Edit
from sdops.embeddings._types import CLIP_IMAGE, NULL_TEXT, Embedding, Vectors, Written, encoder_of
from sdops.hypernetworks import _types as hypernet_types
from sdops.layouts.tables import aliases
from sdops.report import silent
from sdops.training.product import Chain, Layer, Network, Product, Texts
from sdops.verbs import _embed_write, _hypernet_open
from sdops.verbs._adapter_output import DTYPES, rounded
from sdops.verbs._adapter_save import save
from sdops.verbs._adapter_source import AdapterSource, Lazy
from sdops.verbs._adapters import spelled
from sdops.verbs._embed_convert import write as write_embeddings
from sdops.verbs._train_metadata import header, recipe_of
from sdops.verbs._train_output import CONCEPTS, files_of
from sdops.verbs._train_plan import Course

_TEXT = "text_model."


def write(product: Product, course: Course, path: Path, steps: int, *, force: bool) -> list[Path]:
    """Write whatever there is.

    Args:
        product: What the method gives.
        course: The run.
        path: The output, or that after some steps.
        steps: That were done.
        force: Replace existing files.

    Returns:
        The files.

    Raises:
        FormatError: a number is too large for the dtype.
        MismatchError: the dialect or layout cannot hold it.
        OutputError: it cannot be written.
    """
    wish, to = course.config.save_dtype, course.to
    dtype = DTYPES["fp32" if wish == "auto" else wish]
    files = files_of(course.method, path, to, list(course.words))
    trained = [_embedding(word, rows, steps, course.origin.path.stem) for word, rows in product.words.items()]
    if product.network is not None:
        settings = {"step": steps, "name": course.config.name or path.stem, **product.network.settings}
        settings |= {"sd_checkpoint": None, "sd_checkpoint_name": course.origin.path.stem, "optional_info": None}
        return _write_network(product.network, settings, to, path, dtype, recipe_of(course, steps), force=force)
    if product.texts is not None:
        return _write_texts(product.texts, to, path, dtype, recipe_of(course, steps), force=force)
    if product.vector is not None:
        one = Embedding(path.stem, {"clip_image": Vectors(product.vector.numpy())}, kind=CLIP_IMAGE)
        (file,) = embeddings.layout(to).write([one])
        written = _write_file(file, to, path, dtype, recipe_of(course, steps), force=force)
        return written + (_write_lora(product, course, files[1], "kohya", steps, force=force) if product.layers else [])
    if not product.layers:
        return _write_words(trained, to, files, dtype, force=force)
    if to in CONCEPTS:
        return _write_concept(product.layers, trained, course, files, steps, force=force)
    return _write_lora(product, course, path, to, steps, force=force)


def check_writable(product: Product, course: Course) -> None:
    """See whether the dialect or layout can hold what is to be learnt, before it is.

    Raises:
        MismatchError: it cannot.
    """
    trained = [_embedding(word, rows, 0, "") for word, rows in product.words.items()]
    if product.network is not None:
        hypernetworks.layout(course.to).write(_as_network(product.network, {}, "F32", {}))
    elif not product.layers:
        for group in _groups(trained, files_of(course.method, course.output, course.to, list(course.words))):
            embeddings.layout(course.to).write(group)
    elif course.to not in CONCEPTS:
        made = adapter_of(product.layers, course.origin.family, course.output.name, _of_layers(course), product.words)
        spelled(made, course.to, {})


def _write_lora(product: Product, course: Course, path: Path, to: str, steps: int, *, force: bool) -> list[Path]:
    """A LoRA-like file, and what belongs beside it."""
    dtype = _of_layers(course)
    made = spelled(
        adapter_of(product.layers, course.origin.family, path.name, dtype, product.words),
        to,
        header(course, steps, product),
    )
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


def _of_layers(course: Course) -> str:
    wish = course.config.save_dtype
    return "fp16" if wish == "auto" else wish


def _write_concept(
    layers: Sequence[Layer],
    words: Sequence[Embedding],
    course: Course,
    files: Sequence[Path],
    steps: int,
    *,
    force: bool,
) -> list[Path]:
    """Custom diffusion: what is added to keys and values, and the words in a file beside it."""
    tensors: dict[str, Lazy] = {}
    edits = []
    for layer in layers:
        target = target_of(layer, course.origin.family)
        values = rounded(target, layer.parts["diff"], DTYPES[_of_layers(course)])
        tensors[target.module] = _in_memory(values, DTYPES[_of_layers(course)])
        edits.append(Edit(target.module, "weight", "delta", (Leaf(target.module, tensors[target.module].spec),)))
    path, beside = files
    written = custom_diffusion.layout(course.to).write(edits, {})
    written = replace(written, metadata={**written.metadata, **recipe_of(course, steps)})
    source = AdapterSource(path.name, tensors, {})
    _hypernet_open.save(written, "safetensors", source, path, force=force)
    return [path, *_write_words(words, "a1111" if len(words) == 1 else "rinongal", [beside], "F32", force=force)]


def _write_words(
    trained: Sequence[Embedding], to: str, files: Sequence[Path], dtype: str, *, force: bool
) -> list[Path]:
    """Words in a file each, or all in one."""
    written: list[Path] = []
    for output, group in zip(files, _groups(trained, files), strict=True):
        report = write_embeddings(group, to, output, output.parent, [], dtype, force=force, dry_run=False)
        written += [Path(name) for name in report.data["outputs"]]
    return written


def _groups(trained: Sequence[Embedding], files: Sequence[Path]) -> list[list[Embedding]]:
    return [[one] for one in trained] if len(files) > 1 else [list(trained)]


def _embedding(word: str, encoders: Mapping[str, Tensor], step: int, checkpoint_name: str) -> Embedding:
    vectors: dict[str, Any] = {name: Vectors(rows.detach().cpu().float().numpy()) for name, rows in encoders.items()}
    return Embedding(word, vectors, placeholder=word, step=step, checkpoint_name=checkpoint_name)


def _write_texts(
    found: Texts, to: str, path: Path, dtype: str, recipe: Mapping[str, str], *, force: bool
) -> list[Path]:
    """Null texts; in safetensors with the noise and the prompt, without which they mean nothing."""
    texts = found.texts.numpy()
    one = Embedding(path.stem, {encoder_of(texts.shape[-1]): Vectors(texts)}, kind=NULL_TEXT)
    (file,) = embeddings.layout(to).write([one])
    if type(file.tree) is dict:
        file = Written(file.tree | {"x_T": Vectors(found.latents.numpy())}, {**file.metadata, **found.facts})
    return _write_file(file, to, path, dtype, recipe, force=force)


def _write_file(
    file: Written, to: str, path: Path, dtype: str, recipe: Mapping[str, str], *, force: bool
) -> list[Path]:
    file = replace(file, metadata={**file.metadata, **recipe})
    _embed_write.save([file], [path], _embed_write.container_of(to, path), force=force, dtype=dtype)
    return [path]


def _write_network(
    network: Network,
    settings: Mapping[str, Any],
    to: str,
    path: Path,
    dtype: str,
    recipe: Mapping[str, str],
    *,
    force: bool,
) -> list[Path]:
    """A hypernetwork; the layouts' shelf says how it is spelled."""
    tensors: dict[str, Lazy] = {}
    layout = hypernetworks.layout(to)
    made = layout.write(_as_network(network, settings, dtype, tensors))
    made = replace(made, metadata={**made.metadata, **recipe})
    _hypernet_open.save(made, layout.CONTAINER, AdapterSource(path.name, tensors, {}), path, force=force)
    return [path]


def _as_network(
    network: Network, settings: Mapping[str, Any], dtype: str, tensors: dict[str, Lazy]
) -> hypernet_types.Network:
    """A network of the shelf, whose tensors are put to `tensors`."""
    pairs = {
        width: (_chain(keys, f"{width}.k", dtype, tensors), _chain(values, f"{width}.v", dtype, tensors))
        for width, (keys, values) in network.pairs.items()
    }
    found = {**network.settings, **settings}
    return hypernet_types.Network(str(found.get("name", "")), "a1111", pairs, found)


def _chain(parts: Chain, where: str, dtype: str, tensors: dict[str, Lazy]) -> hypernet_types.Chain:
    """A chain of the shelf, whose tensors are put to `tensors`."""

    def leaf(name: str) -> Leaf:
        key = f"{where}.{name}"
        tensors[key] = _in_memory(parts[name].to(TORCH_DTYPES[dtype]), dtype)
        return Leaf(key, tensors[key].spec)

    places: Iterable[int] = sorted({int(name.partition(".")[0]) for name in parts})
    return tuple(hypernet_types.Layer(place, leaf(f"{place}.weight"), leaf(f"{place}.bias")) for place in places)
