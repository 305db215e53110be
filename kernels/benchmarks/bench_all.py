"""Every kernel on one GPU: its time over its floor, and beside what people use. Nothing is downloaded.

    python kernels/benchmarks/bench_all.py --output results                 about eight minutes
    python kernels/benchmarks/bench_all.py --output results --only bake
    python kernels/benchmarks/bench_all.py --output results --dry-run       tiny shapes on the CPU: does it work at all

1. ceilings: copy bandwidth and matrix products of this GPU; 2. correctness: what is wrong is not timed; 3. all kernels
are compiled, in several processes; 4. the stages bake, merge, linear, step, factors. PEFT, LyCORIS and diffusers take
part where they are installed. Writes results.json after every row and a table at the end; rows that lose stay in.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent / "torch-ext")]

import stage_bake
import stage_factors
import stage_linear
import stage_merge
import stage_step
from bench import Bench, ceilings
from gate import gate
from table import table

STAGES = {
    "bake": stage_bake.run,
    "merge": stage_merge.run,
    "linear": stage_linear.run,
    "step": stage_step.run,
    "factors": stage_factors.run,
}
CAPS = {"bake": 90, "merge": 80, "linear": 110, "step": 90, "factors": 35}  # seconds; together with the rest, 480
COMPILE_SECONDS = 60


def main(arguments: list[str] | None = None) -> int:
    """Run the stages that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("results"))
    parser.add_argument("--only", default=",".join(STAGES), help="stages, divided by commas")
    parser.add_argument("--budget", type=float, default=480, help="seconds")
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--compile-only", action="store_true", help=argparse.SUPPRESS)  # for own child processes
    given = parser.parse_args(arguments)
    wanted = given.only.split(",")
    if unknown := set(wanted) - set(STAGES):
        parser.error(f"no stage {', '.join(sorted(unknown))}; there are {', '.join(STAGES)}")
    if not given.dry_run and not torch.cuda.is_available():
        parser.error("there is no CUDA device; --dry-run tries everything on the CPU with tiny shapes")
    bench = Bench(
        given.output,
        device="cpu" if given.dry_run else "cuda",
        dry=given.dry_run or given.compile_only,
        budget=given.budget,
    )
    ceilings(bench)
    if given.compile_only:
        return _run(bench, wanted)
    passed = gate(bench)
    if bench.on_gpu:
        _compile([stage for stage in wanted if stage in passed])
    for stage in wanted:
        if stage not in passed:
            bench.note(stage, "ours", failed="wrong results: not timed")
    _run(bench, [stage for stage in wanted if stage in passed])
    said = table(bench)
    print(said)
    (given.output / "table.txt").write_text(said + "\n", encoding="utf-8")
    return 0 if set(wanted) <= passed else 1


def _run(bench: Bench, stages: list[str]) -> int:
    for stage in stages:
        bench.begin(stage, CAPS[stage])
        STAGES[stage](bench)
    return 0


def _compile(stages: list[str]) -> None:
    """Run all stages with tiny shapes, each in a process of its own: Triton keeps what it compiles on the disk."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, "--compile-only", "--budget", str(COMPILE_SECONDS), "--output", folder]
        children = [subprocess.Popen([*command, "--only", stage], stdout=subprocess.DEVNULL) for stage in stages]
        for child in children:
            try:
                child.wait(COMPILE_SECONDS)
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()


if __name__ == "__main__":
    sys.exit(main())
