"""The README.md of a model on the Hub: what it is, from what and how it was made, how to make it again."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote

from sdops.archs.detect import UNKNOWN, Detection
from sdops.errors import SdopsError, UsageError
from sdops.hub.listing import MODELS
from sdops.hub.reference import MAIN, Reference, parse
from sdops.text import escaped, size
from sdops.verbs._provenance import RECIPE

LICENSE = re.compile(r"[a-z0-9][a-z0-9.+-]*")  # identifiers of the Hub look so
MARK = "<!-- Written by sdops push: edit this card, remove this line, and it is kept. -->"
_TAGS = {"sd1": "stable-diffusion", "sd2": "stable-diffusion", "sdxl": "stable-diffusion-xl", "flux1": "flux"}
_MODELSPEC = {  # how an adapter says what it is for
    "stable-diffusion-v1": "stable-diffusion",
    "stable-diffusion-v2": "stable-diffusion",
    "stable-diffusion-xl": "stable-diffusion-xl",
    "flux-1": "flux",
}
_USES = {"adapter": "lora", "embedding": "textual_inversion", "controlnet": "controlnet"}  # tags that the Hub acts on
_MADE = {
    "merge": "A merge",
    "apply": "A model with LoRAs added",
    "hypernet apply": "A model with hypernetworks baked in",
    "hypernet to-lora": "A LoRA, made of hypernetworks",
    "custom apply": "A model with concepts of custom diffusion put in",
    "custom to-lora": "A LoRA, made of custom diffusion",
    "custom merge": "A LoRA of concepts of custom diffusion, merged in closed form",
    "extract": "A LoRA, extracted as the difference of two models",
    "resize": "A LoRA at other ranks",
    "convert": "A conversion",
    "train": "Trained",
}
_JOINED = ("merge", "apply", "hypernet apply", "custom apply")
_TOLD = ("version", "inputs", "knobs", "settings", "layouts")  # of a record: what is no plain setting


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
        models: Path -> metadata, of all models of a folder.
    """

    repo: str
    files: Mapping[str, tuple[int, str]]
    main: str
    detection: Detection
    metadata: Mapping[str, str]
    bases: Sequence[str] = ()
    license: str = ""
    tags: Sequence[str] = ()
    models: dict[str, Mapping[str, str]] = field(default_factory=dict)
    recipe: dict[str, Any] = field(init=False)

    def __post_init__(self) -> None:
        self.recipe = record_of(self.metadata)

    @property
    def kind(self) -> str:
        """model, control, adapter, vae, text_encoder or other."""
        main = self.detection.main
        return main.kind if main else "other"


def record_of(metadata: Mapping[str, str]) -> dict[str, Any]:
    """How a file says that it was made; empty if it does not."""
    return _read(metadata.get(RECIPE, ""))


