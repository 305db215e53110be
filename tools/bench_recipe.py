"""Measure `sdops build` of a ten-step recipe over three SD1.5 checkpoints and two LoRAs against the floor.

    python tools/bench_recipe.py --folder bench-data --rounds 3

The floor (tools/floor.py) reads the three checkpoints and writes one, in every round, simply and with `--ahead`. Beside
it run two plain merges, for their memory: one of two checkpoints, and one that reads what the recipe reads, all three
and both LoRAs. One round more, the first, warms up. Inputs are in the page cache and their hashes remembered; outputs
are removed and the disk is synced between runs.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path
from statistics import median

import numpy as np
from bench_merge import settle
from measure import Cost, run

HERE = Path(__file__).parent
SDOPS = [sys.executable, "-m", "sdops"]
MODELS = {"base": (), "one": ("--tuned", "1"), "two": ("--tuned", "2")}
RANK = 16

RECIPE = """
name = "ten"
[inputs]
base = "base.safetensors"
one = "one.safetensors"
two = "two.safetensors"
style = "style.safetensors"
face = "face.safetensors"
[[steps]]
id = "mixed"
verb = "merge"
models = ["one", "two"]
alpha = 0.3
[[steps]]
id = "taught"
verb = "merge"
method = "add-difference"
models = ["mixed", "two", "base"]
alpha = 0.5
[[steps]]
id = "styled"
verb = "apply"
model = "taught"
lora = [["style", 0.8]]
[[steps]]
id = "blended"
verb = "merge"
models = ["styled", "one"]
alpha = "0.2, IN00-IN05=0.1"
[[steps]]
id = "summed"
verb = "merge"
method = "sum-twice"
models = ["blended", "two", "base"]
alpha = 0.1
beta = 0.1
[[steps]]
id = "faced"
verb = "apply"
model = "summed"
lora = [["face", 0.5]]
[[steps]]
id = "averaged"
verb = "merge"
method = "average"
models = ["faced", "one"]
[[steps]]
id = "weighed"
verb = "merge"
method = "triple-sum"
models = ["averaged", "two", "base"]
alpha = 0.1
beta = 0.05
[[steps]]
id = "unlearned"
verb = "merge"
method = "add-difference"
models = ["weighed", "two", "base"]
alpha = -0.1
[[steps]]
id = "settled"
verb = "merge"
models = ["unlearned", "base"]
alpha = 0.05
"""


def prepare(folder: Path) -> None:
    """Make what is not there yet."""
    folder.mkdir(exist_ok=True)
    for name, more in MODELS.items():
        path = folder / f"{name}.safetensors"
        if not path.exists():
            command = [sys.executable, str(HERE.parent / "fixtures" / "make.py"), "full", "sd15", "--dtype", "fp16"]
            subprocess.run([*command, *more, "-o", str(path)], check=True, stdout=subprocess.DEVNULL)
    (folder / "ten.toml").write_text(RECIPE)
    for seed, name in enumerate(("style", "face")):
        if not (folder / f"{name}.safetensors").exists():
            make_lora(folder / f"{name}.safetensors", folder / "base.safetensors", seed)


def make_lora(path: Path, model: Path, seed: int) -> None:
    """A LoRA of all attention and feed-forward layers, as kohya's trainer writes it."""
    sys.path.insert(0, str(HERE.parent))
    import sdops
    from fixtures import loras

    rng, start, tensors = np.random.default_rng(seed), "model.diffusion_model.", {}
    for key, spec in sdops.open(model).specs.items():
        if not key.startswith(start) or ".transformer_blocks." not in key or len(spec.shape) != 2:
            continue
        stem = "lora_unet_" + key.removeprefix(start).removesuffix(".weight").replace(".", "_")
        rows, columns = spec.shape
        tensors[f"{stem}.lora_up.weight"] = (0.01 * rng.standard_normal((rows, RANK))).astype(np.float16)
        tensors[f"{stem}.lora_down.weight"] = (0.01 * rng.standard_normal((RANK, columns))).astype(np.float16)
        tensors[f"{stem}.alpha"] = np.float16(RANK)
    loras.save(path, tensors)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("bench-data"))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--prepare", action="store_true", help="only make the files")
    options = parser.parse_args()
    folder: Path = options.folder
    prepare(folder)
    if options.prepare:
        return
    models = [str(folder / f"{name}.safetensors") for name in ("one", "two", "base")]
    loras = [f"--lora={folder / name}.safetensors:{strength}" for name, strength in (("style", 0.8), ("face", 0.5))]
    output = folder / "output.safetensors"
    commands = {
        "floor": [sys.executable, str(HERE / "floor.py"), str(output), *models],
        "floor ahead": [sys.executable, str(HERE / "floor.py"), str(output), *models, "--ahead"],
        "merge": [*SDOPS, "merge", *models[:2], "-o", str(output), "-q"],
        "merge of all": [*SDOPS, "merge", "-m", "add-difference", *models, *loras, "-o", str(output), "-q"],
        "build": [*SDOPS, "build", str(folder / "ten.toml"), "-o", str(output), "-q"],
    }
    environment = {  # as installed: compiled modules are kept
        "SDOPS_CACHE": str(folder / "cache"),
        "PYTHONDONTWRITEBYTECODE": "",
        "PYTHONPYCACHEPREFIX": str(folder.resolve() / "bytecode"),
    }
    costs: dict[str, list[Cost]] = {name: [] for name in commands}
    for number in range(options.rounds + 1):
        for name, command in commands.items():
            output.unlink(missing_ok=True)
            os.sync()
            settle(folder, set(map(Path, models)))
            cost = run(command, environment=environment)
            print(f"{name}: {cost.wall:.2f} s, {cost.user:.1f} + {cost.system:.1f} CPU s, {cost.anonymous_mb:.0f} MB"
                  f" {cost.error}")  # fmt: skip
            if number:
                costs[name].append(cost)
    output.unlink(missing_ok=True)
    for name in ("merge", "merge of all", "build"):
        memory = max(cost.anonymous_mb for cost in costs[name])
        ratios = [f"{_ratio(costs[name], costs[floor]):.2f} x {floor}" for floor in ("floor", "floor ahead")]
        print(f"{name}: {', '.join(ratios)}, {memory:.0f} MB")


def _ratio(own: list[Cost], floor: list[Cost]) -> float:
    """The median of what one takes beside the other in the same round."""
    return median(one.wall / other.wall for one, other in zip(own, floor, strict=True))


if __name__ == "__main__":
    main()
