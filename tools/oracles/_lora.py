"""What the oracles of LoRA files share: sdops by its command line, safetensors files, low-rank arithmetic, a table.

The environment variable SDOPS_PYTHON names the Python that has sdops; default: `.venv/bin/python` of the repository.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

ROOT = Path(__file__).parents[2]
PYTHON = os.environ.get("SDOPS_PYTHON", str(ROOT / ".venv" / "bin" / "python"))
LIMIT = 1e-5


def sdops(*arguments: object) -> None:
    """Run a command of sdops; its errors are shown."""
    words = [PYTHON, "-m", "sdops", *map(str, arguments), "--no-progress", "--quiet"]
    done = subprocess.run(words, check=False, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"sdops {' '.join(map(str, arguments))}\n{done.stderr}")


def small_model(folder: Path) -> tuple[Path, Path]:
    """A small SD1.5 in float32: as one file, and as sdops converts it into a folder of diffusers."""
    base = folder / "base.safetensors"
    make = [PYTHON, str(ROOT / "fixtures" / "make.py"), "small", "sd15", "--dtype", "fp32", "-o", str(base)]
    subprocess.run(make, check=True, cwd=ROOT, capture_output=True)
    return base, converted(base)


def converted(model: Path) -> Path:
    """A single file's folder of diffusers."""
    folder = model.with_suffix("")
    sdops("convert", model, "--to", "diffusers", "-o", folder)
    return folder


def component(folder: Path, name: str) -> dict[str, Tensor]:
    """The tensors of a component of a folder of diffusers."""
    found: dict[str, Tensor] = {}
    for path in sorted((folder / name).glob("*.safetensors")):
        found |= load_file(path)
    return found


def tiny_unet(weights: Mapping[str, Tensor]) -> nn.Module:
    """diffusers' U-Net of SD1.5, as narrow as the weights are, with one attention head."""
    from diffusers import UNet2DConditionModel

    widths = [weights[f"down_blocks.{i}.resnets.0.conv1.weight"].shape[0] for i in range(4)]
    cross = weights["down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight"].shape[1]
    model = UNet2DConditionModel(
        block_out_channels=widths,
        cross_attention_dim=cross,
        attention_head_dim=1,
        norm_num_groups=1,
        in_channels=weights["conv_in.weight"].shape[1],
        out_channels=weights["conv_out.weight"].shape[0],
    )
    model.load_state_dict(weights)
    return model


def tiny_clip(weights: Mapping[str, Tensor]) -> nn.Module:
    """transformers' CLIP text encoder, as narrow as the weights are, with one attention head."""
    from transformers import CLIPTextConfig, CLIPTextModel

    tokens = weights["text_model.embeddings.token_embedding.weight"]
    config = CLIPTextConfig(
        vocab_size=tokens.shape[0],
        hidden_size=tokens.shape[1],
        intermediate_size=weights["text_model.encoder.layers.0.mlp.fc1.weight"].shape[0],
        max_position_embeddings=weights["text_model.embeddings.position_embedding.weight"].shape[0],
        num_attention_heads=1,
        num_hidden_layers=12,
    )
    model = CLIPTextModel(config)
    bare = not any(key.startswith("text_model.") for key in model.state_dict())  # transformers 5
    state = {key.removeprefix("text_model.") if bare else key: value for key, value in weights.items()}
    missing, unexpected = model.load_state_dict(state, strict=False)
    if [key for key in (*missing, *unexpected) if "position_ids" not in key]:
        sys.exit(f"the text encoder does not fit: {missing[:3]} {unexpected[:3]}")
    return model


def relative(found: Tensor, wanted: Tensor) -> float:
    """||found - wanted|| / ||wanted||."""
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


def relative_products(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> float:
    """||B A - B' A'|| / ||B' A'|| without building either: it is [B, -B'] [A; A'], whose QR factors are small."""
    up = torch.cat([one[0].double(), -other[0].double()], 1)
    down = torch.cat([one[1].double(), other[1].double()])
    return _norm(up, down) / max(_norm(other[0].double(), other[1].double()), 1e-300)


def _norm(up: Tensor, down: Tensor) -> float:
    return float((torch.linalg.qr(up).R @ torch.linalg.qr(down.T).R.T).norm())


class Table:
    """Comparisons, and the exit code they lead to."""

    def __init__(self) -> None:
        self.worst: list[tuple[float, str]] = []

    def row(self, case: str, errors: Mapping[str, float], expected: int | None = None) -> None:
        """Print a line: the number of layers and the worst error.

        Args:
            case: What was compared.
            errors: Layer -> relative error.
            expected: How many layers there must be.
        """
        error, layer = max(((error, layer) for layer, error in errors.items()), default=(float("inf"), "nothing"))
        if expected is not None and len(errors) != expected:
            error, layer = float("inf"), f"{len(errors)} layers instead of {expected}"
        bad = not error <= LIMIT
        self.worst.append((float("inf") if error != error else error, case))
        print(f"{case:48} {len(errors):5} layers {error:9.1e}{f'  DISAGREES: {layer}' if bad else ''}", flush=True)

    def end(self) -> int:
        """Print the summary; 1 if something disagrees."""
        wrong = sum(not error <= LIMIT for error, _ in self.worst)
        print(f"{len(self.worst)} comparisons, worst {max(self.worst)[0]:.1e}, {wrong} above {LIMIT:.0e}")
        return int(bool(wrong))
