"""Recipes out of mergekit's YAML: merge_method, models, base_model, parameters, dtype.

Read with PyYAML's safe loader, which builds plain values only, and of these without aliases: a few lines of aliases can
stand for gigabytes. What speaks of layers, tokenizers and language models has no meaning for a checkpoint and is told.
Source: https://github.com/arcee-ai/mergekit, README and docs/merge_methods.md.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from sdops import standin
from sdops.card import find, method_name, names
from sdops.errors import FormatError, UsageError
from sdops.text import suggest
from sdops.verbs._recipe_text import MOST_BYTES, Recipe, from_document

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
_KNOBS = {"weight": "weights", "lambda": "scale", "t": "alpha", "select_topk": "select_topk"}
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
    if "slices" in document:
        raise FormatError(
            f"`{path}` stacks slices of layers, which is for language models", hint="recipes merge whole checkpoints"
        )
    models = document.get("models")
    if not isinstance(models, list) or not models or not all(isinstance(one, dict) for one in models):
        raise FormatError(f"`{path}` is no recipe of mergekit: it has no `models`", hint="`sdops recipe cp` shows ours")
    method = _method(str(document.get("merge_method", "")), path)
    inputs: dict[str, dict[str, str]] = {}
    order = [_input(inputs, one.get("model")) for one in models]
    step: dict[str, Any] = {"verb": "merge", "method": method.replace("_", "-")}
    card, base = find(method), document.get("base_model")
    if base is not None:
        name = _input(inputs, base)
        if card.base:
            step["base"] = name
            models = [one for one, known in zip(models, order, strict=True) if known != name]
            order = [known for known in order if known != name]
        else:  # slerp and nearswap: the base is the first model
            order = [name, *(known for known in order if known != name)]
    step["models"] = order
    step |= dict(_knobs(document, models, card.knobs, warnings))
    if dtype := document.get("out_dtype") or document.get("dtype"):
        step["dtype"] = _DTYPES.get(str(dtype), "keep")
    made = {"name": path.stem, "about": f"From mergekit's {path.name}", "inputs": inputs, "steps": [step]}
    warnings.append(
        "inputs are named as in the YAML; give each with its option: they are checkpoints, not folders of LLMs"
    )
    return from_document(made, name=path.stem, folder=path.parent, title=str(path)), warnings


def _load(path: Path) -> Mapping[str, Any]:
    yaml = import_module("yaml")
    try:
        if path.stat().st_size > MOST_BYTES:
            raise yaml.YAMLError("it is too large")
        data = standin.real(path).read_bytes()
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
    stem = "".join(sign if sign.isalnum() else "_" for sign in text.rpartition("/")[2].lower()).strip("_")
    stem = stem if stem[:1].isalpha() else f"model_{stem}"
    for name, one in inputs.items():
        if one["about"] == text:
            return name
    name = next(name for name in (stem[:50], *(f"{stem[:50]}_{n}" for n in range(2, 999))) if name not in inputs)
    inputs[name] = {"about": text} | ({"file": text} if text.endswith((".safetensors", ".ckpt")) else {})
    return name


def _knobs(
    document: Mapping[str, Any], models: list[dict[str, Any]], knobs: Any, warnings: list[str]
) -> Iterator[tuple[str, Any]]:
    """Parameters of the whole and of the models, as far as the method has them."""
    known = {knob.name: knob for knob in knobs}
    whole = document.get("parameters") or {}
    for theirs, value in whole.items() if isinstance(whole, dict) else ():
        name = _KNOBS.get(str(theirs), str(theirs))
        if name in known and known[name].type != "floats":
            yield name, _plain(theirs, value, warnings)
        elif theirs not in ("int8_mask",):
            warnings.append(f"`{theirs}` is left out: the method has no such knob here")
    each = [one.get("parameters") or {} for one in models]
    if "weights" in known and any("weight" in one for one in each):
        yield "weights", [float(_plain("weight", one.get("weight", 1.0), warnings)) for one in each]
    for theirs in sorted({key for one in each for key in one} - {"weight"}):
        values = {repr(one[theirs]): one[theirs] for one in each if theirs in one}
        name = _KNOBS.get(str(theirs), str(theirs))
        if name in known and known[name].type != "floats":
            if len(values) > 1:
                warnings.append(f"`{theirs}` differs between the models; here it is one for all: the first is taken")
            yield name, _plain(theirs, next(iter(values.values())), warnings)
        else:
            warnings.append(f"`{theirs}` is left out: the method has no such knob here")


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
