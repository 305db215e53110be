"""`sdops apply` against diffusers, which loads a LoRA in kohya's names and fuses it.

    python -m venv ENV
    ENV/bin/pip install torch==2.13.0 diffusers==0.42.1 transformers peft accelerate safetensors
    SDOPS_PYTHON=.venv/bin/python ENV/bin/python tools/oracles/lora_diffusers.py

A small SD1.5 in float32 (fixtures/make.py) and random LoRAs for every layer that kohya's network has with `conv_dim`:
linear layers, 1x1 and 3x3 convolutions, the text encoder; ranks differ, alpha is another number. Compared is what is
added to each weight, at strength 0.8. Exit code 1 if any error is above 1e-5.
"""

from __future__ import annotations

import logging
import sys
import tempfile
import warnings
from pathlib import Path

import torch
from _lora import Table, component, converted, relative, sdops, small_model, tiny_clip, tiny_unet
from diffusers import DDIMScheduler, StableDiffusionPipeline
from safetensors.torch import save_file
from torch import Tensor, nn

STRENGTH = 0.8


def kohya(unet: nn.Module, text_encoder: nn.Module) -> dict[str, Tensor]:
    """A LoRA for all layers within blocks."""
    state: dict[str, Tensor] = {}
    for name, layer in unet.named_modules():
        if isinstance(layer, (nn.Linear, nn.Conv2d)) and "blocks." in name + ".":
            _add(state, f"lora_unet_{name.replace('.', '_')}", layer.weight)
    for name, layer in text_encoder.named_modules():
        if isinstance(layer, nn.Linear):
            full = name if name.startswith("text_model.") else f"text_model.{name}"
            _add(state, f"lora_te_{full.replace('.', '_')}", layer.weight)
    return state


def _add(state: dict[str, Tensor], stem: str, weight: Tensor) -> None:
    rank = 2 + len(state) // 3 % 3
    kernel = weight.shape[2:]
    state[f"{stem}.lora_down.weight"] = torch.randn(rank, *weight.shape[1:]) * 0.3
    state[f"{stem}.lora_up.weight"] = torch.randn(weight.shape[0], rank, *[1] * len(kernel)) * 0.3
    state[f"{stem}.alpha"] = torch.tensor(1.5)


def fused(unet: nn.Module, text_encoder: nn.Module, file: Path) -> dict[str, Tensor]:
    """All weights after diffusers has fused the file."""
    pipe = StableDiffusionPipeline(None, text_encoder, None, unet, DDIMScheduler(), None, None, None, False)
    pipe.load_lora_weights(str(file.parent), weight_name=file.name)
    pipe.fuse_lora(lora_scale=STRENGTH)
    pipe.unload_lora_weights()
    return weights(pipe.unet, pipe.text_encoder)


def weights(unet: nn.Module, text_encoder: nn.Module) -> dict[str, Tensor]:
    """Of both, copied, under the names of files."""
    text = {
        f"text_encoder.text_model.{key.removeprefix('text_model.')}": v for key, v in text_encoder.state_dict().items()
    }
    both = {f"unet.{key}": value for key, value in unet.state_dict().items()} | text
    return {key: value.detach().clone() for key, value in both.items()}


def saved(folder: Path) -> dict[str, Tensor]:
    """The weights in a folder of diffusers."""
    return {
        f"{part}.{key}": value for part in ("unet", "text_encoder") for key, value in component(folder, part).items()
    }


def main() -> int:
    """Print a line per kind of layer and way."""
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    torch.manual_seed(0)
    table = Table()
    with tempfile.TemporaryDirectory() as name, torch.no_grad():
        folder = Path(name)
        base, base_folder = small_model(folder)
        before = saved(base_folder)
        unet, text_encoder = (
            tiny_unet(component(base_folder, "unet")),
            tiny_clip(component(base_folder, "text_encoder")),
        )
        state = kohya(unet, text_encoder)
        save_file(state, folder / "lora.safetensors")
        theirs = fused(unet, text_encoder, folder / "lora.safetensors")
        single = folder / "applied.safetensors"
        sdops("apply", base, "--lora", f"{folder / 'lora.safetensors'}:{STRENGTH}", "-o", single)
        ours = saved(converted(single))
        changed = [key for key in before if not torch.equal(before[key], theirs[key])]
        silent = [key for key in before if key not in changed and not torch.equal(before[key], ours[key])]
        kinds = {
            "linear layers": lambda key: key.startswith("unet") and before[key].ndim == 2,
            "convolutions 1x1": lambda key: before[key].ndim == 4 and before[key].shape[2] == 1,
            "convolutions 3x3": lambda key: before[key].ndim == 4 and before[key].shape[2] == 3,
            "text encoder": lambda key: key.startswith("text"),
        }
        for kind, belongs in kinds.items():
            keys = [key for key in changed if belongs(key)]
            table.row(f"{kind}", {key: relative(ours[key] - before[key], theirs[key] - before[key]) for key in keys})
        everything = {key: relative(ours[key] - before[key], theirs[key] - before[key]) for key in changed}
        table.row("all layers of the LoRA", everything, len(state) // 3)
        table.row("layers that diffusers leaves alone", {"none": 0.0 if not silent else float("inf")})
    return table.end()


if __name__ == "__main__":
    sys.exit(main())
