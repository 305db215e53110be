"""A folder as diffusers and transformers save it: a pipeline of components, or one component.

    model_index.json            {component: [library, class], ...}
    unet/config.json            unet/diffusion_pytorch_model.safetensors (or sharded, or .bin, or a variant)
    text_encoder/config.json    text_encoder/model.safetensors

Tensors of a pipeline are called `COMPONENT/NAME`, those of a single component `NAME`. All that the JSON files say is
data: no class is looked up.
"""

from __future__ import annotations

import os
import re
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdops.errors import FormatError
from sdops.formats import FileSource, open_file
from sdops.formats import sharded as shards
from sdops.formats._joined import JoinedSource
from sdops.formats._json import read
from sdops.text import count

_STEMS = ("diffusion_pytorch_model", "model", "pytorch_model")
_WEIGHTS = re.compile(
    rf"(?:{'|'.join(_STEMS)})"
    r"(?:\.(?P<variant>[\w-]+?))?(?:-(?P<number>\d{1,5})-of-\d{1,5})?\.(?P<ending>safetensors|bin)"
)
_INDEX = re.compile(rf"(?:{'|'.join(_STEMS)})\.(?P<ending>safetensors|bin)\.index(?:\.(?P<variant>[\w-]+))?\.json")
_MODEL_ENDINGS = (".safetensors", ".ckpt", ".pt", ".pth", ".bin")


@dataclass(frozen=True, slots=True)
class Component:
    """One part of a pipeline that has weights.

    Attributes:
        folder: Where it lies.
        class_name: What its configuration calls it, e.g. `UNet2DConditionModel`; empty if it does not say.
        files: The files with its tensors.
    """

    folder: Path
    class_name: str
    files: list[Path]


class DiffusersFolder(JoinedSource):
    """A pipeline or a component as a Source.

    Attributes:
        components: Name -> Component; a single component is called "".
    """

    components: dict[str, Component]


def sniff(path: Path, head: bytes) -> bool:
    """A folder with a pipeline's or component's description, or with weights under their usual name."""
    del head
    if not path.is_dir():
        return False
    return any((path / name).is_file() for name in ("model_index.json", "config.json")) or _weights(path) is not None


def open(path: Path) -> DiffusersFolder:  # noqa: A001 -- the shelf's contract names it
    """Open a folder by reading its JSON files and the headers of its weights.

    Raises:
        FormatError: there are no weights, or a file is missing or damaged.
    """
    folders, warnings = {"": path}, list[str]()
    if (path / "model_index.json").is_file():
        folders, warnings = _listed(path)
    with ExitStack() as stack:
        opened: dict[str, FileSource] = {}
        for name, folder in folders.items():
            weights = _weights(folder)
            if weights is not None:
                opened[name] = _open_weights(weights)
                stack.callback(opened[name].close)
            elif _looks_like_model(folder):
                warnings.append(f"`{folder}` has no weights")
        if not opened:
            raise no_model(path)
        places = {f"{name}/{key}" if name else key: (part, key) for name, part in opened.items() for key in part.specs}
        metadata = opened[""].metadata if list(opened) == [""] else {}
        source = DiffusersFolder(path, places, list(opened.values()), metadata, warnings)
        source.components = {
            name: Component(folders[name], _class_name(folders[name]), part.files) for name, part in opened.items()
        }
        stack.pop_all()
    return source


def no_model(path: Path) -> FormatError:
    """The error for a folder that is no model, with the models inside that the user may have meant."""
    inside = sorted(name for name in os.listdir(path) if name.lower().endswith(_MODEL_ENDINGS))
    if inside:
        hint = f"give a file in it: `{path / inside[0]}`"
        more = f"; it contains {count(len(inside), 'model file')}"
    else:
        hint, more = "a diffusers folder has a model_index.json or a config.json and its weights", ""
    return FormatError(
        f"`{path}` is a folder, but not one that diffusers saved with weights{more}", hint=hint, path=path
    )


def _listed(path: Path) -> tuple[dict[str, Path], list[str]]:
    """Folders of the components that model_index.json lists, and what to tell about missing ones."""
    folders, warnings = {}, []
    for name, entry in read(path / "model_index.json").items():
        if type(entry) is not list or len(entry) != 2 or entry == [None, None] or name.startswith("_"):
            continue  # an option of the pipeline, or a component that it goes without
        if not re.fullmatch(r"[\w-]+(\.[\w-]+)*", name):
            raise FormatError(
                f"`{path / 'model_index.json'}` names the component {name!r:.80}, which is no plain folder name",
                hint="do not use this folder: it may come from an attack",
                path=path,
            )
        if (path / name).is_dir():
            folders[name] = path / name
        else:
            warnings.append(f"`{path.name}` lists the component `{name}`, whose folder is missing")
    return folders, warnings


def _looks_like_model(folder: Path) -> bool:
    """Schedulers and tokenizers have no config.json of their own."""
    return (folder / "config.json").is_file()


def _class_name(folder: Path) -> str:
    """From config.json: `_class_name` of diffusers or the first of transformers' `architectures`."""
    if not (folder / "config.json").is_file():
        return ""
    config = read(folder / "config.json")
    names: list[Any] = [config.get("_class_name")]
    if type(config.get("architectures")) is list:
        names += config["architectures"]
    return next((name for name in names if type(name) is str), "")


def _weights(folder: Path) -> Path | None:
    """The weights to take: safetensors before .bin, plain before fp16 before other variants, one file before shards."""
    found: list[tuple[tuple[bool, bool, bool, str, bool, str], Path]] = []
    for name in os.listdir(folder):
        match = _WEIGHTS.fullmatch(name) or _INDEX.fullmatch(name)
        if match:
            variant = match["variant"] or ""
            many = "-of-" in name or name.endswith(".json")
            rank = (match["ending"] != "safetensors", bool(variant), variant != "fp16", variant, many, name)
            found.append((rank, folder / name))
    return min(found)[1] if found else None


def _open_weights(path: Path) -> FileSource:
    is_part = shards.INDEX.fullmatch(path.name) or shards.SHARD.fullmatch(path.name)
    return shards.open(path) if is_part else open_file(path)
