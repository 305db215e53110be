"""What most scripts on the web do: load both files, interpolate every tensor, save.

python run_naive.py A B OUT ALPHA
"""

from __future__ import annotations

import sys

import torch
from safetensors.torch import load_file, save_file


def main(first: str, second: str, output: str, alpha: float) -> None:
    """Floats are interpolated in float32 and stored as they were; other tensors are A's."""
    a, b = load_file(first), load_file(second)
    for key, tensor in a.items():
        if tensor.is_floating_point():
            a[key] = torch.lerp(tensor.float(), b[key].float(), alpha).to(tensor.dtype)
    save_file(a, output, {"format": "pt"})


main(*sys.argv[1:4], float(sys.argv[4]))
