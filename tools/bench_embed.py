"""Measure how soon `sdops embed inspect` answers: ten files, a matrix of eight, nearest words in a whole vocabulary.

    python tools/bench_embed.py DATA [--rounds 10]      in an environment with this package, torch and safetensors

DATA is a folder for an SD1.5 of `fixtures/make.py` (2.1 GB) and the embeddings. Times are those of whole processes; the
checkpoint is in the page cache. Prints a table, and fails if a bar is missed or if torch was imported.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch

from fixtures import make
from tests.embeddings import files
from tools import measure

SDOPS = [sys.executable, "-m", "sdops", "embed", "inspect"]
LAYOUTS = (
    files.a1111, files.rinongal, files.hcp, files.diffusers_bin, files.kohya_safetensors, files.sdxl, files.onetrainer,
    files.history_dict, files.bundle, files.png_chunk,
)  # fmt: skip


def data(folder: Path) -> tuple[list[str], list[str], Path]:
    """Ten embeddings of as many layouts, eight image vectors, a checkpoint."""
    folder.mkdir(parents=True, exist_ok=True)
    ten = []
    for writer in LAYOUTS:
        (folder / writer.__name__).mkdir(exist_ok=True)
        ten.append(str(writer(folder / writer.__name__)[0]))
    eight = []
    for number in range(8):
        path = folder / f"aesthetic{number}.pt"
        torch.save(40 * files.rows(1, 768, number), path)
        eight.append(str(path))
    model = folder / "sd15.safetensors"
    if not model.exists():
        make.full("sd15", model, dtype="fp16")
    return ten, eight, model


def main() -> None:
    """Measure, print, check."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--rounds", type=int, default=10)
    options = parser.parse_args()
    ten, eight, model = data(options.data)
    cases = {
        "ten files of ten layouts": (ten, 1.0),
        "eight image vectors and their matrix": (eight, 1.0),
        "nearest of 49,408 words, 3 vectors": ([ten[0], "--model", str(model)], 3.0),
        "ten files with nearest words": ([*ten, "--model", str(model)], None),
    }
    print("| `sdops embed inspect` of | median s | worst s | bar s | own MB |\n|---|---:|---:|---:|---:|")
    for name, (arguments, bar) in cases.items():
        command = [*SDOPS, *arguments]
        costs = [measure.run(command) for _ in range(options.rounds)]
        failed = [cost.error for cost in costs if cost.code]
        walls = [cost.wall for cost in costs]
        memory = max(cost.anonymous_mb for cost in costs)
        median = statistics.median(walls)
        print(f"| {name} | {median:.2f} | {max(walls):.2f} | {bar or ''} | {memory:.0f} |", flush=True)
        imports = subprocess.run(
            [sys.executable, "-X", "importtime", *command[1:]], check=False, capture_output=True, text=True
        )
        torch_lines = [line for line in imports.stderr.splitlines() if line.split("|")[-1].strip() == "torch"]
        if failed or torch_lines or (bar and median > bar):
            sys.exit(f"{name}: {failed or torch_lines or 'slower than its bar'}")


if __name__ == "__main__":
    main()
