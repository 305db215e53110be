"""Recipes out of what web UIs write into a merge under sd_merge_recipe and sd_merge_models.

Formulas (A1111 modules/extras.py, hako-mikan/sd-webui-supermerger scripts/mergers/mergers.py, Chattiori-Model-Merger):
    Weighted sum, Weight sum, WS    (1 - m) A + m B
    Add difference, AD              A + m (B - C)
    sum Twice, ST                   (1 - beta) ((1 - alpha) A + alpha B) + beta C
    Triple sum, TRS                 (1 - alpha - beta) A + alpha B + beta C
Models are known by hash and name: a model that is itself a merge, whose recipe stands under sd_merge_models, becomes a
step; every other one an input, whose SHA-256 is checked where the file tells it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import PureWindowsPath
from typing import Any

from sdops.errors import FormatError
from sdops.verbs._recipe_text import MOST_STEPS, Recipe, from_document

# What a mode begins with in the web UI and supermerger, and what it is called by Chattiori -> ours.
_MODES = {
    "weight": "weighted-sum",
    "add": "add-difference",
    "sum twice": "sum-twice",
    "triple": "triple-sum",
    "no interpolation": "average",
}
_SHORT = {
    "ws": "weighted-sum",
    "ad": "add-difference",
    "sad": "smooth-add",
    "st": "sum-twice",
    "trs": "triple-sum",
    "geo": "geometric-sum",
    "noin": "average",
}
# How supermerger and Chattiori calculate -> (the only mode that it goes with, ours).
_CALCULATIONS = {
    "cosinea": ("weighted-sum", "cosine-a"),
    "cosineb": ("weighted-sum", "cosine-b"),
    "cosine_0": ("weighted-sum", "cosine-a"),
    "cosine_1": ("weighted-sum", "cosine-b"),
    "traindifference": ("add-difference", "train-difference"),
    "smoothadd": ("add-difference", "smooth-add"),
    "smoothadd mt": ("add-difference", "smooth-add"),
}
_MODELS = {"average": 1, "weighted-sum": 2, "cosine-a": 2, "cosine-b": 2, "geometric-sum": 2}
_HASHES = (
    ("primary_model_hash", "model_a"),
    ("secondary_model_hash", "model_b"),
    ("tertiary_model_hash", "model_c"),
)
_WITH_BETA = ("sum-twice", "triple-sum")
_UNTOUCHED_AT_0 = ("weighted-sum", "add-difference", "sum-twice", "triple-sum", "train-difference", "smooth-add")
_BLOCK = re.compile(r"BASE|IN\d\d?|M00|OUT\d\d?|VAE")
_NOTHING: tuple[object, ...] = (None, "", "None", [], [""], False)
_FILE = re.compile(r"[^\s\\/:].*\.(safetensors|ckpt)")


def from_webui(metadata: Mapping[str, str], *, name: str, file: str) -> tuple[Recipe, list[str]]:
    """The recipe of a merge, and what could not be taken over.

    Args:
        metadata: Of the merge.
        name: What the recipe is called.
        file: The merge, for messages.

    Raises:
        FormatError: the metadata are damaged, or of a merge that is not known.
        UsageError: they make no recipe.
    """
    writer = _Writer(_table(metadata, "sd_merge_models", file), file)
    writer.step(_table(metadata, "sd_merge_recipe", file))
    writer.warnings.append(
        "web UIs calculate in half precision: here the same formula is rounded once, so bytes differ"
    )
    document = {"name": name, "about": f"How {file} was made in a web UI", "inputs": writer.inputs}
    made = from_document({**document, "steps": writer.steps}, name=name, folder=None, title=file)
    return made, list(dict.fromkeys(writer.warnings))


def _table(metadata: Mapping[str, str], key: str, file: str) -> dict[str, Any]:
    found = _decoded(metadata.get(key, "{}"))
    if found is None:
        raise FormatError(f"`{key}` of `{file}` is damaged", hint=f"`sdops meta {file}` shows it", key=key)
    return found


def _decoded(value: object) -> dict[str, Any] | None:
    """A table, or the JSON of one: the web UI writes a merged model's own recipe either way."""
    try:
        found = json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


