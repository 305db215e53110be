"""What a training gives, written as files: LoRAs in any dialect, embeddings and hypernetworks in any layout."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sdops import embeddings, hypernetworks
from sdops.core.patch import Adapter, Patch, Target
from sdops.core.spec import Spec
from sdops.core.stream import TORCH_DTYPES
from sdops.core.tree import Leaf
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
from sdops.verbs._train_metadata import header
from sdops.verbs._train_plan import Course

_TEXT = "text_model."
_DENSE = "-text"  # behind the name of a vector's file: that of the layers that go with it


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
    wish = course.config.save_dtype
    dtype = DTYPES["fp32" if wish == "auto" else wish]
    written: list[Path] = []
    if product.vector is not None:
        written += _write_embedding(_as_vector(product.vector, path), course.to, path, dtype, force=force)
        path = path.with_name(f"{path.stem}{_DENSE}.safetensors")
    if product.layers:
        to = course.to if product.vector is None else "kohya"
        layers = "fp16" if wish == "auto" else wish
        metadata = header(course, steps, product)
        made = adapter_of(product.layers, course.origin.family, path.name, layers, product.words)
        written += _write_layers(spelled(made, to, metadata), path, force=force)
    elif product.words:
        trained = [_embedding(word, rows, steps, course.origin.path.stem) for word, rows in product.words.items()]
        written += _write_words(trained, course.to, path, dtype, force=force)
    if product.network is not None:
        settings = {"step": steps, "name": course.config.name or path.stem, **product.network.settings}
        settings |= {"sd_checkpoint": None, "sd_checkpoint_name": course.origin.path.stem, "optional_info": None}
        written += _write_network(product.network, settings, course.to, path, dtype, force=force)
    if product.texts is not None:
        written += _write_texts(product.texts, course.to, path, dtype, force=force)
    return written


def _write_layers(made: Any, path: Path, *, force: bool) -> list[Path]:
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


def _write_words(trained: Sequence[Embedding], to: str, path: Path, dtype: str, *, force: bool) -> list[Path]:
    """Several words that a layout cannot hold together give a file each, `OUTPUT-WORD.ending`."""
    groups = [(path, list(trained))]
    if len(trained) > 1 and not embeddings.layout(to).HOLDS_MANY:
        stem, ending = path.stem, path.suffix
        groups = [(path.with_name(f"{stem}-{_embed_write.file_name(one.name)}{ending}"), [one]) for one in trained]
    written: list[Path] = []
    for output, group in groups:
        report = write_embeddings(group, to, output, path.parent, [], dtype, force=force, dry_run=False)
        written += [Path(name) for name in report.data["outputs"]]
    return written


def _embedding(word: str, encoders: Mapping[str, Tensor], step: int, checkpoint_name: str) -> Embedding:
    vectors: dict[str, Any] = {name: Vectors(rows.detach().cpu().float().numpy()) for name, rows in encoders.items()}
    return Embedding(word, vectors, placeholder=word, step=step, checkpoint_name=checkpoint_name)


def _as_vector(vector: Tensor, path: Path) -> Embedding:
    return Embedding(path.stem, {"clip_image": Vectors(vector.numpy())}, kind=CLIP_IMAGE)


def _write_embedding(one: Embedding, to: str, path: Path, dtype: str, *, force: bool) -> list[Path]:
    (file,) = embeddings.layout(to).write([one])
    return _write_file(file, to, path, dtype, force=force)


def _write_texts(found: Texts, to: str, path: Path, dtype: str, *, force: bool) -> list[Path]:
    """Null texts; in safetensors with the noise and the prompt, without which they mean nothing."""
    texts = found.texts.numpy()
    one = Embedding(path.stem, {encoder_of(texts.shape[-1]): Vectors(texts)}, kind=NULL_TEXT)
    (file,) = embeddings.layout(to).write([one])
    if type(file.tree) is dict:
        file = Written(file.tree | {"x_T": Vectors(found.latents.numpy())}, {**file.metadata, **found.facts})
    return _write_file(file, to, path, dtype, force=force)


def _write_file(file: Written, to: str, path: Path, dtype: str, *, force: bool) -> list[Path]:
    _embed_write.save([file], [path], _embed_write.container_of(to, path), force=force, dtype=dtype)
    return [path]


def _write_network(
    network: Network, settings: Mapping[str, Any], to: str, path: Path, dtype: str, *, force: bool
) -> list[Path]:
    """A hypernetwork; the layouts' shelf says how it is spelled."""
    tensors: dict[str, Lazy] = {}
    pairs = {}
    for width, (keys, values) in network.pairs.items():
        pairs[width] = (
            _chain(keys, f"{width}.k", dtype, tensors),
            _chain(values, f"{width}.v", dtype, tensors),
        )
    made = hypernet_types.Network(str(settings["name"]), "a1111", pairs, settings)
    layout = hypernetworks.layout(to)
    _hypernet_open.save(layout.write(made), layout.CONTAINER, AdapterSource(path.name, tensors, {}), path, force=force)
    return [path]


def _chain(parts: Chain, where: str, dtype: str, tensors: dict[str, Lazy]) -> hypernet_types.Chain:
    """A chain of the shelf, whose tensors are put to `tensors`."""

    def leaf(name: str) -> Leaf:
        key = f"{where}.{name}"
        tensors[key] = _in_memory(parts[name].to(TORCH_DTYPES[dtype]), dtype)
        return Leaf(key, tensors[key].spec)

    places: Iterable[int] = sorted({int(name.partition(".")[0]) for name in parts})
    return tuple(hypernet_types.Layer(place, leaf(f"{place}.weight"), leaf(f"{place}.bias")) for place in places)
