"""A folder of diffusers: its tensors, and all the small files that make it load."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdops import standin
from sdops.archs.detect import OTHER, Detection
from sdops.archs.junk import junk_kind
from sdops.core.assembled import Constants, rows
from sdops.core.source import Source
from sdops.errors import MismatchError, UsageError
from sdops.formats import read_json
from sdops.pipelines import sizes
from sdops.pipelines.tables import Component, Pipeline, pipeline
from sdops.pipelines.tokenizer import clip_files
from sdops.verbs._convert_draft import Draft, Entry, component_table, identity, no_folder, own_place, single_file
from sdops.verbs._convert_extra import Extra
from sdops.verbs._convert_layout import lay_out
from sdops.verbs._convert_select import Chosen, Selection
from sdops.verbs._convert_wish import Wish
from sdops.verbs._traits import prediction

VERSION = "0.36.0"  # of diffusers, whose configurations these are
_PROJECTION = "text_projection.weight"
_NO_PLACE = ("text_model.embeddings.position_ids",)  # newer versions of transformers refuse them
_SMALL = 64_000_000  # bytes of a file that is taken over from another folder
_SMALL_FILES = (".json", ".txt", ".model")


@dataclass(frozen=True, slots=True)
class Placed:
    """A component and where it lies: its table, and `unet/` or nothing if it is alone."""

    chosen: Chosen
    table: Component
    prefix: str


def folder(source: Source, detection: Detection, selection: Selection, wish: Wish) -> Draft:
    """Lay out a single file as a folder.

    Raises:
        UsageError: a component has no class in diffusers that sdops knows.
        MismatchError: tensors are unknown, or missing where the configuration is read from them.
    """
    draft = Draft(dropped=dict(selection.dropped), taken=selection.taken, notes=list(selection.notes))
    found = pipeline(detection.family, _variants(*(selection.teller or (source, detection))))
    placed = _placed(source, detection, selection, found)
    for each in placed:
        layout, prefix = own_place(each.chosen.name, detection, selection)
        draft.stems[each.prefix] = each.table.stem
        draft.places[each.chosen.name] = {"layout": layout, "prefix": prefix}
        _add_component(draft, each, wish)
    for key, kind in selection.others.items():
        if kind == OTHER and wish.unknown != "keep":
            draft.unknown.append(key)
        else:
            draft.aside[key] = Entry(rows(selection.elsewhere.get(key, source), key), kind, key)
    if wish.unknown == "drop":
        draft.dropped |= dict.fromkeys(draft.unknown, "unknown")
        draft.unknown = []
    draft.check_unknown(source.name)
    _add_files(draft, placed, found, wish)
    return draft


def same_folder(
    source: Source, detection: Detection, selection: Selection, wish: Wish, extra: Extra | None, path: Path
) -> Draft:
    """Lay out a folder as a folder: every file in its place, whatever sdops knows about it.

    Args:
        source: The folder's tensors.
        detection: What it is.
        selection: What is converted.
        wish: The request.
        extra: Its side file, whose tensors come along.
        path: The folder.
    """
    draft = single_file(source, detection, selection, wish, None, relay=False)
    prefixes = {key[: key.find("/") + 1] for key in draft.tensors}
    for prefix in prefixes:
        stem = "diffusion_pytorch_model"
        own = any(file.name.startswith(stem) for file in (path / prefix).iterdir())
        draft.stems[prefix] = stem if own else "model"
    parts = {prefix.removesuffix("/") for prefix in prefixes}
    draft.files = small_files(path, parts)
    if wish.reference is not None:
        draft.files |= small_files(wish.reference, parts)
    if index := index_of(path):
        for name, entry in index.items():
            if isinstance(entry, list) and not any(file.startswith(f"{name}/") for file in draft.files):
                index[name] = [None, None]
        draft.files["model_index.json"] = _json(index)
    if extra is not None:
        draft.aside = {
            name: Entry(rows(extra.source, key), junk_kind(name) or OTHER, name) for name, key in extra.tensors.items()
        }
    return draft


def _variants(source: Source, detection: Detection) -> list[str]:
    """Variants that archs tells, and what the model predicts."""
    found = list(detection.variants)
    said = prediction(source, detection)
    if said and said[0].removeprefix("likely ").startswith("v"):
        found.append("v")
    if any(line.startswith("zero terminal SNR") for line in said):
        found.append("zero-terminal-snr")
    return found


def _placed(source: Source, detection: Detection, selection: Selection, found: Pipeline | None) -> list[Placed]:
    """Where every component goes.

    Raises:
        UsageError: there is no place.
    """
    tables = {
        each.name: found.components[each.name]
        if found and each.name in found.components
        else component_table(each.name, detection.family)
        for each in selection.parts
    }
    lost = [name for name, table in tables.items() if table is None]
    if lost or not selection.parts:
        raise no_folder(source.name, lost or ["it"], tables.keys() - set(lost))
    alone = len(selection.parts) == 1
    if not alone and (found is None or not found.class_name):
        names = ", ".join(tables)
        raise UsageError(
            f"sdops knows no pipeline for {detection.title} with {names}",
            hint=f"convert one at a time: `--components {selection.parts[0].name}`",
        )
    return [
        Placed(each, table, "" if alone else f"{table.folder}/")
        for each in selection.parts
        if (table := tables[each.name]) is not None
    ]


def _add_component(draft: Draft, placed: Placed, wish: Wish) -> None:
    chosen, table, prefix = placed.chosen, placed.table, placed.prefix
    home = draft.places[chosen.name]
    layout = "hf" if table.library == "transformers" else "diffusers"
    laid = lay_out(chosen, layout, (*table.drop, *_NO_PLACE))
    for name, made in laid.tensors.items():
        draft.add(prefix + name, Entry(made, chosen.name, name))
    if table.projection and _PROJECTION not in laid.tensors:
        spec = laid.tensors["text_model.final_layer_norm.weight"].spec
        made = rows(Constants("identity", {_PROJECTION: identity(spec.shape[0], spec.dtype)}), _PROJECTION)
        draft.add(prefix + _PROJECTION, Entry(made, chosen.name, _PROJECTION))
        draft.invented[prefix + _PROJECTION] = "the identity: the class wants a projection, the file has none"
    unknown = set(laid.unknown)
    for name in laid.left:
        key = chosen.read[name]
        if name in unknown and wish.unknown != "keep":
            draft.unknown.append(key)
        elif home["layout"] == chosen.part.layout:
            draft.aside[home["prefix"] + name] = Entry(rows(chosen.source, key), chosen.name, name)
        else:
            draft.dropped[key] = "has no place in the folder, and another name in the model's file"


# ---------------------------------------------------------------------------------------------------------- small files


def _add_files(draft: Draft, placed: list[Placed], found: Pipeline | None, wish: Wish) -> None:
    """Configurations, and of a pipeline scheduler, tokenizers and model_index.json; those of the reference come first.

    Raises:
        UsageError: the reference is no folder.
    """
    for each in placed:
        draft.files[f"{each.prefix}config.json"] = _json(_config(draft, each))
    if not (found and found.class_name and placed[0].prefix):
        if wish.reference is not None:
            draft.files |= small_files(wish.reference, {""})
        return
    index = _pipeline_files(draft, placed, found, _t5_files(found, wish))
    theirs: dict[str, Any] = {}
    if wish.reference is not None:
        draft.files |= small_files(wish.reference, {each.table.folder for each in placed})
        theirs = index_of(wish.reference)
    for name, entry in {**index, **theirs}.items():
        if isinstance(entry, list):
            there = any(file.startswith(f"{name}/") for file in draft.files)
            index[name] = entry if there else [None, None]
        else:
            index[name] = entry
    draft.files["model_index.json"] = _json(index)
    draft.notes += _missing(found, [name for name, entry in index.items() if entry == [None, None]])


def _missing(found: Pipeline, absent: list[str]) -> Iterator[str]:
    """What the pipeline cannot do without and the folder lacks, and where to get it."""
    parts = [each for each in found.components.values() if each.folder in absent]
    encoders = [each.folder for each in parts if each.library == "transformers"]
    others = [each.folder for each in parts if each.library != "transformers"]
    tokenizers = [each["folder"] for each in found.tokenizers if each["folder"] in absent]
    if encoders:
        yield f"the model has no {', '.join(encoders)}: `--text-encoder FILE` takes those of other files"
    if others:
        yield f"the model has no {', '.join(others)}" + (": `--vae FILE` takes another's" if "vae" in others else "")
    if tokenizers:
        yield (
            f"the folder has no {', '.join(tokenizers)}: T5's vocabulary does not come with sdops; `--tokenizer FILE` "
            "takes a `tokenizer.json` or `spiece.model`, which ComfyUI has in comfy/text_encoders/t5_tokenizer and the "
            "Hub in google/t5-v1_1-xxl"
        )
    if names := [*encoders, *others, *tokenizers]:
        yield f"as it is, it loads with `from_pretrained(FOLDER, {', '.join(f'{name}=None' for name in names)})`"


def _t5_files(found: Pipeline, wish: Wish) -> Mapping[str, bytes]:
    """The tokenizer that the user names.

    Raises:
        UsageError: it is none of T5's, or the pipeline has no place for it.
    """
    if wish.tokenizer is None:
        return {}
    if all(each["kind"] != "t5" for each in found.tokenizers):
        raise UsageError(
            f"a {found.class_name} has no T5, and its tokenizers come with sdops", hint="leave `--tokenizer` away"
        )
    from sdops.verbs._convert_tokenizer import t5_files

    return t5_files(wish.tokenizer)


def _config(draft: Draft, placed: Placed) -> dict[str, Any]:
    """The configuration of a component.

    Raises:
        MismatchError: a tensor is missing that it is read from.
    """
    table = placed.table
    shapes = {entry.name: entry.made.spec.shape for entry in draft.tensors.values() if entry.component == table.name}
    try:
        found = sizes.config(table.class_name, shapes, table.config)
    except (KeyError, StopIteration, ValueError) as error:
        raise MismatchError(
            f"the {table.name} lacks {error or 'tensors'}, so that no `{table.class_name}` can be made of it",
            hint="`sdops inspect` shows what is missing",
        ) from error
    if found is None:
        raise no_folder(placed.chosen.source.name, [table.name], ())
    if table.library == "transformers":
        return {"architectures": [table.class_name], **found}
    return {"_class_name": table.class_name, "_diffusers_version": VERSION, **found}


def _pipeline_files(draft: Draft, placed: list[Placed], found: Pipeline, t5: Mapping[str, bytes]) -> dict[str, Any]:
    """Write scheduler and tokenizers; returns model_index.json."""
    index: dict[str, Any] = {"_class_name": found.class_name, "_diffusers_version": VERSION, **found.options}
    there = {each.table.folder for each in placed}
    for table in found.components.values():
        index[table.folder] = [table.library, table.class_name] if table.folder in there else [None, None]
    scheduler = {key: value for key, value in found.scheduler.items() if key != "class"}
    kind = found.scheduler["class"]
    told = {"_class_name": kind, "_diffusers_version": VERSION, **scheduler}
    draft.files["scheduler/scheduler_config.json"] = _json(told)
    index["scheduler"] = ["diffusers", kind]
    for tokenizer in found.tokenizers:
        index[tokenizer["folder"]] = ["transformers", tokenizer["class"]]
        files = clip_files(tokenizer["pad"]) if tokenizer["kind"] == "clip" else t5
        draft.files |= {f"{tokenizer['folder']}/{name}": data for name, data in files.items()}
    return index | {name: [None, None] for name in found.absent}


def index_of(reference: Path) -> dict[str, Any]:
    """The model_index.json of a folder; nothing for a component alone."""
    path = reference / "model_index.json"
    return read_json(path) if path.is_file() else {}


def small_files(reference: Path, components: Collection[str]) -> dict[str, bytes]:
    """The small files of a folder: all but weights, model_index.json, and what belongs to models that are not there.

    Args:
        reference: The folder.
        components: Folders inside it (or "" for itself) whose models are there.

    Raises:
        UsageError: it is no folder.
    """
    if not reference.is_dir():
        raise UsageError(f"`{reference}` is no folder", hint="`--reference` takes a folder of diffusers")
    found: dict[str, bytes] = {}
    for path in sorted([*reference.iterdir(), *reference.glob("*/*")]):
        name, folder = path.relative_to(reference).as_posix(), path.parent
        part = "" if folder == reference else folder.name
        absent = (folder / "config.json").is_file() and part not in components
        wanted = path.suffix in _SMALL_FILES and not name.endswith((".index.json", "model_index.json"))
        if wanted and not absent and path.is_file() and path.stat().st_size <= _SMALL:
            found[name] = standin.content(path)
    return found


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()
