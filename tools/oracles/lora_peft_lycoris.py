"""`sdops merge` and `sdops apply` against PEFT and LyCORIS, through files.

    python -m venv ENV
    ENV/bin/pip install torch==2.13.0 diffusers==0.42.1 transformers peft==0.21.2 lycoris_lora==4.1.3 accelerate
    SDOPS_PYTHON=.venv/bin/python ENV/bin/python tools/oracles/lora_peft_lycoris.py

All on a small SD1.5 in float32 (fixtures/make.py):

    PEFT      `add_weighted_adapter(combination_type="cat")` of two LoRAs of different rank and alpha, one weight
              negative, against `sdops merge`; `merge_and_unload` of LoRA, DoRA and (IA)^3 against `sdops apply`; and
              of LoRA on the text encoder with its tables of embeddings. (IA)^3 also after a conversion to kohya's names
    LyCORIS   `get_merged_weight` of a module of every family against `sdops apply` of what it saves. For LoHa and LoKr
              alpha = r, because its merge multiplies by alpha / r twice. And what its extraction writes with the whole
              rest beside the factors (`use_bias`, no sparsity): applied to the base it gives the fine-tune

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
from _lora import Table, component, converted, relative, relative_products, sdops, small_model, tiny_clip, tiny_unet
from lycoris.modules.boft import ButterflyOFTModule
from lycoris.modules.diag_oft import DiagOFTModule
from lycoris.modules.full import FullModule
from lycoris.modules.glora import GLoRAModule
from lycoris.modules.ia3 import IA3Module
from lycoris.modules.locon import LoConModule
from lycoris.modules.loha import LohaModule
from lycoris.modules.lokr import LokrModule
from lycoris.utils import extract_diff
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

TARGETS = ["to_q", "to_k", "to_out.0", "proj_in", "conv1", "ff.net.2"]
LINEAR = "mid_block.attentions.0.transformer_blocks.0.ff.net.2"
SQUARE = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
POINT = "mid_block.attentions.0.proj_in"
CONV = "mid_block.resnets.0.conv1"
FP16 = 1e-3  # what LyCORIS' extraction loses by saving fp16

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
        self.text = component(base_folder, "text_encoder")

    def unet(self) -> nn.Module:
        """Fresh, with the base's weights."""
        return tiny_unet(self.before).requires_grad_(False)

    def applied(self, lora: Path, name: str, part: str = "unet") -> dict[str, Tensor]:
        """The U-Net, or another component, after `sdops apply`."""
        output = self.folder / f"{name}.safetensors"
        sdops("apply", self.base, "--lora", lora, "-o", output)
        return component(converted(output), part)

    def errors(self, ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> dict[str, float]:
        """Of the changes; of weights that only one of the two changes it is infinite."""
        found = {}
        before = self.before if ours.keys() == self.before.keys() else self.text
        for key, start in before.items():
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


def peft_ia3(model: Model, table: Table) -> None:
    """(IA)^3 of the layers that people choose, as PEFT saves it, and once more in kohya's names where it can be."""
    cases = {
        "with biases": IA3Config(target_modules=["to_k", "conv1", "ff.net.2"], feedforward_modules=["ff.net.2"]),
        "without": IA3Config(target_modules=["to_k", "to_v", "conv2"], feedforward_modules=["conv2"]),
    }
    for case, config in cases.items():
        peft_model = get_peft_model(model.unet(), config)
        for key, parameter in peft_model.named_parameters():
            if "ia3_l" in key:
                parameter.data.copy_(1 + 0.3 * torch.randn_like(parameter))
        folder = model.folder / f"ia3-{case}"
        peft_model.save_pretrained(str(folder))
        merged = peft_model.merge_and_unload().state_dict()
        table.row(f"PEFT merge, (IA)^3 {case}", model.errors(model.applied(folder, f"applied-ia3-{case}"), merged))
        again = model.folder / f"again-{case}"
        if case == "without":
            sdops("convert", folder, "--to", "kohya", "-o", model.folder / "ia3.safetensors")
            sdops("convert", model.folder / "ia3.safetensors", "--to", "peft", "-o", again)
            ours = model.applied(model.folder / "ia3.safetensors", "applied-ia3-kohya")
            table.row("PEFT merge, (IA)^3 in kohya's names", model.errors(ours, merged))
        else:
            sdops("convert", folder, "--to", "peft", "-o", again)
        loaded = PeftModel.from_pretrained(model.unet(), str(again)).merge_and_unload().state_dict()
        table.row(f"PEFT loads sdops' folder, (IA)^3 {case}", model.errors(loaded, merged))


def peft_text(model: Model, table: Table) -> None:
    """LoRA on the text encoder and its tables of embeddings."""
    targets = ["token_embedding", "position_embedding", "q_proj", "fc2"]
    text = tiny_clip(model.text).requires_grad_(False)
    peft_model = get_peft_model(text, LoraConfig(r=4, lora_alpha=3, target_modules=targets))
    fill_adapter(peft_model, "default")
    folder = model.folder / "text"
    peft_model.save_pretrained(str(folder))
    again = model.folder / "text-again"
    sdops("convert", folder, "--to", "peft", "-o", again)  # with the names that transformers had before its version 5
    theirs = text_names(peft_model.merge_and_unload(), model.text)
    ours = model.applied(folder, "text-applied", "text_encoder")
    table.row("PEFT merge, text encoder with its tables", model.errors(ours, theirs))
    ours = model.applied(again, "text-applied-again", "text_encoder")
    table.row("the same after sdops' conversion", model.errors(ours, theirs))


def text_names(text: nn.Module, like: dict[str, Tensor]) -> dict[str, Tensor]:
    """A text encoder's weights under the names of files: transformers 5 leaves out `text_model.`."""
    state = text.state_dict()
    return {key: state.get(key, state.get(key.removeprefix("text_model."), start)) for key, start in like.items()}


def lycoris_rest(model: Model, table: Table) -> None:
    """What LyCORIS extracts, with all of the rest beside the factors."""
    tuned = {key: value + 0.01 * torch.randn_like(value) for key, value in model.before.items()}
    unets = [tiny_unet(weights).requires_grad_(False) for weights in (model.before, tuned)]
    options = {"mode": "fixed", "linear_mode_param": 2, "conv_mode_param": 2}
    found = extract_diff([], [], *unets, use_bias=True, sparsity=0.0, small_conv=False, **options)
    found = {
        key: value.contiguous() for key, value in found.items() if not key.endswith((".w_norm", ".b_norm", ".diff_b"))
    }
    file = model.folder / "rest.safetensors"
    save_file(found, file)
    if not any(key.endswith(".bias_indices") for key in found):
        sys.exit("LyCORIS' extraction kept nothing beside the factors")
    theirs = dict(model.before)
    for key in theirs:
        stem = f"lora_unet_{key.removesuffix('.weight').replace('.', '_')}"
        if f"{stem}.bias_indices" in found:
            factors = [found[f"{stem}.lora_{side}.weight"].float().flatten(1) for side in ("up", "down")]
            indices, values, size = (found[f"{stem}.bias_{part}"] for part in ("indices", "values", "size"))
            rest = torch.sparse_coo_tensor(indices.long(), values.float(), tuple(size.tolist())).to_dense()
            theirs[key] = theirs[key] + (factors[0] @ factors[1] + rest).reshape(theirs[key].shape)
        elif f"{stem}.diff" in found:
            theirs[key] = theirs[key] + found[f"{stem}.diff"].float()
    distance = max(
        relative(theirs[key] - start, tuned[key] - start)
        for key, start in model.before.items()
        if key.endswith("to_k.weight")
    )
    if distance > FP16:
        sys.exit(f"LyCORIS' extraction is {distance:.1e} away from the fine-tune")
    table.row("LyCORIS extraction, with the rest", model.errors(model.applied(file, "applied-rest"), theirs))


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
        peft_ia3(model, table)
        peft_text(model, table)
        lycoris_rest(model, table)
        lycoris(model, table)
    return table.end()


if __name__ == "__main__":
    sys.exit(main())
