"""PEFT's configuration: the alphas that its files do not hold, and the starts after which a file alone means nothing.

    scale = lora_alpha / r, or lora_alpha / sqrt(r) with use_rslora

`alpha_pattern` and `rank_pattern` map regular expressions on the end of a module's name to other numbers; the first
that fits counts. diffusers writes the same into the header, `lora_adapter_metadata`, each name after its component.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

from sdops.dialects._read import Settings
from sdops.errors import FormatError

HEADER = "lora_adapter_metadata"
# What these do to the base weight is not in the file.
_CHANGES_BASE = ("pissa", "olora", "loftq", "corda", "lora_ga")


def settings_of(config: Mapping[str, Any], module: str) -> Settings:
    """What the configuration says of one module, as the adapters shelf calls it.

    Raises:
        FormatError: the adapter is only valid on a base that its training changed, or a number is none.
    """
    check_start(config)
    found: dict[str, float | int | bool | str] = {}
    if config.get("peft_type") == "IA3":
        return {"on_input": _fits_any(config.get("feedforward_modules"), module)}
    alpha = config.get("lora_alpha", config.get("alpha"))
    alpha = _by_pattern(config.get("alpha_pattern"), module, alpha)
    if alpha is not None:
        found["lora_alpha"] = _number(alpha, "lora_alpha")
    if config.get("use_rslora"):
        found["use_rslora"] = True
    if config.get("peft_type") == "LOKR" and "r" in config:
        found["rank"] = int(_number(_by_pattern(config.get("rank_pattern"), module, config["r"]), "r"))
    if config.get("use_cayley_neumann"):
        found["neumann_terms"] = int(_number(config.get("num_cayley_neumann_terms", 5), "num_cayley_neumann_terms"))
    return found


def check_start(config: Mapping[str, Any]) -> None:
    """Raises FormatError for adapters that began as a part of the base's weights and had it taken out of the base."""
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_CHANGES_BASE):
        raise FormatError(
            f"this adapter was started with `{start}`, which changes the base model; on the published base it is wrong",
            hint="convert it with PEFT: `save_pretrained(..., path_initial_model_for_weight_conversion=...)`",
            init=start,
        )


def from_header(metadata: Mapping[str, str]) -> Callable[[str], Settings]:
    """Stem -> settings, from the header that diffusers writes; nothing where it has none.

    Raises:
        FormatError: the header's entry is no JSON object.
    """
    if HEADER not in metadata:
        return lambda _stem: {}
    try:
        flat = json.loads(metadata[HEADER])
    except ValueError:
        flat = None
    if not isinstance(flat, dict):
        raise FormatError(f"`{HEADER}` in the header is no JSON object", hint="get the file again")
    configs: dict[str, dict[str, Any]] = {}
    for name, value in flat.items():
        component, _, entry = name.partition(".")
        configs.setdefault(component, {})[entry] = value

    def settings(stem: str) -> Settings:
        component, _, module = stem.partition(".")
        return settings_of(configs[component], module) if component in configs else {}

    return settings


def multipliers(on_input: Mapping[str, bool]) -> str:
    """`adapter_config.json` of (IA)^3 for modules of which the inputs, or else the outputs are multiplied."""
    config = {
        "base_model_name_or_path": None,
        "fan_in_fan_out": False,
        "feedforward_modules": sorted(module for module, is_input in on_input.items() if is_input),
        "inference_mode": True,
        "init_ia3_weights": True,
        "peft_type": "IA3",
        "target_modules": sorted(on_input),
        "task_type": None,
    }
    return json.dumps(config, indent=2)


def configuration(ranks: Mapping[str, int], alphas: Mapping[str, float], *, use_dora: bool, lora_bias: bool) -> str:
    """`adapter_config.json` for modules of these ranks and alphas."""
    rank = Counter(ranks.values()).most_common(1)[0][0]
    alpha = Counter(alphas.values()).most_common(1)[0][0]
    config = {
        "alpha_pattern": {module: _plain(a) for module, a in alphas.items() if a != alpha},
        "base_model_name_or_path": None,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": _plain(alpha),
        "lora_bias": lora_bias,
        "lora_dropout": 0.0,
        "peft_type": "LORA",
        "r": rank,
        "rank_pattern": {module: r for module, r in ranks.items() if r != rank},
        "target_modules": sorted(ranks),
        "task_type": None,
        "use_dora": use_dora,
        "use_rslora": False,
    }
    return json.dumps(config, indent=2)


def _by_pattern(patterns: Any, module: str, default: Any) -> Any:
    if not isinstance(patterns, dict):
        return default
    for pattern, value in patterns.items():
        if _fits(str(pattern), module):
            return value
    return default


def _fits_any(patterns: Any, module: str) -> bool:
    """Whether a module is among those that a list of name ends, or one expression for whole names, tells."""
    if isinstance(patterns, str):
        return _matches(patterns, module)
    return isinstance(patterns, list) and any(module.endswith(str(end)) for end in patterns)


def _matches(pattern: str, module: str) -> bool:
    try:
        return re.fullmatch(pattern, module) is not None
    except re.error:
        return False


def _fits(pattern: str, module: str) -> bool:
    """Whether a pattern fits the end of a module's name; a plain name is compared, never run as an expression."""
    if re.fullmatch(r"[\w.]+", pattern):
        return module == pattern or module.endswith(f".{pattern}")
    try:
        return re.match(rf"(.*\.)?({pattern})$", module) is not None
    except re.error:
        return False


def _number(value: Any, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise FormatError(f"`{name}` in the adapter's configuration is `{value}`, not a number", hint="correct it")
    return value


def _plain(value: float) -> float | int:
    return int(value) if value == int(value) else value
