"""`sdops merge` and `sdops apply` against PEFT and LyCORIS, through files.

    python -m venv ENV
    ENV/bin/pip install torch==2.13.0 diffusers==0.42.1 transformers peft==0.21.2 lycoris_lora==4.1.3 accelerate
    SDOPS_PYTHON=.venv/bin/python ENV/bin/python tools/oracles/lora_peft_lycoris.py

All on a small SD1.5 in float32 (fixtures/make.py):

    PEFT      `add_weighted_adapter(combination_type="cat")` of two LoRAs of different rank and alpha, one weight
              negative, against `sdops merge`; `merge_and_unload` of LoRA and DoRA against `sdops apply`
    LyCORIS   `get_merged_weight` of a module of every family against `sdops apply` of what it saves. For LoHa and LoKr
              alpha = r, because its merge multiplies by alpha / r twice.

Exit code 1 if any error is above 1e-5.
"""

from __future__ import annotations

import logging
import sys
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from _lora import Table, component, converted, relative, relative_products, sdops, small_model, tiny_unet
from lycoris.modules.boft import ButterflyOFTModule
from lycoris.modules.diag_oft import DiagOFTModule
from lycoris.modules.full import FullModule
from lycoris.modules.glora import GLoRAModule
from lycoris.modules.ia3 import IA3Module
from lycoris.modules.locon import LoConModule
from lycoris.modules.loha import LohaModule
from lycoris.modules.lokr import LokrModule
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

TARGETS = ["to_q", "to_k", "to_out.0", "proj_in", "conv1", "ff.net.2"]
LINEAR = "mid_block.attentions.0.transformer_blocks.0.ff.net.2"
SQUARE = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
POINT = "mid_block.attentions.0.proj_in"
CONV = "mid_block.resnets.0.conv1"

LYCORIS: list[tuple[str, type[nn.Module], tuple[str, ...], dict[str, Any]]] = [
    ("LoCon", LoConModule, (LINEAR, SQUARE, POINT, CONV), {"alpha": 2}),
    ("LoCon Tucker", LoConModule, (CONV,), {"alpha": 2, "use_tucker": True}),
    ("LoCon rsLoRA", LoConModule, (LINEAR, CONV), {"alpha": 2, "rs_lora": True}),
    ("DoRA, output axis", LoConModule, (LINEAR, CONV), {"alpha": 2, "weight_decompose": True, "wd_on_out": True}),
    ("DoRA, input axis", LoConModule, (LINEAR, CONV), {"alpha": 2, "weight_decompose": True, "wd_on_out": False}),
    ("LoHa", LohaModule, (LINEAR, CONV), {"alpha": 4}),
    ("LoHa Tucker", LohaModule, (CONV,), {"alpha": 4, "use_tucker": True}),
    ("LoKr full", LokrModule, (LINEAR, CONV), {"alpha": 2, "full_matrix": True}),
    ("LoKr factored", LokrModule, (LINEAR, CONV), {"alpha": 2, "lora_dim": 2}),
    ("GLoRA", GLoRAModule, (LINEAR, CONV), {"alpha": 2}),
    ("(IA)^3", IA3Module, (LINEAR, CONV), {}),
    ("(IA)^3, input", IA3Module, (LINEAR, CONV), {"train_on_input": True}),
    ("Diag-OFT", DiagOFTModule, (LINEAR, CONV), {"lora_dim": 4}),
    ("BOFT", ButterflyOFTModule, (SQUARE,), {"lora_dim": 10}),
    ("full", FullModule, (LINEAR, CONV), {}),
]


