"""Measure `sdops diff` on full-size files against reading both of them.

    python tools/bench_diff.py --folder bench-data [--rounds N]

Makes SD1.5 in fp16 and a fine-tune of it in the folder (kept for the next time), and runs three commands in turn, round
after round; the first round only warms up. The floor starts Python and reads both files in threads, 1 MiB at a time
(tools/floor.py without an output). All files are in the page cache, nothing is written.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path
from statistics import median

from bench_merge import HERE, SDOPS, settle
from measure import Cost, run

READ = """
import os, sys
sys.path.insert(0, {tools!r})
import floor
opened = [os.open(path, os.O_RDONLY) for path in sys.argv[1:]]
floor._pass(opened, None, 0, max(os.fstat(fd).st_size for fd in opened), {threads})
"""
MAKE = [sys.executable, str(HERE.parent / "fixtures" / "make.py"), "full", "sd15", "--dtype", "fp16"]


def prepare(folder: Path) -> tuple[str, str]:
    """A base and a fine-tune, in which nearly every tensor differs."""
    folder.mkdir(parents=True, exist_ok=True)
    files = folder / "sd15.safetensors", folder / "sd15-tuned.safetensors"
    for path, options in zip(files, ([], ["--tuned", "1"]), strict=True):
        if not path.exists():
            subprocess.run([*MAKE, *options, "-o", str(path)], check=True, stdout=subprocess.DEVNULL)
    return str(files[0]), str(files[1])


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("bench-data"))
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    a, b = prepare(options.folder)
    threads = len(os.sched_getaffinity(0))
    commands = {
        "floor": [sys.executable, "-c", READ.format(tools=str(HERE), threads=threads), a, b],
        "a fine-tune": [*SDOPS, "diff", a, b, "--no-progress"],
        "a file with itself": [*SDOPS, "diff", a, a, "--no-progress"],
    }
    bytecode = {"PYTHONDONTWRITEBYTECODE": "", "PYTHONPYCACHEPREFIX": str(options.folder.resolve() / "bytecode")}
    costs: dict[str, list[Cost]] = {name: [] for name in commands}
    for number in range(options.rounds + 1):
        for name, command in commands.items():
            settle(options.folder, {Path(a), Path(b)})
            cost = run(command, environment=bytecode)
            if number:
                costs[name].append(cost)
    for name, found in costs.items():
        ratio = median(cost.wall / base.wall for cost, base in zip(found, costs["floor"], strict=True))
        wall, user, system = (median(getattr(cost, field) for cost in found) for field in ("wall", "user", "system"))
        own, exit_code = max(cost.anonymous_mb for cost in found), found[-1].code
        figures = f"{wall:6.2f} s {ratio:6.2f} x floor, user {user:5.2f}, system {system:5.2f}, own {own:4.0f} MB"
        print(f"{name:20} {figures}, exit code {exit_code}")


if __name__ == "__main__":
    main()
