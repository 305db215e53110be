"""Adapter families against the programs that write them: LyCORIS and PEFT.

    python -m venv ENV
    ENV/bin/pip install torch==2.13.0 lycoris_lora==4.1.3 peft==0.21.2
    PYTHONPATH=. ENV/bin/python tools/oracles/lora_families.py

Each case makes the program's own module on a random layer, fills it with random numbers, takes the tensors that it
would save, computes the change from those with sdops, and compares it in float32 with what the program does:

    merged    its merge function, minus the layer's weight
    forward   the layer's output with the adapter minus that without, against the change applied to the input

The error is relative, ||sdops - program|| / ||program||. LyCORIS' merge of LoHa and LoKr multiplies by alpha / r twice,
so that it is a reference for alpha = r only; the forward pass is right for any alpha, and is compared for another one.
DyLoRA is compared at every number of ranks (LyCORIS divides alpha by blocks, so a block is a rank here); a file of
T-LoRA has to be refused, because LyCORIS subtracts singular vectors of the base that the file does not hold.
Exit code 1 if any error is above 1e-5.
"""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from lycoris.modules.boft import ButterflyOFTModule
from lycoris.modules.diag_oft import DiagOFTModule
from lycoris.modules.dylora import DyLoraModule
from lycoris.modules.full import FullModule
from lycoris.modules.glora import GLoRAModule
from lycoris.modules.ia3 import IA3Module
from lycoris.modules.locon import LoConModule
from lycoris.modules.loha import LohaModule
from lycoris.modules.lokr import LokrModule
from lycoris.modules.norms import NormModule
from lycoris.modules.tlora import TLoraModule
from torch import Tensor, nn

from sdops.adapters import family
from sdops.errors import FormatError

LIMIT = 1e-5

