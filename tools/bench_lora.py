"""Measure `sdops extract` on full-size SD1.5 against other programs: cost, and distance from the best possible error.

    python tools/bench_lora.py --folder bench-data
    python tools/bench_lora.py --folder bench-data --kohya sd-scripts --kohya-python KOHYA/bin/python \
        --lycoris-python LYCORIS/bin/python

Makes the files that it needs in the folder (kept for the next time), runs every program once on each set of layers, and
writes lora.json and lora.md there. Outputs of other programs are kept, too: they take minutes, and are not made again.

Errors are relative: ||D - B A|| / ||D|| over all layers together, D = tuned - base. The least that the rank allows is
known from all singular values of every layer, in float64 (Eckart and Young); `excess` says how far a program is above.

    kohya     networks/extract_lora_from_models.py of kohya-ss/sd-scripts in an environment of its own, with torch
              2.13.0, transformers 4.54.1, diffusers 0.32.1, huggingface_hub < 1, accelerate, einops, toml, imagesize,
              voluptuous and opencv-python-headless. The script imports torchvision without using it; where there is
              none, an empty module of that name serves.
    LyCORIS   `lycoris.utils.extract_diff` of lycoris_lora 4.1.3 (tools/peers/run_lycoris_extract.py)
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from bench_merge import free_memory, machine, memory, read, say
from measure import Cost, run

from sdops.adapters import family
from sdops.core.patch import Target
from sdops.verbs._adapters import open_adapter, read_parts
from sdops.verbs._extract_difference import difference
from sdops.verbs._extract_pairs import Pair, pairs
from sdops.verbs._inputs import open_model

HERE = Path(__file__).parent
SDOPS = [sys.executable, "-m", "sdops"]
RANK = 32
TRANSFORMERS = ("*transformer_blocks*", "*.proj_in.*", "*.proj_out.*", "*text_model*")  # what kohya takes by default
NO_TORCHVISION = "class Compose:\n    def __init__(self, *_): pass\nToTensor = Normalize = Compose\n"


@dataclass(frozen=True)
class Layers:
    """A set of layers: options of sdops and of kohya's script that select it."""

    title: str
    sdops: tuple[str, ...]
    kohya: tuple[str, ...]


SETS = {
    "linear": Layers(
        "kohya's default layers", tuple(word for pattern in TRANSFORMERS for word in ("--include", pattern)), ()
    ),
    "all": Layers("all layers, with convolutions", (), ("--conv_dim", str(RANK))),
}


class Bench:
    """The folder with the files, and the programs."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.folder: Path = options.folder
        self.base, self.tuned = self.folder / "sd15-base.safetensors", self.folder / "sd15-1.safetensors"
        for path, extra in ((self.base, ()), (self.tuned, ("--tuned", "1"))):
            if not path.exists():
                say(f"making {path.name}")
                size = "small" if options.small else "full"
                command = [sys.executable, str(HERE.parent / "fixtures" / "make.py"), size, "sd15", "--dtype", "fp16"]
                subprocess.run([*command, *extra, "-o", str(path)], check=True, stdout=subprocess.DEVNULL)
        found = pairs(open_model(self.tuned), open_model(self.base), (), ())
        self.pairs: dict[Target, Pair] = {pair.target: pair for pair in found.layers}

    def commands(self, name: str) -> Iterator[tuple[str, list[str], Path, dict[str, str]]]:
        """Program, command, output and environment, for a set of layers."""
        chosen, output = SETS[name], self.folder / f"sdops-{name}.safetensors"
        files = ["--model_org", str(self.base), "--model_tuned", str(self.tuned), "--save_to"]
        extract = [*SDOPS, "extract", str(self.tuned), "--base", str(self.base), "--rank", str(RANK), "--no-progress"]
        yield "sdops", [*extract, *chosen.sdops, "-f", "-o", str(output)], output, {}
        yield "sdops, exact", [*extract, "--svd", "gram", *chosen.sdops, "-f", "-o", str(output)], output, {}
        if self.options.kohya:
            script = [self.options.kohya_python, str(self.options.kohya / "networks" / "extract_lora_from_models.py")]
            path = os.pathsep.join(map(str, (self.options.kohya, self.options.kohya / "networks", self.stub())))
            for title, clamp in (("kohya", "0.99"), ("kohya, no clamp", "1.0")):
                output = self.folder / f"{title.replace(', ', '-').replace(' ', '-')}-{name}.safetensors"
                rest = ["--dim", str(RANK), "--save_precision", "fp16", "--clamp_quantile", clamp, *chosen.kohya]
                yield title, [*script, *files, str(output), *rest], output, {"PYTHONPATH": path}
        if self.options.lycoris_python:
            output = self.folder / f"lycoris-{name}.safetensors"
            script = [self.options.lycoris_python, str(HERE / "peers" / "run_lycoris_extract.py")]
            command = [*script, str(self.base), str(self.tuned), str(output), str(RANK), str(self.names(name))]
            yield "LyCORIS", command, output, {}

    def stub(self) -> Path:
        """A folder with an empty torchvision, for a Python that has none."""
        package = self.folder / "stubs" / "torchvision"
        package.mkdir(parents=True, exist_ok=True)
        (package / "__init__.py").touch()
        (package / "transforms.py").write_text(NO_TORCHVISION)
        return package.parent

    def names(self, name: str) -> Path:
        """The layers of the set as sdops wrote them, for LyCORIS."""
        adapter = open_adapter(self.folder / f"sdops-{name}.safetensors")
        layers = {
            patch.target.module.replace(".", "_"): self.pairs[patch.target].tuned.key for patch in adapter.patches
        }
        path = self.folder / f"layers-{name}.json"
        path.write_text(json.dumps(layers))
        return path

    def measure(self, name: str) -> dict[str, Any]:
        """Run all programs on a set of layers."""
        rows = []
        for program, command, output, environment in self.commands(name):
            ours = program.startswith("sdops")
            kept = output.with_suffix(".json")
            if not ours and output.exists() and kept.exists():
                cost = Cost(**json.loads(kept.read_text()))
            else:
                cost = self.once(command, environment)
                kept.write_text(json.dumps(cost.as_dict()))
            say(f"  {name}: {program} {cost.user + cost.system:.1f} s {cost.error}")
            row = {"program": program, **cost.as_dict(), "command": " ".join(command)}
            if not cost.code:
                row |= self.judge(output)
            rows.append(row)
        return {"title": SETS[name].title, "rows": rows}

    def once(self, command: list[str], environment: dict[str, str]) -> Cost:
        """A run with the inputs in the page cache."""
        for path in (self.base, self.tuned):
            if free_memory() > 0:
                read(path)
        limits = {"OMP_NUM_THREADS": "1"} if self.options.one_thread else {}
        if self.options.time_limit and "sdops" not in command:
            command = ["timeout", str(self.options.time_limit), *command]
        return run(command, environment={**environment, **limits}, limit_mb=self.options.peer_memory * 1000)

    def judge(self, path: Path) -> dict[str, Any]:
        """A file's error, and the least possible one for its layers and the rank."""
        adapter = open_adapter(path)
        optimum = self.optimum([patch.target for patch in adapter.patches])
        wrong = best = energy = worst = 0.0
        for patch in adapter.patches:
            matrix = difference(self.pairs[patch.target], noise=False).values
            shape = self.pairs[patch.target].shape
            left = matrix - family(patch.family).delta(read_parts(adapter, patch), shape).reshape(matrix.shape)
            error = float(left.double().square().sum())
            wrong, energy = wrong + error, energy + float(matrix.double().square().sum())
            best += optimum[str(patch.target)]
            if optimum[str(patch.target)]:  # 0 where nothing changed
                worst = max(worst, math.sqrt(error / optimum[str(patch.target)]) - 1)
        return {
            "layers": len(adapter.patches),
            "relative_error": math.sqrt(wrong / energy),
            "optimum": math.sqrt(best / energy),
            "excess": math.sqrt(wrong / best) - 1,
            "worst_excess": worst,
        }

    def optimum(self, targets: list[Target]) -> dict[str, float]:
        """The squared singular values beyond the rank, summed; remembered in the folder."""
        kept = self.folder / f"optimum-{RANK}.json"
        known: dict[str, float] = json.loads(kept.read_text()) if kept.exists() else {}
        for target in [target for target in targets if str(target) not in known]:
            matrix = difference(self.pairs[target], noise=False).values.double()
            square = torch.linalg.qr(matrix.T if len(matrix) < matrix.shape[1] else matrix, mode="r").R
            known[str(target)] = float(torch.linalg.svdvals(square)[RANK:].square().sum())
            kept.write_text(json.dumps(known))
        return known


