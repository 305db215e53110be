"""`sdops convert --to diffusers` against diffusers' own converters of Flux LoRAs.

    python -m venv ENV
    ENV/bin/pip install torch==2.13.0 diffusers==0.42.1 transformers peft accelerate safetensors
    SDOPS_PYTHON=.venv/bin/python ENV/bin/python tools/oracles/lora_flux_converters.py [KEY_TABLE.json ...]

Tables of real files' names and shapes (default: those of Flux in fixtures/lora_keys) are filled with random numbers, of
rank 2. Files in the dialects of XLabs and of BFL's control LoRAs are made here.
`FluxLoraLoaderMixin.lora_state_dict` converts each, and so does sdops; then sdops spells the result in kohya's dialect,
and diffusers converts that. The products B A of every layer are compared. Exit code 1 if any error is above 1e-5.

Two exceptions, both of control files: the norms that they replace are no part of a LoRA in diffusers' dialect, sdops
refuses them, so they are left out. And diffusers swaps the halves of `norm_out` in the rows of A, too, where they mean
nothing (its rows are ranks): that is undone here.
"""

from __future__ import annotations

import json
import logging
import re
import sys
import tempfile
import warnings
from pathlib import Path

import torch
from _lora import ROOT, Table, relative, relative_products, sdops
from diffusers.loaders import FluxLoraLoaderMixin
from safetensors.torch import load_file, save_file
from torch import Tensor

TABLES = ("flux_lora_kohya_format", "flux_lora_kohya_with_te1_format", "flux_lora_diffusers_format")
RANK, WIDTH = 2, 3072
Pair = tuple[Tensor, Tensor]


def from_table(path: Path) -> dict[str, Tensor]:
    """Random tensors for a table; all ranks become 2, every alpha 1.5."""
    shapes = json.loads(path.read_text(encoding="utf-8"))
    state = {}
    for key, shape in shapes.items():
        small = [RANK if size <= 128 else size for size in shape]
        state[key] = torch.randn(small) * 0.2 if shape else torch.tensor(1.5)
    return state


def xlabs() -> dict[str, Tensor]:
    """Attention of the image and text streams, and of single blocks."""
    state: dict[str, Tensor] = {}
    for block in range(2):
        for stream in (1, 2):
            _add(state, f"double_blocks.{block}.processor.qkv_lora{stream}", 3 * WIDTH, WIDTH, "down", "up")
            _add(state, f"double_blocks.{block}.processor.proj_lora{stream}", WIDTH, WIDTH, "down", "up")
    for block in range(2):
        _add(state, f"single_blocks.{block}.processor.qkv_lora", 3 * WIDTH, WIDTH, "down", "up")
        _add(state, f"single_blocks.{block}.processor.proj_lora", WIDTH, 5 * WIDTH, "down", "up")
    return state


def control() -> dict[str, Tensor]:
    """As Flux Depth and Canny: all layers, biases, replaced norms, a wider input."""
    state: dict[str, Tensor] = {}
    sizes = {
        "img_in": (WIDTH, 128),
        "txt_in": (WIDTH, 4096),
        "time_in.in_layer": (WIDTH, 256),
        "time_in.out_layer": (WIDTH, WIDTH),
        "vector_in.in_layer": (WIDTH, 768),
        "vector_in.out_layer": (WIDTH, WIDTH),
        "guidance_in.in_layer": (WIDTH, 256),
        "guidance_in.out_layer": (WIDTH, WIDTH),
        "final_layer.linear": (64, WIDTH),
        "final_layer.adaLN_modulation.1": (2 * WIDTH, WIDTH),
    }
    for block in range(19):
        for stream in ("img", "txt"):
            at = f"double_blocks.{block}.{stream}"
            sizes |= {f"{at}_attn.qkv": (3 * WIDTH, WIDTH), f"{at}_attn.proj": (WIDTH, WIDTH)}
            sizes |= {f"{at}_mlp.0": (4 * WIDTH, WIDTH), f"{at}_mlp.2": (WIDTH, 4 * WIDTH)}
            sizes |= {f"{at}_mod.lin": (6 * WIDTH, WIDTH)}
            for norm in ("query_norm", "key_norm"):
                state[f"{at}_attn.norm.{norm}.scale"] = torch.randn(128)
    for block in range(38):
        at = f"single_blocks.{block}"
        sizes |= {f"{at}.linear1": (7 * WIDTH, WIDTH), f"{at}.linear2": (WIDTH, 5 * WIDTH)}
        sizes |= {f"{at}.modulation.lin": (3 * WIDTH, WIDTH)}
        for norm in ("query_norm", "key_norm"):
            state[f"{at}.norm.{norm}.scale"] = torch.randn(128)
    for stem, (rows, columns) in sizes.items():
        _add(state, stem, rows, columns, "lora_A", "lora_B")
        state[f"{stem}.lora_B.bias"] = torch.randn(rows)
    return state