class Model:
    """The base, and what is applied to it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.base, base_folder = small_model(folder)
        self.before = component(base_folder, "unet")

    def unet(self) -> nn.Module:
        """Fresh, with the base's weights."""
        return tiny_unet(self.before).requires_grad_(False)

    def applied(self, lora: Path, name: str) -> dict[str, Tensor]:
        """The U-Net after `sdops apply`."""
        output = self.folder / f"{name}.safetensors"
        sdops("apply", self.base, "--lora", lora, "-o", output)
        return component(converted(output), "unet")

    def errors(self, ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> dict[str, float]:
        """Of the changes; of weights that only one of the two changes it is infinite."""
        found = {}
        for key, start in self.before.items():
            if torch.equal(start, theirs[key]) != torch.equal(start, ours[key]):
                found[key] = float("inf")
            elif not torch.equal(start, theirs[key]):
                found[key] = relative(ours[key] - start, theirs[key] - start)
        return found


def fill(module: nn.Module) -> None:
    """Random numbers for what is trained; scales and magnitudes are multiplied by some."""
    for key, parameter in module.named_parameters():
        if any(word in key for word in ("magnitude", "dora_scale", "rescale")):
            parameter.data.mul_(0.7 + 0.6 * torch.rand_like(parameter))
        else:
            parameter.data.copy_(0.3 * torch.randn_like(parameter))


def fill_adapter(model: nn.Module, name: str) -> None:
    """Random numbers for the parameters of one of PEFT's adapters."""
    for key, parameter in model.named_parameters():
        if f".{name}." in key or key.endswith(f".{name}"):
            if "magnitude" in key:
                parameter.data.mul_(0.7 + 0.6 * torch.rand_like(parameter))
            else:
                parameter.data.copy_(0.3 * torch.randn_like(parameter))


def peft_cat(model: Model, table: Table) -> None:
    """Two LoRAs into one."""
    peft_model = get_peft_model(model.unet(), LoraConfig(r=4, lora_alpha=3, target_modules=TARGETS), "first")
    peft_model.add_adapter("second", LoraConfig(r=6, lora_alpha=2, target_modules=TARGETS))
    for name in ("first", "second"):
        fill_adapter(peft_model, name)
    peft_model.save_pretrained(str(model.folder / "peft"))
    peft_model.add_weighted_adapter(["first", "second"], [0.7, -0.4], "both", combination_type="cat")
    theirs = {
        key.removeprefix("base_model.model."): (module.lora_B["both"].weight, module.lora_A["both"].weight)
        for key, module in peft_model.named_modules()
        if hasattr(module, "lora_A") and "both" in module.lora_A
    }
    scales = {module.scaling["both"] for module in peft_model.modules() if "both" in getattr(module, "scaling", {})}
    output = model.folder / "both.safetensors"
    folders = [model.folder / "peft" / name for name in ("first", "second")]
    sdops("merge", *folders, "--weights", "0.7,-0.4", "--to", "diffusers", "--dtype", "fp32", "-o", output)
    state = load_file(output)
    errors = {}
    for module, (up, down) in theirs.items():
        ours = state[f"unet.{module}.lora_B.weight"], state[f"unet.{module}.lora_A.weight"]
        flat = [tensor.flatten(1).float() for tensor in (*ours, up * scales.copy().pop(), down)]
        errors[module] = relative_products((flat[0], flat[1]), (flat[2], flat[3]))
    table.row("PEFT cat, ranks 4 and 6, weights 0.7 and -0.4", errors, len(state) // 2)


def peft_merge(model: Model, table: Table) -> None:
    """`merge_and_unload`."""
    for case, options in (("LoRA", {}), ("DoRA", {"use_dora": True}), ("rsLoRA", {"use_rslora": True})):
        peft_model = get_peft_model(model.unet(), LoraConfig(r=4, lora_alpha=3, target_modules=TARGETS, **options))
        fill_adapter(peft_model, "default")
        folder = model.folder / f"peft-{case}"
        peft_model.save_pretrained(str(folder))
        ours = model.applied(folder, f"applied-{case}")
        table.row(f"PEFT merge, {case}", model.errors(ours, peft_model.merge_and_unload().state_dict()))


def lycoris_state(model: Model, kind: type[nn.Module], layers: tuple[str, ...], options: dict[str, Any]) -> Iterator[
    tuple[dict[str, Tensor], str, Tensor]
]:  # fmt: skip
    """What a module for each layer saves, and the weight that it merges to."""
    unet = model.unet()
    for name in layers:
        layer = unet.get_submodule(name)
        stem = f"lora_unet_{name.replace('.', '_')}"
        module = kind(stem, layer, **{"lora_dim": 4, **options})
        fill(module)
        module.eval().requires_grad_(False)
        if isinstance(module, FullModule):  # until it is trained, it keeps the difference instead of the weight
            saved = {"diff": module.weight.data}
            merged = layer.weight + module.weight
        else:
            custom = module.custom_state_dict() if hasattr(module, "custom_state_dict") else None
            saved = custom if custom is not None else module.state_dict()
            merged = module.get_merged_weight(multiplier=1, shape=layer.weight.shape)[0]
        state = {
            f"{stem}.{key}": value.detach().clone().contiguous() for key, value in saved.items() if key != "scalar"
        }
        yield state, f"{name}.weight", merged.detach()


def lycoris(model: Model, table: Table) -> None:
    """All families, each as a file."""
    for number, (case, kind, layers, options) in enumerate(LYCORIS):
        state, theirs = {}, dict(model.before)
        for part, key, merged in lycoris_state(model, kind, layers, options):
            state |= part
            theirs[key] = merged.reshape(theirs[key].shape)
        file = model.folder / f"lycoris-{number}.safetensors"
        save_file(state, file)
        ours = model.applied(file, f"applied-lycoris-{number}")
        table.row(f"LyCORIS {case}", model.errors(ours, theirs), len(layers))


def main() -> int:
    """Print a line per case."""
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    torch.manual_seed(0)
    table = Table()
    with tempfile.TemporaryDirectory() as name, torch.no_grad():
        model = Model(Path(name))
        peft_cat(model, table)
        peft_merge(model, table)
        lycoris(model, table)
    return table.end()


if __name__ == "__main__":
    sys.exit(main())
