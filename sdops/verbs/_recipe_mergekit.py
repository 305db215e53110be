"""Recipes out of mergekit's YAML: merge_method, models, base_model, parameters, dtype.

Read with PyYAML's safe loader, which builds plain values only, and of these without aliases: a few lines of aliases can
stand for gigabytes. What speaks of layers, tokenizers and language models has no meaning for a checkpoint and is told.
Source: https://github.com/arcee-ai/mergekit, README and docs/merge_methods.md.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from importlib import import_module
from pathlib import Path, PureWindowsPath
from typing import Any

from sdops import standin
from sdops.card import find, method_name, names
from sdops.errors import FormatError, UsageError
from sdops.text import suggest
from sdops.verbs._recipe_text import MOST_BYTES, RESERVED, Recipe, from_document

# mergekit's method -> ours, and mergekit's parameter -> ours.
_METHODS = {
    "linear": "linear",
    "slerp": "slerp",
    "nuslerp": "nuslerp",
    "multislerp": "multislerp",
    "karcher": "karcher",
    "task_arithmetic": "task_arithmetic",
    "ties": "ties",
    "dare_ties": "dare_ties",
    "dare_linear": "dare_linear",
    "della": "della",
    "della_linear": "della_linear",
    "breadcrumbs": "breadcrumbs",
    "breadcrumbs_ties": "breadcrumbs_ties",
    "model_stock": "model_stock",
    "sce": "sce",
    "nearswap": "nearswap",
    "arcee_fusion": "arcee_fusion",
    "ram": "ram",
    "ramplus_tl": "ram_plus_tl",
}
_KNOBS = {"weight": "weights", "lambda": "scale"}
_OWN = {("slerp", "t"): "alpha", ("sce", "select_topk"): "density"}  # of one method alone
# What mergekit takes for a parameter that a YAML leaves out, of methods that have it; ours may take something else.
_DEFAULTS: Mapping[str, Any] = {"normalize": False, "density": 1.0, "gamma": 0.01, "epsilon": 0.15}
_NORMALISED = ("linear", "ties", "della")
_RESCALED = ("dare_ties", "dare_linear", "della", "della_linear")
_VARIANTS = {  # method, parameter that is true -> ours
    ("nuslerp", "nuslerp_row_wise"): "nuslerp_rows",
    ("model_stock", "filter_wise"): "model_stock_rows",
}
_WITH_BASE = {"nuslerp": "nuslerp_task", "multislerp": "multislerp_task"}
_IGNORED = ("tokenizer_source", "tokenizer", "chat_template", "name")
_DTYPES = {"float16": "fp16", "bfloat16": "bf16", "float32": "fp32"}


def from_mergekit(path: Path) -> tuple[Recipe, list[str]]:
    """A recipe from a YAML file, and what could not be taken over.

    Raises:
        FormatError: it is no YAML, or not mergekit's.
        UsageError: it names a method that sdops does not have.
    """
    document = _load(path)
    warnings = [f"`{key}` of `{path.name}` is left out" for key in _IGNORED if key in document]
    models, whole = _sources(document, path, warnings)
    method = _method(str(document.get("merge_method", "")), path)
    base = document.get("base_model")
    method = _WITH_BASE.get(method, method) if base is not None else method
    method = next((ours for (one, key), ours in _VARIANTS.items() if one == method and whole.get(key) is True), method)
    inputs: dict[str, dict[str, str]] = {}
    order = [_input(inputs, one.get("model")) for one in models]
    step: dict[str, Any] = {"verb": "merge", "method": method.replace("_", "-")}
    card = find(method)
    if base is not None:
        if card.base:
            name = step["base"] = _input(inputs, base)
            models = [one for one, known in zip(models, order, strict=True) if known != name]
            order = [known for known in order if known != name]
        elif method in ("slerp", "nearswap"):
            name = _input(inputs, base)
            order = [name, *(known for known in order if known != name)]
        elif str(base) not in [one["about"] for one in inputs.values()]:
            warnings.append(f"`base_model` is left out: `{method.replace('_', '-')}` has none")
    step["models"] = order
    step |= dict(_knobs(method, whole, models, card.knobs, warnings))
    if dtype := document.get("out_dtype") or document.get("dtype"):
        step["dtype"] = _DTYPES.get(str(dtype), "keep")
    made = {"name": path.stem, "about": f"From mergekit's {path.name}", "inputs": inputs, "steps": [step]}
    warnings.append(
        "inputs are named as in the YAML; give each with its option: they are checkpoints, not folders of LLMs"
    )
    return from_document(made, name=path.stem, folder=path.parent, title=str(path)), warnings


def _sources(
    document: Mapping[str, Any], path: Path, warnings: list[str]
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The models with their parameters, and the parameters of all. One slice with all layers says the same as models.

    Raises:
        FormatError: there are none, or layers are stacked.
    """
    whole = dict(document.get("parameters") or {})
    models, slices = document.get("models"), document.get("slices")
    if isinstance(slices, list) and len(slices) == 1 and isinstance(slices[0], dict):
        models = slices[0].get("sources")
        whole |= slices[0].get("parameters") or {}
        warnings.append("`layer_range` is left out: whole checkpoints are merged")
    elif slices or "modules" in document:
        raise FormatError(
            f"`{path}` stacks slices of layers, which is for language models", hint="recipes merge whole checkpoints"
        )
    if not isinstance(models, list) or not models or not all(isinstance(one, dict) for one in models):
        raise FormatError(f"`{path}` is no recipe of mergekit: it has no `models`", hint="`sdops recipe cp` shows ours")
    return models, whole


