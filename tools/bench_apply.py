"""Measure `sdops apply` of one LoRA of rank 32 to SDXL in fp16, file to file, against the floor of a streaming copy.

    python tools/bench_apply.py --folder bench-data --rounds 5

Makes an SDXL of full size and a LoRA of all its linear layers within transformers in the folder (kept for the next
time). In every round tools/floor.py and sdops run one after the other; inputs are in the page cache, outputs are gone
before every run. The hash of the model is remembered since a run before the first round, as it is in daily use.
Prints a table, and the median of the ratios within a round.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import numpy as np
from measure import Cost, run
from safetensors.numpy import save_file

from sdops.formats import open_source

HERE = Path(__file__).parent
UNET = "model.diffusion_model."
RANK = 32


def model(folder: Path) -> Path:
    """The checkpoint, 6.9 GB."""
    path = folder / "sdxl-base.safetensors"
    if not path.exists():
        make = [sys.executable, str(HERE.parent / "fixtures" / "make.py"), "full", "sdxl", "--dtype", "fp16"]
        subprocess.run([*make, "-o", str(path)], check=True)
    return path


def lora(folder: Path, base: Path) -> Path:
    """In kohya's names, fp16, alpha = 16."""
    path = folder / "sdxl-lora-32.safetensors"
    if not path.exists():
        random = np.random.default_rng(0)
        state = {}
        for stem, rows, columns in layers(base):
            state[f"{stem}.lora_up.weight"] = (random.standard_normal((rows, RANK)) * 0.01).astype(np.float16)
            state[f"{stem}.lora_down.weight"] = (random.standard_normal((RANK, columns)) * 0.05).astype(np.float16)
            state[f"{stem}.alpha"] = np.array(16, np.float16)
        save_file(state, path, {"ss_base_model_version": "sdxl_base_v1-0"})
    return path


def layers(base: Path) -> Iterator[tuple[str, int, int]]:
    """Name and shape of what kohya's network has by default."""
    with closing(open_source(base)) as source:
        for key, spec in source.specs.items():
            module = key.removeprefix(UNET).removesuffix(".weight")
            if module in key and key.startswith(UNET) and len(spec.shape) == 2 and "transformer_blocks" in key:
                yield f"lora_unet_{module.replace('.', '_')}", *spec.shape


def show(name: str, cost: Cost, floor: float) -> float:
    """Print a line; the ratio to the floor."""
    ratio = cost.wall / floor
    print(
        f"{name:8} {cost.wall:7.2f} s  x{ratio:5.2f}  user {cost.user:6.2f}  system {cost.system:6.2f}  "
        f"own {cost.anonymous_mb:5.0f} MB  peak {cost.peak_mb:5.0f} MB {cost.error}",
        flush=True,
    )
    return ratio


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    options.folder.mkdir(exist_ok=True)
    base = model(options.folder)
    adapter, output = lora(options.folder, base), options.folder / "apply-out.safetensors"
    apply = [sys.executable, "-m", "sdops", "apply", str(base), "--lora", f"{adapter}:0.8", "-o", str(output), "-q"]
    copy = [sys.executable, str(HERE / "floor.py"), str(output), str(base)]
    subprocess.run([*apply, "--no-progress"], check=True)
    ratios = []
    for _ in range(options.rounds):
        output.unlink()
        floor = run(copy)
        show("floor", floor, floor.wall)
        output.unlink()
        ratios.append(show("sdops", run([*apply, "--no-progress"]), floor.wall))
    output.unlink()
    print(f"median x{statistics.median(ratios):.2f} of {[round(ratio, 2) for ratio in sorted(ratios)]}")


if __name__ == "__main__":
    main()
