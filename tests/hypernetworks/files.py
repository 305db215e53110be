"""Hypernetworks as the programs write them that made them up, built of torch's own modules, and what they compute."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

_ACTIVATIONS = {"relu": nn.ReLU, "swish": nn.Hardswish, "mish": nn.Mish, "leakyrelu": nn.LeakyReLU, "tanh": nn.Tanh}


def sequential(
    dim: int,
    structure: list[float],
    activation: str | None = None,
    *,
    norm: bool = False,
    activate_output: bool = False,
    dropout: list[float] | None = None,
    spread: float = 0.05,
) -> nn.Sequential:
    """The modules of the web UI, in their order."""
    modules: list[nn.Module] = []
    for i in range(len(structure) - 1):
        linear = nn.Linear(int(dim * structure[i]), int(dim * structure[i + 1]))
        nn.init.normal_(linear.weight, std=spread)
        nn.init.normal_(linear.bias, std=spread)
        modules.append(linear)
        if activation not in (None, "linear") and (i < len(structure) - 2 or activate_output):
            modules.append(_ACTIVATIONS[activation]())
        if norm:
            layer = nn.LayerNorm(int(dim * structure[i + 1]))
            nn.init.normal_(layer.weight, 1, 0.1)
            modules.append(layer)
        if dropout and dropout[i + 1]:
            modules.append(nn.Dropout(dropout[i + 1]))
    return nn.Sequential(*modules).eval()


class Module(nn.Module):
    """x + m g(x)."""

    def __init__(self, chain: nn.Sequential) -> None:
        super().__init__()
        self.linear = chain

    def forward(self, x: torch.Tensor, strength: float = 1.0) -> torch.Tensor:
        return x + strength * self.linear(x)


Modules = dict[int, tuple[Module, Module]]


def modules(widths: tuple[int, ...] = (32, 64), seed: int = 0, **options: Any) -> Modules:
    torch.manual_seed(seed)
    structure = options.pop("structure", [1, 2, 1])
    return {
        w: (Module(sequential(w, structure, **options)), Module(sequential(w, structure, **options))) for w in widths
    }


def saved(made: Modules, **settings: Any) -> dict[Any, Any]:
    found: dict[Any, Any] = {width: (k.state_dict(), v.state_dict()) for width, (k, v) in made.items()}
    return found | settings


def settings(**more: Any) -> dict[str, Any]:
    return {
        "step": 5000,
        "name": "style",
        "layer_structure": [1, 2, 1],
        "activation_func": "linear",
        "is_layer_norm": False,
        "weight_initialization": "Normal",
        "sd_checkpoint": "81761151",
        "sd_checkpoint_name": "v1-5-pruned",
        "activate_output": False,
        "use_dropout": False,
        "last_layer_dropout": False,
        "dropout_structure": [0, 0, 0],
        "optional_info": "",
    } | more


def write(path: Path, made: Modules, **more: Any) -> Path:
    torch.save(saved(made, **settings(**more)), path)
    return path


def linear(folder: Path) -> tuple[Path, Modules]:
    made = modules()
    return write(folder / "linear.pt", made), made


def relu(folder: Path) -> tuple[Path, Modules]:
    made = modules(activation="relu")
    return write(folder / "relu.pt", made, activation_func="relu"), made


def activated(folder: Path) -> tuple[Path, Modules]:
    made = modules(activation="mish", activate_output=True)
    return write(folder / "mish.pt", made, activation_func="mish", activate_output=True), made


def everything(folder: Path) -> tuple[Path, Modules]:
    """Four layers, activations, norms and dropout, structured with fractions."""
    structure, dropout = [1, 1.5, 2, 1.5, 1], [0, 0.3, 0.3, 0.1, 0]
    made = modules(structure=structure, activation="swish", norm=True, dropout=dropout)
    more = {"layer_structure": structure, "activation_func": "swish", "is_layer_norm": True, "use_dropout": True}
    return write(folder / "deep.pt", made, **more, dropout_structure=dropout), made


def old_dropout(folder: Path) -> tuple[Path, Modules]:
    """Before there was a `dropout_structure`: 0.3 behind all layers but the last two, or but the last."""
    structure = [1, 2, 2, 1]
    made = modules(structure=structure, activation="relu", dropout=[0, 0.3, 0.3, 0])
    more = settings(layer_structure=structure, activation_func="relu", use_dropout=True, last_layer_dropout=True)
    del more["dropout_structure"], more["optional_info"]
    torch.save(saved(made, **more), folder / "old.pt")
    return folder / "old.pt", made


def novelai(folder: Path) -> tuple[Path, Modules]:
    """Half precision, other names, no settings."""
    made = {w: (k.half().float(), v.half().float()) for w, (k, v) in modules().items()}
    names = {"linear.0": "linear1", "linear.1": "linear2"}

    def renamed(module: Module) -> dict[str, torch.Tensor]:
        return {names[key[:8]] + key[8:]: value.half() for key, value in module.state_dict().items()}

    torch.save({width: [renamed(k), renamed(v)] for width, (k, v) in made.items()}, folder / "anime.pt")
    return folder / "anime.pt", made


def legacy(folder: Path) -> tuple[Path, Modules]:
    """Before there were zip files."""
    made = modules((32,))
    torch.save(saved(made, **settings()), folder / "legacy.pt", _use_new_zipfile_serialization=False)
    return folder / "legacy.pt", made


Writer = Callable[[Path], tuple[Path, Modules]]
WRITERS: dict[Writer, str] = {
    linear: "a1111",
    relu: "a1111",
    activated: "a1111",
    everything: "a1111",
    old_dropout: "a1111",
    legacy: "a1111",
    novelai: "novelai",
}