# Name in a file -> part, for both programs; `alpha` of OFT and BOFT is their constraint.
PARTS = {
    "lora_up.weight": "up",
    "lora_down.weight": "down",
    "lora_mid.weight": "mid",
    "lora_B.weight": "up",
    "lora_A.weight": "down",
    "lora_B.bias": "up_bias",
    "lora_magnitude_vector": "magnitude",
    "lora_embedding_A": "a",
    "lora_embedding_B": "b",
    "ia3_l": "multiplier",
    "p_layer.weight": "p_layer",
    "q_layer.weight": "q_layer",
    "lambda_layer": "lambda_layer",
    "alpha": "lora_alpha",
    "dora_scale": "dora_scale",
    "oft_blocks": "blocks",
    "oft_R.weight": "vectors",
    "rescale": "rescale",
    "w_norm": "diff",
    "b_norm": "diff_b",
    "weight": "weight",
    "on_input": "on_input",
    "diff": "diff",
    "diff_b": "diff_b",
    **{f"hada_{part}": part for part in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")},
    **{f"lokr_{part}": part for part in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")},
    **{f"{part}.weight": part for part in ("a1", "a2", "b1", "b2", "bm")},
}


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    program: str
    case: str
    way: str
    error: float


def linear() -> nn.Linear:
    """48 inputs, 36 outputs."""
    return nn.Linear(48, 36)


def square() -> nn.Linear:
    """64 inputs and outputs."""
    return nn.Linear(64, 64)


def conv() -> nn.Conv2d:
    """24 input, 32 output channels, 3 x 3."""
    return nn.Conv2d(24, 32, 3, padding=1)


def point() -> nn.Conv2d:
    """24 input, 32 output channels, 1 x 1."""
    return nn.Conv2d(24, 32, 1)


# Name, family, LyCORIS' class, layer, its options, and whether its merge can be trusted for this alpha.
LYCORIS: list[tuple[str, str, Any, Callable[[], nn.Module], dict[str, Any], bool]] = [
    ("LoRA linear", "lora", LoConModule, linear, {"alpha": 2}, True),
    ("LoRA linear, rsLoRA", "lora", LoConModule, linear, {"alpha": 2, "rs_lora": True}, True),
    ("LoCon conv", "lora", LoConModule, conv, {"alpha": 2}, True),
    ("LoCon 1x1", "lora", LoConModule, point, {"alpha": 2}, True),
    ("LoCon Tucker", "lora", LoConModule, conv, {"alpha": 2, "use_tucker": True}, True),
    *[
        (f"DoRA {label}, {axis}", "lora", LoConModule, layer, {"weight_decompose": True, "wd_on_out": out}, True)
        for label, layer in (("linear", linear), ("square", square), ("conv", conv))
        for axis, out in (("output", True), ("input", False))
    ],
    ("LoHa linear, alpha = r", "loha", LohaModule, linear, {"alpha": 4}, True),
    ("LoHa linear", "loha", LohaModule, linear, {"alpha": 2}, False),
    ("LoHa conv", "loha", LohaModule, conv, {"alpha": 2}, False),
    ("LoHa Tucker", "loha", LohaModule, conv, {"alpha": 2, "use_tucker": True}, False),
    ("LoHa DoRA input", "loha", LohaModule, conv, {"alpha": 2, "weight_decompose": True, "wd_on_out": False}, False),
    ("LoKr full", "lokr", LokrModule, linear, {"alpha": 2, "full_matrix": True}, True),
    ("LoKr w2 factored, alpha = r", "lokr", LokrModule, square, {"alpha": 2, "lora_dim": 2}, True),
    ("LoKr w2 factored", "lokr", LokrModule, square, {"alpha": 1, "lora_dim": 2}, False),
    ("LoKr both factored", "lokr", LokrModule, square, {"alpha": 1, "lora_dim": 2, "decompose_both": True}, False),
    ("LoKr conv full", "lokr", LokrModule, conv, {"alpha": 2, "full_matrix": True}, True),
    ("LoKr conv factored", "lokr", LokrModule, conv, {"alpha": 1, "lora_dim": 2, "factor": 4}, False),
    ("LoKr Tucker", "lokr", LokrModule, conv, {"alpha": 1, "lora_dim": 2, "factor": 4, "use_tucker": True}, False),
    ("LoKr DoRA output", "lokr", LokrModule, square, {"alpha": 2, "lora_dim": 2, "weight_decompose": True}, True),
    ("GLoRA linear", "glora", GLoRAModule, linear, {"alpha": 2}, True),
    ("GLoRA conv", "glora", GLoRAModule, conv, {"alpha": 2}, True),
    ("(IA)^3 linear, output", "ia3", IA3Module, linear, {}, True),
    ("(IA)^3 linear, input", "ia3", IA3Module, linear, {"train_on_input": True}, True),
    ("(IA)^3 conv, output", "ia3", IA3Module, conv, {}, True),
    ("(IA)^3 conv, input", "ia3", IA3Module, conv, {"train_on_input": True}, True),
    ("Diag-OFT linear", "oft", DiagOFTModule, linear, {"lora_dim": 6}, True),
    ("Diag-OFT constraint, rescale", "oft", DiagOFTModule, conv, {"constraint": 0.02, "rescaled": True}, True),
    ("BOFT linear", "boft", ButterflyOFTModule, square, {"lora_dim": 8}, True),
    ("BOFT constraint, rescale", "boft", ButterflyOFTModule, conv, {"constraint": 0.02, "rescaled": True}, True),
    ("full linear", "full", FullModule, linear, {}, True),
    ("norm", "full", NormModule, lambda: nn.LayerNorm(32), {}, True),
]  # fmt: skip


def lycoris_rows() -> Iterator[Row]:
    """Every case of LYCORIS: the merge where it is to be trusted, and the forward pass."""
    for case, name, kind, make, options, trusts_merge in LYCORIS:
        layer = filled(make())
        module = kind("oracle", layer, **{"lora_dim": 4, **options})
        filled(module)
        module.eval().requires_grad_(False)
        saved = {key: value.detach().clone() for key, value in saved_by(module).items()}
        weight = layer.weight.detach().clone()
        change = ours(name, saved, weight)
        if trusts_merge:
            merged = module.get_merged_weight(multiplier=1, shape=weight.shape)[0]
            yield Row("LyCORIS", case, "merged", relative(change, merged - weight))
        if not isinstance(layer, nn.LayerNorm):
            bias = family(name).bias_delta(parts_of(name, saved), tuple(weight.shape))
            yield Row("LyCORIS", case, "forward", forward_error(layer, module, change, bias))


def dylora_rows() -> Iterator[Row]:
    """The first ranks of DyLoRA, at every number of them."""
    for label, make in (("linear", linear), ("conv", conv)):
        layer = filled(make())
        module = filled(DyLoraModule("oracle", layer, lora_dim=4, alpha=3, block_size=1))
        saved = {key: value.detach().clone() for key, value in saved_by(module).items()}
        weight = layer.weight.detach().clone()
        for rank in range(1, 5):
            merged = module.get_merged_weight(rank=rank - 1)[0]  # LyCORIS counts the block that is trained besides
            change = ours("lora", saved, weight, rank=rank)
            yield Row("LyCORIS", f"DyLoRA {label}, {rank} of 4", "merged", relative(change, merged - weight))


def tlora_rows() -> Iterator[Row]:
    """T-LoRA is refused by name."""
    layer = filled(linear())
    saved = saved_by(TLoraModule("oracle", layer, lora_dim=4))
    try:
        ours("tlora", saved, layer.weight)
    except FormatError as error:
        yield Row("LyCORIS", "T-LoRA", "refused", 0.0 if "T-LoRA" in error.message else float("inf"))
    else:
        yield Row("LyCORIS", "T-LoRA", "refused", float("inf"))


def saved_by(module: nn.Module) -> dict[str, Tensor]:
    """What LyCORIS would write for a module."""
    if isinstance(module, FullModule):  # until it is trained, it keeps the difference instead of the weight
        return {"diff": module.weight, "diff_b": module.bias}
    custom = module.custom_state_dict() if hasattr(module, "custom_state_dict") else None
    return custom if custom is not None else module.state_dict()


def forward_error(layer: nn.Module, module: nn.Module, change: Tensor, bias: Tensor | None) -> float:
    """The module's effect on random inputs against that of the change."""
    module.org_forward = layer.forward
    inputs = torch.randn(16, layer.weight.shape[1], *([8, 8] if change.ndim == 4 else []))
    found = module.forward(inputs) - layer(inputs)
    if change.ndim == 4:
        return relative(nn.functional.conv2d(inputs, change, bias, padding=layer.padding), found)
    wanted = nn.functional.linear(inputs, change, bias)
    return relative(wanted, found)


class Small(nn.Module):
    """The layers that PEFT gets."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.conv, self.table = linear(), conv(), nn.Embedding(40, 24)


def peft_cases() -> Iterator[tuple[str, str, Any, dict[str, Any]]]:
    """Name, family, PEFT's configuration, and what sdops takes as settings from it."""
    from peft import IA3Config, LoHaConfig, LoKrConfig, LoraConfig, OFTConfig

    both = {"target_modules": ["linear", "conv"]}
    alpha = {"lora_alpha": 3.0}
    yield "LoRA", "lora", LoraConfig(r=4, lora_alpha=3, **both), alpha
    yield "rsLoRA", "lora", LoraConfig(r=4, lora_alpha=3, use_rslora=True, **both), {**alpha, "use_rslora": True}
    yield "LoRA with bias", "lora", LoraConfig(r=4, lora_alpha=3, lora_bias=True, **both), alpha
    yield "DoRA", "lora", LoraConfig(r=4, lora_alpha=3, use_dora=True, **both), alpha
    yield "DoRA at 0.5", "lora", LoraConfig(r=4, lora_alpha=3, use_dora=True, **both), {**alpha, "strength": 0.5}
    yield "LoRA", "lora_embedding", LoraConfig(r=4, lora_alpha=3, target_modules=["table"]), alpha
    rooted = LoraConfig(r=4, lora_alpha=3, use_rslora=True, target_modules=["table"])
    yield "rsLoRA", "lora_embedding", rooted, {**alpha, "use_rslora": True}
    yield "(IA)^3 output", "ia3", IA3Config(feedforward_modules=[], **both), {"on_input": False}
    yield "(IA)^3 input", "ia3", IA3Config(feedforward_modules=["linear", "conv"], **both), {"on_input": True}
    yield "LoHa", "loha", LoHaConfig(r=4, alpha=3, **both), alpha
    yield "LoHa Tucker", "loha", LoHaConfig(r=4, alpha=3, use_effective_conv2d=True, **both), alpha
    yield "LoKr", "lokr", LoKrConfig(r=2, alpha=3, **both), {**alpha, "rank": 2}
    yield "LoKr full", "lokr", LoKrConfig(r=40, alpha=3, **both), {**alpha, "rank": 40}
    yield "LoKr both factored", "lokr", LoKrConfig(r=1, alpha=3, decompose_both=True, **both), {**alpha, "rank": 1}
    for terms in (4, 5, 7):
        config = OFTConfig(oft_block_size=8, num_cayley_neumann_terms=terms, **both)
        yield f"OFT, {terms} terms", "oft", config, {"neumann_terms": terms, "rotates_input": True}
    config = OFTConfig(oft_block_size=8, use_cayley_neumann=False, **both)
    yield "OFT, exact", "oft", config, {"neumann_terms": 0, "rotates_input": True}
    config = OFTConfig(oft_block_size=8, block_share=True, **both)
    yield "OFT, shared", "oft", config, {"rotates_input": True}


def peft_rows() -> Iterator[Row]:
    """Every case of PEFT: `merge_and_unload` for a linear layer and a convolution."""
    from peft import get_peft_model, get_peft_model_state_dict

    for case, name, config, settings in peft_cases():
        base = filled(Small())
        before = {key: value.detach().clone() for key, value in base.state_dict().items()}
        model = get_peft_model(base, config)
        with torch.no_grad():
            for key, value in model.named_parameters():
                if value.requires_grad:
                    fill(key, value)
        for module in model.modules():
            if "strength" in settings and hasattr(module, "set_scale"):
                module.set_scale("default", settings["strength"])
        saved = {key: value.detach().clone() for key, value in get_peft_model_state_dict(model).items()}
        after = model.merge_and_unload().state_dict()
        for layer in ("linear", "conv", "table"):
            if not any(f".{layer}." in key for key in saved):
                continue
            own = {key.partition(f"{layer}.")[2]: value for key, value in saved.items() if f".{layer}." in key}
            weight = before[f"{layer}.weight"]
            change = ours(name, own, weight, **settings)
            yield Row("PEFT", f"{case} {layer}", "merged", relative(change, after[f"{layer}.weight"] - weight))
            start = before.get(f"{layer}.bias") if name == "ia3" else None
            bias = family(name).bias_delta(parts_of(name, own), tuple(weight.shape), start, **settings)
            if bias is not None:
                found = after[f"{layer}.bias"] - before[f"{layer}.bias"]
                yield Row("PEFT", f"{case} {layer}", "bias", relative(bias, found))


def ours(name: str, saved: dict[str, Tensor], weight: Tensor, **settings: Any) -> Tensor:
    """The change that sdops computes from the tensors of a file."""
    parts = parts_of(name, saved)
    family(name).check({part: tuple(value.shape) for part, value in parts.items()}, tuple(weight.shape))
    return family(name).delta(parts, tuple(weight.shape), weight, **settings)


def parts_of(name: str, saved: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a file under the names that the shelf has for them."""
    constrained = {"alpha": "constraint"} if name in ("oft", "boft") else {}
    return {(PARTS | constrained)[key]: value for key, value in saved.items() if key != "scalar"}


def filled(module: nn.Module) -> nn.Module:
    """All parameters drawn anew, so that a change is about as large as the weight it changes."""
    with torch.no_grad():
        for key, parameter in module.named_parameters():
            fill(key, parameter)
    return module


def fill(key: str, parameter: Tensor) -> None:
    """Random numbers; magnitudes of DoRA, which start as the norms of the weight, and scales are multiplied by some."""
    if any(word in key for word in ("magnitude", "dora_scale", "rescale")):
        parameter.mul_(0.5 + torch.rand_like(parameter))
    else:
        parameter.copy_(0.5 * torch.randn_like(parameter))


def relative(found: Tensor, wanted: Tensor) -> float:
    """||found - wanted|| / ||wanted||."""
    return float((found - wanted).double().norm() / wanted.double().norm())


def main() -> int:
    """Print a line per case; 1 if one disagrees."""
    warnings.filterwarnings("ignore")
    logging.disable(logging.INFO)
    torch.manual_seed(0)
    with torch.no_grad():
        rows = [*lycoris_rows(), *dylora_rows(), *tlora_rows(), *peft_rows()]
    for row in rows:
        verdict = "" if row.error <= LIMIT else "  DISAGREES"
        print(f"{row.program:8} {row.case:32} {row.way:8} {row.error:9.1e}{verdict}")
    wrong = [row for row in rows if not row.error <= LIMIT]
    print(f"{len(rows)} comparisons, worst {max(row.error for row in rows):.1e}, {len(wrong)} above {LIMIT:.0e}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
