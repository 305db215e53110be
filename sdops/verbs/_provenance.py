"""What a merged file says about itself, and what it is called when nobody names it."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from sdops import __version__
from sdops.card import Card
from sdops.core.dial import Dial

RECIPE = "sdops"  # metadata key of the recipe
LONGEST_NAME = 200  # bytes of a derived name; file systems take 255
LONGEST_KNOBS = 100  # bytes of it

# ModelSpec keys that stay true when models of one kind are merged (https://github.com/Stability-AI/ModelSpec).
INHERITED = (
    "architecture",
    "implementation",
    "resolution",
    "prediction_type",
    "license",
    "usage_hint",
    "encoder_layer",
    "timestep_range",
)


def recipe(card: Card, settings: Mapping[str, Any], inputs: Sequence[Mapping[str, Any]], seed: int) -> dict[str, Any]:
    """Everything needed to make the file again.

    Args:
        card: The method.
        settings: Knobs and policies that the user gave or that differ from the default.
        inputs: For each input its role (a, b, base, vae ...), file name, and SHA-256 or recipe.
        seed: Recorded if the method is random.
    """
    made = {"version": __version__, "verb": "merge", "method": card.name.replace("_", "-")}
    random = {"seed": seed} if "noise" in card.needs else {}
    return {**made, **settings, **random, "inputs": [dict(i) for i in inputs]}


def metadata(
    first: Mapping[str, str], architecture: str, title: str, names: Sequence[str], made: Mapping[str, Any]
) -> dict[str, str]:
    """Header metadata of a merge: ModelSpec keys and the recipe.

    `modelspec.hash_sha256`, the hash of the tensors in file order, is left out: workers write them in any order, so it
    would take another reading of the file. `sdops hash FILE` tells it, and a missing hash is better than a wrong one.

    Args:
        first: The first model's metadata.
        architecture: In the words of ModelSpec, as detected; the first model's own word goes before it.
        title: Of the result.
        names: The merged models' names.
        made: The recipe.
    """
    detected = {"modelspec.architecture": architecture} if architecture else {}
    inherited = {f"modelspec.{k}": first[f"modelspec.{k}"] for k in INHERITED if f"modelspec.{k}" in first}
    return {
        "format": "pt",  # some loaders refuse files without it
        "modelspec.sai_model_spec": "1.0.1",
        **detected,
        **inherited,
        "modelspec.title": title,
        "modelspec.merged_from": ", ".join(Path(name).name for name in names),
        RECIPE: compact(made),
    }


def with_hashes(text: str, hashes: Sequence[str]) -> str:
    """The recipe with the inputs' SHA-256 in place; its length does not change."""
    made = json.loads(text)
    for item, digest in zip(_files(made), hashes, strict=True):
        item["sha256"] = digest
    return compact(made)


def without_hashes(text: str) -> str:
    """The recipe for users who do not want to wait for hashes."""
    made = json.loads(text)
    for item in _files(made):
        del item["sha256"]
    return compact(made)


def _files(made: Mapping[str, Any]) -> Iterator[dict[str, str]]:
    """The records of inputs that lie on disk, also those of merges within the merge."""
    for item in made["inputs"]:
        if "recipe" in item:
            yield from _files(item["recipe"])
        elif "sha256" in item:
            yield item


def compact(made: Mapping[str, Any]) -> str:
    """A recipe as the header holds it."""
    return json.dumps(made, ensure_ascii=False, separators=(",", ":"))


def derived_name(card: Card, models: Sequence[str], knobs: Mapping[str, Any], dtype: str) -> str:
    """`a+b.weighted-sum.alpha0.3.safetensors`: inputs, method, and the knobs that differ from their defaults."""
    defaults = {knob.name: knob.default for knob in card.knobs}
    changed = [f"{name}{_short(value)}" for name, value in knobs.items() if not _is_default(value, defaults[name])]
    words = [card.name.replace("_", "-"), _cut(".".join(changed), LONGEST_KNOBS), dtype, "safetensors"]
    rest = "." + ".".join(filter(None, words))
    return _cut("+".join(Path(model).stem for model in models), LONGEST_NAME - len(rest.encode())) + rest


def _is_default(value: Any, default: Any) -> bool:
    if isinstance(value, Dial):
        return value.is_constant and value.default == default
    return bool(value == default)


def _cut(text: str, limit: int) -> str:
    """A text of at most `limit` bytes; a longer one ends in dots."""
    encoded = os.fsencode(text)  # a file name need not be text
    return text if len(encoded) <= limit else encoded[: max(limit - 3, 0)].decode(errors="ignore") + "..."


def _short(value: Any) -> str:
    """A knob's value in a file name."""
    if isinstance(value, Dial):
        return f"{value.default:g}" if value.is_constant else "-blocks"
    if isinstance(value, tuple):
        return "_".join(f"{v:g}" for v in value)
    return f"{value:g}" if isinstance(value, float) else f"-{value}"
