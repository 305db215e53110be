"""What most scripts on the web do to convert a model: load every tensor, change the dict, save it.

python run_load_save.py IN [IN ...] OUT [--half] [--keep PREFIX] [--drop PREFIX]
"""

from __future__ import annotations

import argparse

import torch
from safetensors.torch import load_file, save_file


def main(inputs: list[str], output: str, *, half: bool, keep: str, drop: str | None) -> None:
    """Join the inputs, choose tensors by what their names begin with, write fp16 if asked to."""
    tensors: dict[str, torch.Tensor] = {}
    for path in inputs:
        loaded = load_file(path) if path.endswith(".safetensors") else torch.load(path, weights_only=True)
        tensors |= loaded.get("state_dict", loaded)
    tensors = {key: each for key, each in tensors.items() if key.startswith(keep)}
    if drop is not None:
        tensors = {key: each for key, each in tensors.items() if not key.startswith(drop)}
    if half:
        tensors = {key: each.half() if each.is_floating_point() else each for key, each in tensors.items()}
    save_file(tensors, output, {"format": "pt"})


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("files", nargs="+", help="inputs, then the output")
parser.add_argument("--half", action="store_true")
parser.add_argument("--keep", default="")
parser.add_argument("--drop")
options = parser.parse_args()
main(options.files[:-1], options.files[-1], half=options.half, keep=options.keep, drop=options.drop)