def _read(text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def inputs_of(recipe: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """Every file that went into a model, also those of merges within the merge."""
    items = recipe.get("inputs")
    for item in items if isinstance(items, list) else ():
        if isinstance(item, dict) and isinstance(item.get("recipe"), dict):
            yield from inputs_of(item["recipe"])
        elif isinstance(item, dict):
            yield item


def _place(item: Mapping[str, Any]) -> Reference | None:
    """Where on the Hub an input is; None if it is nowhere, or if a stranger's record says what no reference is."""
    try:
        return parse(item["hub"]) if isinstance(item.get("hub"), str) else None
    except UsageError:
        return None


def _on_the_hub(recipe: Mapping[str, Any]) -> Iterator[tuple[str, Reference]]:
    """Role and place of every file of the Hub that went into a model, also into files that say how they were made."""
    for item in inputs_of(recipe):
        if place := _place(item):
            yield str(item.get("role")), place
        else:
            yield from _on_the_hub(_read(str(item.get("made", ""))))


def relation(model: Published) -> str:
    """How the Hub calls the relation to the base models: adapter, quantized, merge or finetune.

    The same weights in another form, be it fp16 or GGUF, are listed there as "quantized".
    """
    if model.kind in ("adapter", "control"):
        return "adapter"
    verb = model.recipe.get("verb")
    if verb in _JOINED or len(base_models(model)) > 1:
        return "merge"
    is_other_form = verb == "convert" or model.detection.quantised or model.main.endswith(".gguf")
    return "quantized" if is_other_form else "finetune"


def base_models(model: Published) -> list[str]:
    """Repositories of the inputs; of an adapter's, those that it is to be used with."""
    found = list(_on_the_hub(model.recipe))
    if model.kind == "adapter":
        found = [item for item in found if item[0] in ("base", "model")] or ([] if model.bases else found)
    return list(dict.fromkeys([*model.bases, *(place.repo for _, place in found)]))


def license_of(model: Published) -> str:
    """As the user names it, else as the file does in words that the Hub knows; empty if nobody does."""
    own = model.metadata.get("modelspec.license", "")
    return model.license or (own if LICENSE.fullmatch(own) else "")


def card(model: Published) -> str:
    """The whole text; it can be encoded, whatever a stranger's file says."""
    text = "\n".join([*_front(model), MARK, "", *_body(model)]) + "\n"
    return text.encode(errors="replace").decode()


def _front(model: Published) -> list[str]:
    """The facts that the Hub reads, in YAML."""
    bases, license_ = base_models(model), license_of(model)
    use = _USES.get(model.detection.family, "")
    merged = "merge" if model.recipe.get("verb") in _JOINED else ""
    task = _task(model)
    tags = [tag for tag in (task, _family(model), use, merged, "sdops", *model.tags) if tag]
    lines = ["---", *([f"pipeline_tag: {task}"] if task else []), f"library_name: {_library(model)}"]
    lines += [f"license: {_quoted(license_)}"] if license_ else []
    if bases:
        lines += [
            "base_model:",
            *(f"- {_quoted(base)}" for base in bases),
            f"base_model_relation: {relation(model)}",
        ]
    return [*lines, "tags:", *(f"- {_quoted(tag)}" for tag in dict.fromkeys(tags)), "---", ""]


def _quoted(text: str) -> str:
    """A string in YAML: as in JSON, whose halves of letters beyond 16 bits YAML does not know."""
    return escaped(json.dumps(text.encode(errors="replace").decode(), ensure_ascii=False))


def _task(model: Published) -> str:
    """What the Hub files it under; nothing for parts of models."""
    if model.kind not in ("model", "control", "adapter"):
        return ""
    return "text-to-video" if model.detection.family == "wan" else "text-to-image"


def _library(model: Published) -> str:
    """What the Hub shows code for: diffusers reads folders, LoRAs and embeddings by the repository's name."""
    if model.main.endswith(".gguf"):
        return "gguf"
    use = _USES.get(model.detection.family)
    return "diffusers" if not model.main or use in ("lora", "textual_inversion") else "diffusion-single-file"


def _family(model: Published) -> str:
    """The tag of the family, of an adapter that of the models that it is for."""
    if model.kind != "adapter":
        family = model.detection.family
        return "" if family == UNKNOWN else _TAGS.get(family, family)
    word = model.metadata.get("modelspec.architecture", "")
    told = next((tag for start, tag in _MODELSPEC.items() if word.startswith(start)), "")
    return told or next((_TAGS[name] for name in model.detection.variants if name in _TAGS), "")


def _body(model: Published) -> list[str]:
    number = sum(path.endswith(MODELS) for path in model.files)
    is_one_of_several = bool(model.main) and number > 1
    title = "" if is_one_of_several else model.metadata.get("modelspec.title")
    made = _MADE.get(str(model.recipe.get("verb")), "")
    lines = [f"# {_cell(title or model.repo.partition('/')[2])}", ""]
    lines += [f"{model.detection.title}." + (f" {made}." if made else ""), ""]
    if is_one_of_several:
        lines += [f"One of {number} models in this repository is told of here: `{_cell(model.main)}`.", ""]
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
    facts = {name: value for name, value in settings_of(recipe).items() if value is not None}
    lines += [
        f"- {_cell(name)}: `{_cell(value if isinstance(value, str) else json.dumps(value))}`"
        for name, value in facts.items()
    ]
    rows = list(inputs_of(recipe))
    if rows:
        lines += ["", "| role | file | SHA-256 |", "| --- | --- | --- |"]
        hashes = [f"`{_cell(row['sha256'])}`" if row.get("sha256") else "not recorded" for row in rows]
        lines += [
            f"| {_cell(row.get('role', ''))} | {_link(row)} | {digest} |"
            for row, digest in zip(rows, hashes, strict=True)
        ]
    return [*lines, ""]


def settings_of(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """The verb, and everything that was chosen."""
    found = {name: value for name, value in recipe.items() if name not in _TOLD}
    for group in ("knobs", "settings"):
        found |= recipe[group] if isinstance(recipe.get(group), dict) else {}
    return found


def _link(row: Mapping[str, Any]) -> str:
    name = _cell(row.get("file", ""))
    found = _place(row)
    if found is None:
        return f"`{name}`"
    kind = "blob" if found.path else "tree"
    place = f"{found.repo}/{kind}/{quote(found.revision or MAIN, safe='')}/{quote(found.path)}".rstrip("/")
    return f"[{name}](https://huggingface.co/{place}) of {found.repo}"


def _files(model: Published) -> list[str]:
    """All files, and of several models what tells them from each other."""
    settings = {path: settings_of(record_of(metadata)) for path, metadata in model.models.items()}
    names = list(dict.fromkeys(name for each in settings.values() for name in each))
    differing = [name for name in names if len({json.dumps(each.get(name)) for each in settings.values()}) > 1]
    heads = ["file", *differing, "size", "SHA-256"]
    rows = []
    for path, (nbytes, digest) in model.files.items():
        chosen = [_cell(settings.get(path, {}).get(name, "")) for name in differing]
        rows.append([f"`{_cell(path)}`", *chosen, size(nbytes), f"`{digest}`"])
    table = [heads, ["---"] * len(heads), *rows]
    return ["## Files", "", *(f"| {' | '.join(row)} |" for row in table), ""]


def _again(model: Published) -> list[str]:
    """How to get it, and how to rebuild it, if it says how it was made."""
    address = shlex.quote(str(Reference(model.repo, path=model.main)))
    here = "models/" if model.main else shlex.quote(model.repo.partition("/")[2])
    look = ["## Look and use", "", *_code(f"sdops inspect {address}", f"sdops pull {address} -o {here}"), ""]
    if not model.recipe:
        return look
    record = json.dumps(model.recipe, indent=2, ensure_ascii=False)
    told = ["The whole record, as it stands in the file's metadata:", "", *_code(record, kind="json")]
    return [*look, *_rebuild(model, address), *told]


def _code(*lines: str, kind: str = "") -> list[str]:
    """Text in a fence that is longer than any in it."""
    longest = max(map(len, re.findall("`+", "\n".join(lines))), default=0)
    fence = "`" * max(3, longest + 1)
    return [fence + kind, *lines, fence]


def _rebuild(model: Published, address: str) -> list[str]:
    """The commands, if recipes know all of its steps."""
    from sdops.verbs._recipe_from import from_provenance

    try:
        from_provenance(model.metadata[RECIPE], name="recipe", file=model.main)
    except SdopsError:
        return []
    name = model.main.rpartition("/")[2] or model.repo.partition("/")[2]  # LoRAs are called after their file
    build = f"sdops build recipe.toml -o {shlex.quote(name)}"
    lines = ["## How to make it again", "", *_code(f"sdops recipe from {address} -o recipe.toml", build), ""]
    here = [f"`{_cell(row.get('file', ''))}`" for row in inputs_of(model.recipe) if _place(row) is None]
    beside = f" What has no link above must lie beside recipe.toml: {', '.join(dict.fromkeys(here))}." if here else ""
    return [*lines, f"The same inputs give the same bytes.{beside}", ""]


def _cell(value: Any) -> str:
    """A text from a file that cannot break out of its line, its table or its code."""
    return re.sub(r"[\s|`<>\[\]\\]+", " ", str(value)).strip()[:300]
