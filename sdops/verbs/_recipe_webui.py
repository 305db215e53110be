"""Recipes out of what the A1111 web UI and supermerger write into a merge: sd_merge_recipe, sd_merge_models.

Formulas (A1111 modules/extras.py, hako-mikan/sd-webui-supermerger scripts/mergers/mergers.py):
    Weighted sum, Weight sum        (1 - m) A + m B
    Add difference                  A + m (B - C)
    sum Twice                       (1 - beta) ((1 - alpha) A + alpha B) + beta C
    Triple sum                      (1 - alpha - beta) A + alpha B + beta C
Models are known by hash only, so each has to be given; its SHA-256 is checked where the file tells it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from sdops.errors import FormatError
from sdops.verbs._recipe_text import Recipe, from_document

_METHODS = {
    "weighted sum": "weighted-sum",
    "weight sum": "weighted-sum",
    "weight": "weighted-sum",
    "add difference": "add-difference",
    "add": "add-difference",
    "sum twice": "sum-twice",
    "twice": "sum-twice",
    "triple sum": "triple-sum",
    "triple": "triple-sum",
    "no interpolation": "average",
}
_CALCULATIONS = {
    "normal": "",
    "cosinea": "cosine-a",
    "cosineb": "cosine-b",
    "traindifference": "train-difference",
    "smoothadd": "smooth-add",
    "smoothadd mt": "smooth-add",
}
_ROLES = (("primary", "a"), ("secondary", "b"), ("tertiary", "c"))
_LEFT_OUT = ("loras", "elemental_merge", "finetune", "discard_weights", "bake_in_vae")


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
    made, models = _table(metadata, "sd_merge_recipe", file), _table(metadata, "sd_merge_models", file)
    method, warnings = _method(made, file)
    inputs = {}
    for word, role in _ROLES:
        digest = str(made.get(f"{word}_model_hash") or made.get(f"{word}_model_sha256") or "")
        if digest:
            inputs[role] = _input(digest, models)
    wanted = {"average": 1, "weighted-sum": 2, "cosine-a": 2, "cosine-b": 2}.get(method, 3)
    if len(inputs) < wanted:
        raise FormatError(
            f"`{file}` was made of {wanted} models by `{method}`, but names {len(inputs)}", hint="`sdops meta` shows it"
        )
    step: dict[str, Any] = {"verb": "merge", "models": list(inputs)[:wanted], "method": method}
    step |= _knobs(made, method)
    if made.get("save_as_half") in (True, "True"):
        step["dtype"] = "fp16"
    warnings += [
        f"`{key}` of the merge is left out" for key in _LEFT_OUT if made.get(key) not in (None, "", [], "None")
    ]
    warnings.append("web UIs calculate in half precision: here the same formula is rounded once, so bytes differ")
    document = {"name": name, "about": f"How {file} was made in a web UI", "inputs": inputs, "steps": [step]}
    return from_document(document, name=name, folder=None, title=file), warnings


def _table(metadata: Mapping[str, str], key: str, file: str) -> dict[str, Any]:
    try:
        found = json.loads(metadata.get(key, "{}"))
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise FormatError(f"`{key}` of `{file}` is damaged", hint=f"`sdops meta {file}` shows it", key=key)
    return found


def _method(made: Mapping[str, Any], file: str) -> tuple[str, list[str]]:
    """Our method for a mode and a way to calculate."""
    said = str(made.get("interp_method") or made.get("mode") or "").lower()
    mode = next((ours for theirs, ours in _METHODS.items() if said.startswith(theirs)), "")
    calculation = str(made.get("calcmode") or "normal").lower()
    if not mode or calculation not in _CALCULATIONS:
        raise FormatError(
            f"`{file}` was made by `{said or '?'}`, `{calculation}`, for which there is no method here",
            hint="`sdops methods` lists ours; `sdops meta` shows what the file says",
        )
    return _CALCULATIONS[calculation] or mode, []


def _knobs(made: Mapping[str, Any], method: str) -> dict[str, Any]:
    """Weights, of blocks where the merge had them."""
    if method == "average":
        return {}
    found: dict[str, Any] = {"alpha": _weight(made, "alpha", made.get("multiplier", made.get("base_alpha", 0.5)))}
    if method in ("sum-twice", "triple-sum"):
        found["beta"] = _weight(made, "beta", made.get("base_beta", 0.25))
    return found


def _weight(made: Mapping[str, Any], which: str, base: Any) -> Any:
    """One number, or 26 block weights (BASE first) as a list."""
    numbers = made.get(f"weights_{which}")
    if made.get("mbw") in (True, "True") and numbers:
        text = numbers if isinstance(numbers, str) else ",".join(map(str, numbers))
        return [float(base), *(float(word) for word in text.split(",")[-25:])]
    return float(base)


def _input(digest: str, models: Mapping[str, Any]) -> dict[str, str]:
    known = models.get(digest)
    known = known if isinstance(known, dict) else {}
    about = str(known.get("name") or f"the model with hash {digest[:10]}")
    return {"about": about} | ({"sha256": digest} if len(digest) == 64 else {})