class _Writer:
    """Collects inputs and steps, each once."""

    def __init__(self, models: Mapping[str, Any], file: str) -> None:
        self.file = file
        self.inputs: dict[str, dict[str, str]] = {}
        self.steps: list[dict[str, Any]] = []
        self.warnings: list[str] = []
        self._models = models
        self._names: dict[str, str] = {}  # hash -> input or step

    def step(self, made: Mapping[str, Any], identity: str = "merged") -> None:
        """Add the steps of a recipe, the last one under a name.

        Raises:
            FormatError: it is of a merge that is not known.
        """
        method = self._method(made)
        digests, knobs = self._digests(made, method), self._knobs(made, method)
        models = [self._model(digest) for digest in digests]
        step = {"id": identity, "verb": "merge", "method": method, "models": models}
        self.steps.append(step | knobs | self._others(made))

    def _method(self, made: Mapping[str, Any]) -> str:
        """Our method for a mode and a way to calculate."""
        said = str(made.get("interp_method") or made.get("mode") or made.get("merge_method") or "").lower()
        mode = _SHORT.get(said) or next((ours for key, ours in _MODES.items() if said.startswith(key)), "")
        calculation = str(made.get("calcmode") or made.get("calculation") or "normal").lower()
        wanted, ours = (mode, mode) if calculation == "normal" else _CALCULATIONS.get(calculation, ("", ""))
        if not mode or mode != wanted:
            raise FormatError(
                f"`{self.file}` was made by `{said or '?'}`, `{calculation}`, for which there is no method here",
                hint="`sdops methods` lists ours; `sdops meta` shows what the file says",
            )
        return ours

    def _digests(self, made: Mapping[str, Any], method: str) -> list[str]:
        """The hashes of the models that a method reads."""
        wanted = _MODELS.get(method, 3)
        found = [next((str(made[key]) for key in keys if made.get(key)), "") for keys in _HASHES][:wanted]
        if "" in found:
            raise FormatError(
                f"`{self.file}` was made of {wanted} models by `{method}`, but names {len(found) - found.count('')}",
                hint="`sdops meta` shows it",
            )
        return found

    def _model(self, digest: str) -> str:
        """The name of the step that makes a model, or of the input that it is."""
        if digest not in self._names:
            known = _decoded(self._models.get(digest)) or {}
            own = _decoded(known.get("sd_merge_recipe")) or {}
            title = str(known.get("name") or f"the model with hash {digest[:10]}")
            name = self._free()
            self._names[digest] = name
            if not (own and len(self._names) < MOST_STEPS and self._is_remade(own, name, title)):
                self.inputs[name] = _input(digest, title)
        return self._names[digest]

    def _is_remade(self, made: Mapping[str, Any], name: str, title: str) -> bool:
        """Add the steps that make a model; False if it has to be given."""
        try:
            self.step(made, name)
        except FormatError as error:
            self.warnings.append(f"`{title}` is a merge, too, but has to be given: {error.message}")
            return False
        self.warnings.append(f"`{title}` is a merge, too, and is made again, as step `{name}`")
        return True

    def _free(self) -> str:
        """a, b, c ... in the order of appearance."""
        number = len(self._names)
        return chr(ord("a") + number) if number < 26 else f"model_{number + 1}"

    def _knobs(self, made: Mapping[str, Any], method: str) -> dict[str, Any]:
        """Weights, of blocks where the merge had them."""
        if method == "average":
            return {}
        rules = [*_elementals(made), *self._excluded(made, method)]
        alpha = made.get("base_alpha", made.get("multiplier", made.get("alpha", 0.5)))
        try:
            found = {"alpha": _dial(alpha, _weights(made, "alpha"), rules)}
            if method in _WITH_BETA:
                beta = made.get("base_beta", made.get("beta", 0.25))
                found["beta"] = _dial(beta, _weights(made, "beta"), self._excluded(made, method))
        except (TypeError, ValueError, IndexError):
            raise FormatError(f"the weights that `{self.file}` names are no numbers", hint="`sdops meta`") from None
        return found

    def _excluded(self, made: Mapping[str, Any], method: str) -> list[str]:
        """Rules for what supermerger leaves as it is in A."""
        blocks, included = (
            [word for word in made.get(key) or () if word not in _NOTHING and word != "print"]
            for key in ("Exclude", "Include")
        )
        if not blocks and not included:
            return []
        if not included and method in _UNTOUCHED_AT_0 and all(_BLOCK.fullmatch(str(word)) for word in blocks):
            return ["vae=0" if word == "VAE" else f"{word}=0" for word in blocks]
        self.warnings.append("which blocks and elements were included or excluded is left out")
        return []

    def _others(self, made: Mapping[str, Any]) -> dict[str, Any]:
        """The VAE, the dtype, what was thrown away."""
        found: dict[str, Any] = {}
        if made.get("save_as_half") in (True, "True"):
            found["dtype"] = "fp16"
        vae = made.get("bake_in_vae")
        if vae not in _NOTHING:
            title = vae if isinstance(vae, str) else "the VAE that was baked in"
            found["vae"] = next((name for name, one in self.inputs.items() if one["about"] == title), "")
            found["vae"] = found["vae"] or f"vae{len(self.steps) or ''}"
            self.inputs[found["vae"]] = _input("", title)
        discarded = made.get("discard_weights")
        if made.get("pruned") is True or "model_ema" in str(discarded):
            found["prune"] = True
        elif discarded not in _NOTHING:
            self.warnings.append(f"`discard_weights` of the merge is left out: `{discarded}`")
        return found


def _input(digest: str, title: str) -> dict[str, str]:
    """A model, with its file's name where the title has one: `model.safetensors [0123abcd]`."""
    entry = {"about": title}
    file = re.sub(r"\s*\[[0-9a-f]{8,}\]$", "", title).replace("\\", "/")
    if _FILE.fullmatch(file) and not PureWindowsPath(file).anchor and ".." not in file.split("/"):
        entry["file"] = file
    return entry | ({"sha256": digest} if len(digest) == 64 else {})


def _weights(made: Mapping[str, Any], which: str) -> list[float]:
    """The numbers of blocks behind BASE: 25 of SD1, 20 of SDXL with its VAE; none if the merge has one for all."""
    numbers = made.get(f"weights_{which}") or made.get(f"{which}s")
    if not numbers or made.get("mbw") in (False, "False"):
        return []
    words: Sequence[Any] = numbers.split(",")[-25:] if isinstance(numbers, str) else numbers
    return [float(word) for word in words]


def _dial(base: Any, blocks: Sequence[float], rules: Sequence[str]) -> Any:
    """One number, a list of block weights, or a text with rules."""
    number = float(base[0] if isinstance(base, list) else base)
    numbers = [number, *blocks]
    if rules:
        return ", ".join([*(f"{one!r}" for one in numbers), *rules])
    return numbers if blocks else number


def _elementals(made: Mapping[str, Any]) -> Iterator[str]:
    """supermerger's BLOCKS:ELEMENTS:RATIO."""
    said = made.get("elemental_merge") or ()
    words = re.split(r"[,\n]", said) if isinstance(said, str) else said
    yield from (str(word).strip() for word in words if str(word).count(":") == 2)
