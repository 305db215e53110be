"""The hashes in LoRA files that sdops writes against those that kohya's own function computes.

    git clone https://github.com/kohya-ss/sd-scripts
    python -m venv ENV
    ENV/bin/pip install torch==2.13.0 transformers==4.54.1 diffusers==0.32.1 "huggingface_hub<1" accelerate \\
        safetensors opencv-python-headless imagesize toml einops voluptuous
    SDOPS_PYTHON=.venv/bin/python ENV/bin/python tools/oracles/lora_hashes.py sd-scripts

`library.train_util.precalculate_safetensors_hashes` gets the tensors and metadata of every file: of random LoRAs with
training metadata that sdops converts, resizes and merges, and of an extracted one. The old hash is of bytes from 1 MiB
on, so most files are larger. Exit code 1 if any hash differs.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

import torch
from _lora import PYTHON, ROOT, sdops
from safetensors import safe_open
from safetensors.torch import load_file, save_file

NO_TORCHVISION = "class Compose:\n    def __init__(self, *_): pass\nToTensor = Normalize = Compose\n"
METADATA = {
    "ss_base_model_version": "sdxl_base_v1-0",
    "ss_network_dim": "16",
    "ss_network_alpha": "8",
    "ss_tag_frequency": '{"10_cat": {"猫": 3, "a cat": 2}}',
    "modelspec.title": "cat",
    "sshs_model_hash": "0" * 64,  # stale
    "sshs_legacy_hash": "0" * 8,
}


def lora(path: Path, seed: int, rank: int = 16) -> Path:
    """Some layers of SDXL in kohya's names, full width."""
    torch.manual_seed(seed)
    state = {}
    for block in range(10):
        stem = f"lora_unet_input_blocks_8_1_transformer_blocks_{block}_attn2_to_k"
        state[f"{stem}.lora_up.weight"] = torch.randn(1280, rank).half()
        state[f"{stem}.lora_down.weight"] = torch.randn(rank, 2048).half()
        state[f"{stem}.alpha"] = torch.tensor(8.0)
    save_file(state, path, METADATA)
    return path


def models(folder: Path) -> tuple[Path, Path]:
    """A small SD1.5 and a fine-tune of it."""
    made = []
    for name, extra in (("base", ()), ("tuned", ("--tuned", "1"))):
        path = folder / f"{name}.safetensors"
        make = [PYTHON, str(ROOT / "fixtures" / "make.py"), "small", "sd15", "--dtype", "fp16", "-o", str(path), *extra]
        subprocess.run(make, check=True, cwd=ROOT, capture_output=True)
        made.append(path)
    return made[0], made[1]


def without_torchvision(folder: Path) -> None:
    """kohya's module imports torchvision; where there is none, an empty one serves."""
    if find_spec("torchvision") is None:
        package = folder / "torchvision"
        package.mkdir()
        (package / "__init__.py").write_text("")
        (package / "transforms.py").write_text(NO_TORCHVISION)
        sys.path.append(str(folder))


def kohya_hashes(path: Path) -> tuple[str, str]:
    """What kohya writes for these tensors and this metadata."""
    from library.train_util import precalculate_safetensors_hashes

    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    return precalculate_safetensors_hashes(load_file(path), metadata)


def check(path: Path) -> bool:
    """Print a line; whether both hashes agree."""
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    ours = metadata.get("sshs_model_hash", "none"), metadata.get("sshs_legacy_hash", "none")
    theirs = kohya_hashes(path)
    right = ours == theirs
    print(f"{path.name:28} {path.stat().st_size:10,} B  {ours[0][:12]} {ours[1]}  {'agrees' if right else theirs}")
    return right


def main() -> int:
    """Print a line per file."""
    sys.path.insert(0, sys.argv[1])
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        without_torchvision(folder)
        one, other = lora(folder / "one.safetensors", 1), lora(folder / "other.safetensors", 2, 12)
        made = [folder / f"{verb}.safetensors" for verb in ("diffusers", "comfy", "resized", "merged", "extracted")]
        sdops("convert", one, "--to", "diffusers", "-o", made[0])
        sdops("convert", one, "--to", "comfy", "-o", made[1])
        sdops("resize", one, "--rank", 8, "-o", made[2])
        sdops("merge", one, other, "--weights", "0.7,-0.3", "-o", made[3])
        base, tuned = models(folder)
        sdops("extract", tuned, "--base", base, "--rank", 8, "-o", made[4])
        wrong = [path for path in made if not check(path)]
    print(f"{len(made)} files, {len(wrong)} with other hashes")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