def markdown(results: dict[str, Any]) -> Iterator[str]:
    """The results as tables, line by line."""
    yield f"Machine: {', '.join(f'{name} {value}' for name, value in results['machine'].items())}."
    yield f"Command: `{results['command']}`."
    for one in results["sets"]:
        yield from ("", f"{one['title']}, rank {RANK}:", "")
        yield "| program | CPU s | x sdops | wall s | own MB | layers | error | excess | worst layer |"
        yield "|---|---:|---:|---:|---:|---:|---:|---:|---:|"
        ours = one["rows"][0]["user"] + one["rows"][0]["system"]
        for row in one["rows"]:
            spent = row["user"] + row["system"]
            figures = f"{spent:.1f} | {spent / ours:.1f} | {row['wall']:.1f} | {row['anonymous_mb']:.0f}"
            if row["code"]:
                yield f"| {row['program']} | {figures} | {row['error'] or 'cut short'} | | | |"
                continue
            errors = f"{row['relative_error']:.5f} | {row['excess']:.1e} | {row['worst_excess']:.1e}"
            yield f"| {row['program']} | {figures} | {row['layers']} | {errors} |"


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("bench-data"), help="for the files")
    parser.add_argument("--only", nargs="+", choices=SETS, default=[*SETS], help="sets of layers")
    parser.add_argument("--kohya", type=Path, help="a checkout of kohya-ss/sd-scripts")
    parser.add_argument("--kohya-python", help="the Python of its environment")
    parser.add_argument("--lycoris-python", help="the Python that has lycoris_lora")
    parser.add_argument(
        "--one-thread", action="store_true", help="OMP_NUM_THREADS=1: no processor time is lost waiting"
    )
    parser.add_argument("--time-limit", type=int, help="seconds after which another program is ended")
    parser.add_argument("--peer-memory", type=float, default=0.75 * memory() / 1e9, metavar="GB", help="more is killed")
    parser.add_argument("--small", action="store_true", help="small models in a folder of their own: does all work?")
    return parser.parse_args()


def main() -> None:
    """Run what was asked for."""
    options = parse()
    options.folder.mkdir(parents=True, exist_ok=True)
    if (options.kohya is None) != (options.kohya_python is None) or not shutil.which("timeout"):
        sys.exit("--kohya and --kohya-python belong together")
    bench = Bench(options)
    results = {
        "machine": machine(options.folder, options.lycoris_python),
        "command": "python " + " ".join([Path(sys.argv[0]).as_posix(), *sys.argv[1:]]),
        "sets": [bench.measure(name) for name in options.only],
    }
    (options.folder / "lora.json").write_text(json.dumps(results, indent=1) + "\n")
    text = "\n".join(markdown(results))
    (options.folder / "lora.md").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