def _add(state: dict[str, Tensor], stem: str, rows: int, columns: int, down: str, up: str) -> None:
    state[f"{stem}.{down}.weight"] = torch.randn(RANK, columns) * 0.2
    state[f"{stem}.{up}.weight"] = torch.randn(rows, RANK) * 0.2


def by_diffusers(file: Path) -> tuple[dict[str, Pair], dict[str, Tensor]]:
    """Layer -> (B, A), the alpha folded in; and other tensors, such as biases and norms."""
    state, alphas = FluxLoraLoaderMixin.lora_state_dict(load_file(file), return_alphas=True)
    return _split(state, alphas or {})


def by_sdops(file: Path, folder: Path) -> tuple[dict[str, Pair], dict[str, Tensor]]:
    """The same."""
    output = folder / f"{file.stem}.diffusers.safetensors"
    sdops("convert", file, "--to", "diffusers", "-o", output)
    return _split(load_file(output), {})


def _split(state: dict[str, Tensor], alphas: dict[str, float]) -> tuple[dict[str, Pair], dict[str, Tensor]]:
    pairs, others = {}, {}
    renamed = {_renamed(key): value for key, value in state.items()}
    alphas = {_renamed(key): value for key, value in alphas.items()}
    for key, value in renamed.items():
        stem = key.removesuffix(".lora_A.weight")
        if stem != key:
            up = renamed[f"{stem}.lora_B.weight"].float()
            alpha = alphas.get(f"{stem}.alpha")
            pairs[stem] = up * (float(alpha) / up.shape[1] if alpha is not None else 1), value.float()
        elif not key.endswith(".lora_B.weight"):
            others[key] = value
    return pairs, others


def _renamed(key: str) -> str:
    """The name of a text encoder's layer as diffusers spells it today; some of its converters return that of 2023."""
    key = re.sub(r"to_(q|k|v|out)_lora\.(up|down)\.", r"\1_proj.lora_linear_layer.\2.", key)
    key = re.sub(r"to_(q|k|v|out)_lora\.alpha$", r"\1_proj.alpha", key)
    return key.replace(".lora_linear_layer.up.", ".lora_B.").replace(".lora_linear_layer.down.", ".lora_A.")


def compare(table: Table, case: str, ours: tuple[dict, dict], theirs: tuple[dict, dict]) -> None:
    """All layers of both."""
    both = ours[0] | theirs[0]
    alone = ours[0].keys() ^ theirs[0].keys()  # rows of a joined layer that only one of the two keeps may be zero
    errors = {stem: float("inf") if both[stem][0].any() else 0.0 for stem in alone}
    errors |= {stem: relative_products(ours[0][stem], theirs[0][stem]) for stem in ours[0].keys() & theirs[0].keys()}
    table.row(case, errors)
    if theirs[1]:
        errors = {
            key: relative(ours[1][key], value) if key in ours[1] else float("inf") for key, value in theirs[1].items()
        }
        table.row(f"{case}: biases and norms", errors)


def main() -> int:
    """Print two lines per dialect."""
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    torch.manual_seed(0)
    table = Table()
    tables = [Path(word) for word in sys.argv[1:]] or [
        ROOT / "fixtures" / "lora_keys" / f"{name}.json" for name in TABLES
    ]
    files = {path.stem.removesuffix("_format"): from_table(path) for path in tables}
    files |= {"XLabs": xlabs(), "BFL control": control()}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for case, state in files.items():
            file = folder / f"{case.replace(' ', '-')}.safetensors"
            save_file(state, file)
            theirs = by_diffusers(file)
            if case == "BFL control":
                save_file({key: value for key, value in state.items() if not key.endswith(".scale")}, file)
                up, down = theirs[0]["transformer.norm_out.linear"]
                theirs[0]["transformer.norm_out.linear"] = up, torch.cat(down.chunk(2)[::-1])
                theirs = theirs[0], {key: value for key, value in theirs[1].items() if ".norm_" not in key}
            compare(table, case, by_sdops(file, folder), theirs)
            if case != "BFL control":  # kohya's names have no place for biases of factors
                kohya = folder / f"{file.stem}.kohya.safetensors"
                sdops("convert", file, "--to", "kohya", "-o", kohya)
                compare(table, f"{case}, to kohya by sdops", by_diffusers(kohya), theirs)
    return table.end()


if __name__ == "__main__":
    sys.exit(main())