def _load(path: Path) -> Mapping[str, Any]:
    yaml = import_module("yaml")
    try:
        if path.stat().st_size > MOST_BYTES:
            raise yaml.YAMLError("it is too large")
        data = standin.content(path)
        if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(data, yaml.SafeLoader)):
            raise yaml.YAMLError("aliases are not read")
        document = yaml.safe_load(data)
    except OSError as error:
        raise FormatError(f"`{path}` cannot be read: {(error.strerror or '').lower()}", path=path) from None
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise FormatError(f"`{path}` is no YAML that is read here: {' '.join(str(error).split())}", path=path) from None
    if not isinstance(document, dict):
        raise FormatError(f"`{path}` is no recipe of mergekit", hint="`sdops recipe cp` shows ours", path=path)
    return document


def _method(name: str, path: Path) -> str:
    if name in _METHODS and _METHODS[name] in names():
        return _METHODS[name]
    close = suggest(method_name(name), _METHODS)
    hint = f"did you mean `{close}`?" if close else f"known are {', '.join(_METHODS)}"
    raise UsageError(f"`{path}`: there is no `{name}` for checkpoints", hint=hint, method=name)


def _input(inputs: dict[str, dict[str, str]], model: object) -> str:
    """The name of a model's input. mergekit names folders and repositories, which here have to be given."""
    text = str(model.get("model") if isinstance(model, dict) else model)
    for name, one in inputs.items():
        if one["about"] == text:
            return name
    last = text.replace("\\", "/").rstrip("/").rpartition("/")[2].lower()
    stem = re.sub(r"[^a-z0-9]+", "_", last).strip("_")[:50]
    stem = stem if stem[:1].isalpha() else f"model_{stem}".rstrip("_")
    taken = {*inputs, *RESERVED}
    name = next(name for name in (stem, *(f"{stem}_{n}" for n in range(2, 999))) if name not in taken)
    is_file = text.endswith((".safetensors", ".ckpt")) and not PureWindowsPath(text).anchor and ".." not in text
    inputs[name] = {"about": text} | ({"file": text} if is_file else {})
    return name


def _knobs(
    method: str, whole: Mapping[str, Any], models: list[dict[str, Any]], knobs: Any, warnings: list[str]
) -> Iterator[tuple[str, Any]]:
    """Parameters of the whole and of the models, as far as the method has them; mergekit's defaults for the others."""
    known = {knob.name: knob for knob in knobs}
    each = [dict(one.get("parameters") or {}) for one in models]
    if "weights" in known and any("weight" in one for one in (*each, whole)):
        usual = whole.get("weight", 1.0)
        yield "weights", [float(_plain("weight", one.get("weight", usual), warnings)) for one in each]
    said = {key: [value] for key, value in whole.items() if key != "weight"}
    for theirs in sorted({key for one in each for key in one} - {"weight"}):
        said[theirs] = [one[theirs] for one in each if theirs in one]
    found: dict[str, Any] = {}
    for theirs, values in said.items():
        name = _OWN.get((method, theirs)) or _KNOBS.get(theirs, theirs)
        if name in known and known[name].type != "floats":
            if len({repr(value) for value in values}) > 1:
                warnings.append(f"`{theirs}` differs between the models; here it is one for all: the first is taken")
            found[name] = _plain(theirs, values[0], warnings)
        elif not _says_nothing(method, theirs, values):
            warnings.append(f"`{theirs}` is left out: the method has no such knob here")
    yield from found.items()
    for name, value in _DEFAULTS.items():
        if name in known and name not in found and method not in ("sce", "ram", "ram_plus_tl"):
            yield name, method in _NORMALISED if name == "normalize" else value


def _says_nothing(method: str, theirs: str, values: list[Any]) -> bool:
    """Whether a parameter has no effect on the numbers, or asks for what is done in any case."""
    if theirs == "rescale":
        return all(bool(value) == (method in _RESCALED) for value in values)
    return (
        theirs == "int8_mask"
        or theirs in [key for _, key in _VARIANTS]
        or (theirs, values)
        == (
            "nuslerp_flatten",
            [True],
        )
    )


def _plain(name: str, value: Any, warnings: list[str]) -> Any:
    """A number; YAML 1.1 takes `1e-4` for a text. Gradients over layers become their mean."""
    if isinstance(value, bool):
        return value
    if isinstance(value, list) and value and all(isinstance(item, int | float) for item in value):
        warnings.append(f"`{name}` is a gradient over layers; its mean is taken, block weights say it better")
        return sum(value) / len(value)
    if isinstance(value, list):
        numbers = [item.get("value") for item in value if isinstance(item, dict)]
        warnings.append(
            f"`{name}` has filters, which are left out; its last value is taken, rules of a dial say it better"
        )
        return _plain(name, numbers[-1] if numbers else 1.0, warnings)
    try:
        return float(value)
    except (TypeError, ValueError):
        raise UsageError(f"`{name}` is `{value}`", hint="numbers are read", knob=name) from None
