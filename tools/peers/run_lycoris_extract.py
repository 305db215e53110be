"""`lycoris.utils.extract_diff`, the core of LyCORIS' extract_locon script, on layers of two files.

    python run_lycoris_extract.py BASE TUNED OUT RANK LAYERS.json

LAYERS.json: name of a layer in the LoRA, without `lora_unet_` or `lora_te_` -> name of its weight in the files. Instead
of whole models, which the script loads with the help of other packages, the function gets trees of bare layers; that
is in its favour. Its Tucker decomposition of convolutions, which costs accuracy, is off.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from lycoris.utils import extract_diff
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn


def tree(path: str, layers: dict[str, str]) -> tuple[nn.Module, nn.Module]:
    """U-Net and text encoder, each with the layers as direct children."""
    unet, text_encoder = nn.Module(), nn.Module()
    with safe_open(path, "pt") as file:
        for name, key in layers.items():
            weight = file.get_tensor(key).float()
            rows, columns, *kernel = weight.shape
            layer = nn.Conv2d(columns, rows, kernel, bias=False) if kernel else nn.Linear(columns, rows, bias=False)
            layer.weight = nn.Parameter(weight, requires_grad=False)
            (unet if key.startswith("model.") else text_encoder).add_module(name, layer)
    return unet, text_encoder


def main() -> None:
    """The command line."""
    base, tuned, output, rank, names = sys.argv[1:]
    layers = json.loads(Path(names).read_text(encoding="utf-8"))
    unet_base, text_base = tree(base, layers)
    unet_tuned, text_tuned = tree(tuned, layers)
    found = extract_diff(
        [text_base], [text_tuned], unet_base, unet_tuned, "fixed", int(rank), int(rank), small_conv=False
    )
    save_file(found, output)


if __name__ == "__main__":
    main()
