"""Measure a sweep of eight SD1.5 merges: one after another, and on two workers.

    python tools/bench_sweep.py --folder bench-data --method dare-ties

commands        eight times `sdops build RECIPE --set density=...`, as one does it without sweeps
one core        one command, builds one after another, each with one thread
one worker      one command, builds one after another, each with a thread per core
two workers     one command, two processes with one thread each

All but the first also measure the distances of the results for the sheet. Every round deletes what it wrote. "CPU s"
are those of all processes: where they are much less than the wall's seconds times the workers, it waits for the disk.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

from bench_recipe import prepare
from measure import run

SDOPS = [sys.executable, "-m", "sdops"]
RECIPE = """
name = "swept"
[inputs]
base = "base.safetensors"
one = "one.safetensors"
two = "two.safetensors"
[parameters]
density = 0.5
[[steps]]
verb = "merge"
method = "{method}"
models = ["one", "two"]
base = "base"
density = "$density"
"""


def ways(recipe: Path, folder: Path, values: list[str]) -> dict[str, list[list[str]]]:
    """Name -> the commands that it takes to make a result for each value."""
    build = [*SDOPS, "build", str(recipe), "-q"]
    sweep = [*build, "--set", f"density={','.join(values)}", "-o", str(folder)]
    single = [[*build, "--set", f"density={value}", "-o", str(folder / f"{value}.safetensors")] for value in values]
    return {
        "commands": single,
        "one core": [[*sweep, "--workers", "1", "--jobs", "1"]],
        "one worker": [[*sweep, "--workers", "1"]],
        "two workers": [[*sweep, "--workers", "2"]],
    }


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("bench-data"))
    parser.add_argument("--method", default="dare-ties", help="one with `density`")
    parser.add_argument("--values", default="0.1,0.2,0.3,0.4,0.5,0.6,0.7,0.8", help="of `density`")
    parser.add_argument("--ways", default="commands,one core,one worker,two workers")
    options = parser.parse_args()
    folder: Path = options.folder
    prepare(folder)
    recipe, results = folder / "swept.toml", folder / "swept"
    recipe.write_text(RECIPE.format(method=options.method))
    for name, commands in ways(recipe, results, options.values.split(",")).items():
        if name not in options.ways.split(","):
            continue
        results.mkdir()
        costs = [run(command, environment={"SDOPS_CACHE": str(folder / "cache")}) for command in commands]
        written = len(list(results.glob("*.safetensors")))
        shutil.rmtree(results)
        wall, cpu = sum(cost.wall for cost in costs), sum(cost.user + cost.system for cost in costs)
        print(f"{name}: {wall:.1f} s, {cpu:.1f} CPU s, {written} files {costs[-1].error}", flush=True)


if __name__ == "__main__":
    main()
