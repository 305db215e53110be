"""The README.md of a model on the Hub: what it is, from what and how it was made, how to make it again."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sdops.archs.detect import Detection
from sdops.hub.reference import parse
from sdops.text import size
from sdops.verbs._provenance import RECIPE

MARK = "<!-- Written by sdops push: edit this card, remove this line, and it is kept. -->"
_TAGS = {"sd1": "stable-diffusion", "sd2": "stable-diffusion", "sdxl": "stable-diffusion-xl", "flux1": "flux"}
_MADE = {
    "merge": "A merge",
    "apply": "A model with LoRAs added",
    "extract": "A LoRA, extracted as the difference of two models",
    "resize": "A LoRA at other ranks",
    "convert": "A conversion",
    "train": "Trained",
    "build": "Built from a recipe",
}


@dataclass(slots=True)
class Published:
    """What the card is about.

    Attributes:
        repo: owner/name.
        files: Path in the repository -> bytes and SHA-256.
        main: Path of the file that the card is about.
        detection: What it is.
        metadata: Of the file.
        bases: Repositories that the user names.
        license: As the user names it.
        tags: More tags.
    """

    repo: str
    files: Mapping[str, tuple[int, str]]
    main: str
    detection: Detection
    metadata: Mapping[str, str]
    bases: Sequence[str] = ()
    license: str = ""
    tags: Sequence[str] = ()
    recipe: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        try:
            found = json.loads(self.metadata.get(RECIPE, "{}"))
        except ValueError:
            found = {}
        self.recipe = found if isinstance(found, dict) else {}


def inputs_of(recipe: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """Every file that went into a model, also those of merges within the merge."""
    for item in recipe.get("inputs", ()):
        if isinstance(item, dict) and isinstance(item.get("recipe"), dict):
            yield from inputs_of(item["recipe"])
        elif isinstance(item, dict):
            yield item


def relation(model: Published) -> str:
    """How the Hub calls the relation to the base models: adapter, quantized, merge or finetune."""
    if model.detection.family == "adapter":
        return "adapter"
    if model.detection.quantised or model.main.endswith(".gguf"):
        return "quantized"
    return "merge" if model.recipe.get("verb") in ("merge", "apply", "build") else "finetune"


def base_models(model: Published) -> list[str]:
    """Repositories of the inputs; of an adapter's, those that it is to be used with."""
    found = [item for item in inputs_of(model.recipe) if isinstance(item.get("hub"), str)]
    if model.detection.family == "adapter":
        found = [item for item in found if item.get("role") in ("base", "model")] or found
    return list(dict.fromkeys([*model.bases, *(parse(item["hub"]).repo for item in found)]))


def card(model: Published) -> str:
    """The whole text."""
    return "\n".join([*_front(model), MARK, "", *_body(model)]) + "\n"


def _front(model: Published) -> list[str]:
    """The facts that the Hub reads. JSON strings are YAML, too."""
    bases = base_models(model)
    own = model.metadata.get("modelspec.license", "")
    license_ = model.license or (own if re.fullmatch(r"[a-z0-9][a-z0-9.-]*", own) else "")
    kind = {"adapter": "lora", "merge": "merge"}.get(relation(model), "")
    family = _TAGS.get(model.detection.family, model.detection.family)
    tags = [
        tag
        for tag in ("text-to-image", family, kind, "sdops", *model.tags)
        if tag and tag not in ("unknown", "adapter")
    ]
    lines = ["---", "pipeline_tag: text-to-image", "library_name: diffusers"]
    lines += [f"license: {json.dumps(license_)}"] if license_ else []
    if bases:
        lines += [
            "base_model:",
            *(f"- {json.dumps(base)}" for base in bases),
            f"base_model_relation: {relation(model)}",
        ]
    return [*lines, "tags:", *(f"- {json.dumps(tag)}" for tag in dict.fromkeys(tags)), "---", ""]


def _body(model: Published) -> list[str]:
    title = model.metadata.get("modelspec.title") or model.repo.partition("/")[2]
    made = _MADE.get(str(model.recipe.get("verb")), "")
    lines = [f"# {_cell(title)}", "", f"{model.detection.title}." + (f" {made}." if made else ""), ""]
    if about := model.metadata.get("modelspec.description"):
        lines += [_cell(about), ""]
    if phrase := model.metadata.get("modelspec.trigger_phrase"):
        lines += [f"Trigger phrase: `{_cell(phrase)}`", ""]
    return lines + _how(model) + _files(model) + _again(model)


def _how(model: Published) -> list[str]:
    recipe = model.recipe
    if not recipe:
        return []
    lines = ["## How it was made", ""]
    facts = {name: recipe[name] for name in ("verb", "method", "seed", "dtype") if name in recipe}
    facts |= recipe.get("knobs") or {}
    lines += [
        f"- {name}: `{_cell(value if isinstance(value, str) else json.dumps(value))}`" for name, value in facts.items()
    ]
    rows = list(inputs_of(recipe))
    if rows:
        lines += ["", "| role | file | SHA-256 |", "| --- | --- | --- |"]
        lines += [f"| {_cell(row.get('role', ''))} | {_link(row)} | `{_cell(row.get('sha256', ''))}` |" for row in rows]
    return [*lines, ""]


def _link(row: Mapping[str, Any]) -> str:
    name = _cell(row.get("file", ""))
    if not isinstance(row.get("hub"), str):
        return f"`{name}`"
    found = parse(row["hub"])
    return f"[{name}](https://huggingface.co/{found.repo}/blob/{found.revision}/{found.path}) of {found.repo}"


def _files(model: Published) -> list[str]:
    rows = [
        f"| `{_cell(path)}` | {size(nbytes)} | `{digest}` |" for path, (nbytes, digest) in model.files.items() if digest
    ]
    return ["## Files", "", "| file | size | SHA-256 |", "| --- | --- | --- |", *rows, ""]


def _again(model: Published) -> list[str]:
    """How to rebuild it, if it says how it was made."""
    address = f"hf://{model.repo}/{model.main}" if model.main else f"hf://{model.repo}"
    look = ["## Look and use", "", "```", f"sdops inspect {address}", f"sdops pull {address} -o models/", "```", ""]
    if not model.recipe:
        return look
    text = json.dumps(model.recipe, indent=2, ensure_ascii=False)
    again = ["## How to make it again", "", "```"]
    again += [f"sdops recipe from {address} -o recipe.toml", "sdops build recipe.toml", "```", ""]
    told = ["The same inputs give the same bytes. The whole record, as it stands in the file's metadata:", ""]
    return [*look, *again, *told, "```json", text.replace("```", "` ` `"), "```"]


def _cell(value: Any) -> str:
    """A text from a file that cannot break out of its line, its table or its code."""
    return re.sub(r"[\s|`<>\[\]]+", " ", str(value)).strip()[:300]
