"""Every kernel on one GPU: its time over its floor, and beside what people use. Nothing is downloaded.

    python kernels/benchmarks/bench_all.py --output results                 about eight minutes
    python kernels/benchmarks/bench_all.py --output results --only bake
    python kernels/benchmarks/bench_all.py --output results --dry-run       tiny shapes on the CPU: does it work at all

1. ceilings: copy bandwidth and matrix products of this GPU; 2. correctness: what is wrong is not timed; 3. the stages
bake, merge, linear, factors. PEFT and LyCORIS take part where they are installed. Writes results.json after every stage
and a table at the end; rows that lose stay in.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent / "torch-ext")]

import sdops_kernels as kernels
import shapes
from timing import Time, as_graph, measure

STAGES = ("bake", "merge", "linear", "factors")
CAPS = {"bake": 120, "merge": 100, "linear": 140, "factors": 60}  # seconds
GATE = 3e-4  # share of elements that products summed in another order may round to the other neighbour


class Bench:
    """One run: where, how large, and what was found.

    Attributes:
        rows: One per measurement.
        facts: The machine and its ceilings.
    """

    def __init__(self, folder: Path, *, dry: bool, budget: float) -> None:
        self.folder, self.dry = folder, dry
        self.device = "cpu" if dry else "cuda"
        self.until = time.monotonic() + budget
        self.rows: list[dict[str, Any]] = []
        self.facts: dict[str, Any] = {"python": platform.python_version(), "torch": torch.__version__, "dry_run": dry}
        self.random = torch.Generator(self.device).manual_seed(0)
        self._stage_until = self.until

    def begin(self, stage: str) -> None:
        """Give a stage its share of the time."""
        self._stage_until = min(self.until, time.monotonic() + CAPS[stage])

    @property
    def late(self) -> bool:
        """Whether the stage's time is over."""
        return time.monotonic() > self._stage_until

    def normal(self, *size: int, dtype: torch.dtype = torch.float16, scale: float = 1.0) -> Tensor:
        """Random numbers; zeros would run faster."""
        made = torch.randn(size, generator=self.random, device=self.device, dtype=torch.float32)
        return (made * scale).to(dtype)

    def row(self, stage: str, case: str, arm: str, spent: Time, floor: float | None = None, **more: Any) -> None:
        """Note a measurement; `floor` in milliseconds is what the bytes or the products take at the ceilings."""
        ratio = None if not floor else floor / spent.median
        own = {"stage": stage, "case": case, "arm": arm, "ms": spent.median, "spread": spent.spread}
        self.rows.append({**own, "floor_ms": floor, "of_floor": ratio, **more})
        self.save()

    def time(self, stage: str, case: str, arm: str, work: Callable[[], Any], floor: float | None = None) -> None:
        """Measure one arm; an arm that fails is a row, too."""
        if self.late:
            self.rows.append({"stage": stage, "case": case, "arm": arm, "skipped": "no time left"})
            return
        try:
            repeats = 2 if self.dry else 20
            self.row(stage, case, arm, measure(work, self.device, repeats=repeats, warm_up=1 if self.dry else 3), floor)
        except (RuntimeError, ValueError, ImportError, TypeError) as error:
            self.rows.append(
                {"stage": stage, "case": case, "arm": arm, "failed": f"{type(error).__name__}: {error}"[:300]}
            )

    def bytes_ms(self, count: float) -> float:
        """Milliseconds that so many bytes take at the measured copy bandwidth."""
        return 1e3 * count / self.facts["copy_bytes_per_second"]

    def save(self) -> None:
        """Write what there is."""
        self.folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"facts": self.facts, "rows": self.rows}, indent=1)
        (self.folder / "results.json").write_text(text + "\n", encoding="utf-8")


def ceilings(bench: Bench) -> None:
    """What this GPU can do: bytes copied (read and written), products in bfloat16."""
    size, side = (1 << 22, 256) if bench.dry else (1 << 31, 8192)
    source = torch.ones(size, dtype=torch.uint8, device=bench.device)
    target = torch.empty_like(source)
    copy = measure(lambda: target.copy_(source), bench.device)
    a, b = (bench.normal(side, side, dtype=torch.bfloat16) for _ in range(2))
    product = measure(lambda: torch.mm(a, b), bench.device, repeats=3 if bench.dry else 20)
    bench.facts |= {
        "gpu": platform.processor() or "CPU" if bench.dry else torch.cuda.get_device_name(),
        "copy_bytes_per_second": 2 * size / (copy.median * 1e-3),
        "bf16_flops": 2 * side**3 / (product.median * 1e-3),
    }
    if not bench.dry:
        import triton

        bench.facts["triton"] = triton.__version__
    bench.save()


def gate(bench: Bench) -> set[str]:
    """Stages whose kernels are right: compared with the torch functions of the same name, twice, on ragged shapes."""
    passed = set()
    if _bake_is_right(bench):
        passed.add("bake")
    if _merges_are_right(bench):
        passed.add("merge")
    x, weight, down, up = (bench.normal(*size, scale=0.1) for size in ((77, 96), (80, 96), (7, 96), (80, 7)))
    wanted = x.double() @ weight.double().T + 0.5 * (x.double() @ down.double().T @ up.double().T)
    error = (kernels.lora_linear(x, weight, None, down, up, 0.5).double() - wanted).abs().max() / wanted.abs().max()
    matrix = bench.normal(96, 64, dtype=torch.float32)
    factors = kernels.low_rank([matrix], 8)[0]
    best = torch.linalg.svdvals(matrix.double())[8:].square().sum().sqrt()
    passed |= {"linear"} if float(error) < 4e-3 else set()
    passed |= (
        {"factors"} if float((matrix - factors.up @ factors.down).double().norm()) <= 1.001 * float(best) else set()
    )
    bench.facts["correct"] = sorted(passed)
    bench.save()
    return passed


def _bake_is_right(bench: Bench) -> bool:
    weights = [bench.normal(*shape, scale=0.03) for shape in ((70, 33), (64, 128), (96, 48))]
    changes = [[kernels.LoRA(bench.normal(len(w), 5), bench.normal(5, w.shape[1]), 0.02)] for w in weights]
    outs = [[torch.full_like(w, float("nan")) for w in weights] for _ in range(3)]
    for own, backend in zip(outs, (None, None, "torch"), strict=True):
        kernels.Bake(weights, own, changes, backend=backend).run()
    wrong = sum(int((a != b).sum()) for a, b in zip(outs[0], outs[2], strict=True))
    bench.facts["bake_wrong_share"] = wrong / sum(w.numel() for w in weights)
    return wrong <= max(GATE * 20000, 2) and all(torch.equal(a, b) for a, b in zip(outs[0], outs[1], strict=True))


def _merges_are_right(bench: Bench) -> bool:
    models = [[bench.normal(*shape, scale=0.03) for shape in ((70, 33), (64, 128))] for _ in range(3)]
    outs = [[torch.full_like(w, float("nan")) for w in models[0]] for _ in range(2)]
    for own, backend in zip(outs, (None, "torch"), strict=True):
        kernels.LinearMerge(models, own, [0.5, 0.3, 0.2], backend=backend).run()
    equal = all(torch.equal(a, b) for a, b in zip(*outs, strict=True))
    for own, backend in zip(outs, (None, "torch"), strict=True):
        kernels.SparseMerge("ties", models[0], models[1:], own, density=0.3, normalize=True, backend=backend).run()
    return equal and all(torch.equal(a, b) for a, b in zip(*outs, strict=True))


def bench_bake(bench: Bench) -> None:
    """LoRAs into all layers of a model."""
    for model in ("tiny",) if bench.dry else ("SD15", "SDXL"):
        sizes = shapes.matrices(getattr(shapes, model.upper()))
        weights = [bench.normal(*size, scale=0.03) for size in sizes]
        outs = [torch.empty_like(weight) for weight in weights]
        for rank, count in ((4, 1), (16, 1), (16, 4), (64, 1), (128, 1)):
            case = f"{model} rank {rank} x {count}"
            factors = [
                [(bench.normal(o, rank, scale=0.01), bench.normal(rank, i)) for o, i in sizes] for _ in range(count)
            ]
            changes = [
                [kernels.LoRA(*own[place], 0.5, slot=slot) for slot, own in enumerate(factors)]
                for place in range(len(sizes))
            ]
            moved = sum(4 * o * i + 2 * count * rank * (o + i) for o, i in sizes)
            floor = bench.bytes_ms(moved)
            plan = kernels.Bake(weights, outs, changes)
            plan.run([1.0] * count)
            bench.time("bake", case, "ours", plan.launch if plan.backend == "triton" else plan.run, floor)
            addmm = _addmm_loop(weights, outs, factors)
            bench.time("bake", case, "addmm loop", addmm, floor)
            if not bench.dry:
                bench.time("bake", case, "addmm loop in a graph", as_graph(addmm, bench.device), floor)
            bench.time("bake", case, "PEFT order", _peft_order(weights, outs, factors), floor)
            if rank == 16 and count == 1:
                _peers_of_bake(bench, case, sizes, floor)


def _addmm_loop(weights: list[Tensor], outs: list[Tensor], factors: list[Any]) -> Callable[[], None]:
    def work() -> None:
        for place, (weight, out) in enumerate(zip(weights, outs, strict=True)):
            source = weight
            for own in factors:
                torch.addmm(source, *own[place], alpha=0.5, out=out)
                source = out

    return work


def _peft_order(weights: list[Tensor], outs: list[Tensor], factors: list[Any]) -> Callable[[], None]:
    """delta = (B A) s, W += delta: three roundings per LoRA, as PEFT's merge does it, without its modules."""

    def work() -> None:
        for place, (weight, out) in enumerate(zip(weights, outs, strict=True)):
            out.copy_(weight)
            for own in factors:
                out += (own[place][0] @ own[place][1]) * 0.5

    return work


def _peers_of_bake(bench: Bench, case: str, sizes: list[tuple[int, int]], floor: float) -> None:
    """The real modules, where their packages are installed."""

    def peft() -> Callable[[], None]:
        from peft import LoraConfig, get_peft_model

        layers = torch.nn.Sequential(*(torch.nn.Linear(i, o, bias=False, dtype=torch.float16) for o, i in sizes))
        names = [str(place) for place in range(len(sizes))]
        model = get_peft_model(layers.to(bench.device), LoraConfig(r=16, target_modules=names))

        def work() -> None:
            model.merge_adapter()
            model.unmerge_adapter()

        return work

    def lycoris() -> Callable[[], None]:
        from lycoris import LycorisNetwork, create_lycoris

        layers = torch.nn.Sequential(*(torch.nn.Linear(i, o, bias=False, dtype=torch.float16) for o, i in sizes))
        LycorisNetwork.apply_preset({"target_module": ["Linear"]})
        network = create_lycoris(layers, 1.0, linear_dim=16, linear_alpha=16, algo="lora").to(bench.device)
        return lambda: [module.get_merged_weight() for module in network.loras]

    for arm, make in (("PEFT merge + unmerge", peft), ("LyCORIS merged weights", lycoris)):
        try:
            work = make()
        except Exception as error:  # noqa: BLE001 - a peer that does not work here is told, whatever it raises
            bench.rows.append(
                {"stage": "bake", "case": case, "arm": arm, "failed": f"{type(error).__name__}: {error}"[:300]}
            )
            continue
        bench.time("bake", case, arm, work, floor)


def bench_merge(bench: Bench) -> None:
    """Linear merges, TIES and DARE of whole models."""
    sizes = shapes.matrices(shapes.TINY if bench.dry else shapes.SDXL)
    numel = sum(o * i for o, i in sizes)
    for count in (2, 3, 8):
        if not bench.dry and torch.cuda.mem_get_info()[0] < 2.2 * numel * (count + 1):
            continue
        models = [[bench.normal(*size, scale=0.03) for size in sizes] for _ in range(count)]
        outs = [torch.empty_like(x) for x in models[0]]
        weights = [Fraction(1) - (count - 1) * Fraction(7, 64), *([Fraction(7, 64)] * (count - 1))]
        floor, case = bench.bytes_ms(2 * (count + 1) * numel), f"weighted sum of {count}"
        for arm, exact in (("ours exact", True), ("ours fast", False)):
            plan = kernels.LinearMerge(models, outs, weights, exact=exact)
            bench.time("merge", case, arm, plan.launch if plan.backend == "triton" else plan.run, floor)
            if exact:
                bench.time("merge", case, "ours exact, checked", plan.run, floor)
        floats = [float(weight) for weight in weights]
        bench.time("merge", case, "eager half", lambda m=models, o=outs, w=floats: _eager(m, o, w, None), floor)
        bench.time(
            "merge", case, "eager float32", lambda m=models, o=outs, w=floats: _eager(m, o, w, torch.float32), floor
        )
        if count == 3:
            _sparse(bench, models, outs, numel)
        if count == 3 and not bench.dry:
            _compiled(bench, case, models, outs, floats)
        del models, outs


def _compiled(bench: Bench, case: str, models: list[list[Tensor]], outs: list[Tensor], weights: list[float]) -> None:
    """torch.compile of the eager loop over some of the layers; all of them take it minutes to trace."""
    few = [model[:60] for model in models]
    compiled = torch.compile(_eager)
    floor = bench.bytes_ms(2 * (len(models) + 1) * sum(x.numel() for x in few[0]))
    bench.time(
        "merge", f"{case}, 60 layers", "torch.compile", lambda: compiled(few, outs[:60], weights, torch.float32), floor
    )


def _sparse(bench: Bench, models: list[list[Tensor]], outs: list[Tensor], numel: int) -> None:
    keys = [[(place, model) for model in range(2)] for place in range(len(outs))]
    for method, passes in (("ties", 3), ("dare_linear", 1)):
        plan = kernels.SparseMerge(method, models[0], models[1:], outs, density=0.3, keys=keys)
        floor = bench.bytes_ms((6 * passes + 2) * numel)
        bench.time("merge", f"{method} of 2", "ours", plan.run, floor)

    def eager() -> None:
        for place, out in enumerate(outs):
            base = models[0][place].float()
            kept = []
            for model in models[1:]:
                change = model[place].float() - base
                border = change.abs().flatten().kthvalue(max(1, int(0.7 * change.numel()))).values
                kept.append(torch.where(change.abs() > border, change, 0))
            sign = torch.sign(sum(kept))
            out.copy_(base + sum(torch.where(change * sign > 0, change, 0) for change in kept))

    bench.time("merge", "ties of 2", "eager, kthvalue", eager)


def _eager(models: list[list[Tensor]], outs: list[Tensor], weights: list[float], dtype: torch.dtype | None) -> None:
    for place, out in enumerate(outs):
        total = models[0][place].to(dtype or out.dtype) * weights[0]
        for model, weight in zip(models[1:], weights[1:], strict=True):
            total = total + model[place].to(total.dtype) * weight
        out.copy_(total)


def bench_linear(bench: Bench) -> None:
    """One linear layer with a LoRA, forward and backward: device time from a graph, wall time eagerly."""
    choices = kernels.Choices()
    for model in ("tiny",) if bench.dry else ("sd15", "sdxl"):
        for tokens, inputs, outputs in shapes.LINEARS[model]:
            for rank in (4,) if bench.dry else (16, 64):
                if bench.late:
                    return
                _linear(bench, choices, model, tokens, inputs, outputs, rank)
    choices.save(bench.folder / "choices.json")


def _linear(
    bench: Bench, choices: kernels.Choices, model: str, tokens: int, inputs: int, outputs: int, rank: int
) -> None:
    dtype = torch.float32 if bench.dry else torch.bfloat16
    x, weight, gradient, down, up = (
        bench.normal(*size, dtype=dtype, scale=0.1)
        for size in ((tokens, inputs), (outputs, inputs), (tokens, outputs), (rank, inputs), (outputs, rank))
    )
    leaves = [part.requires_grad_() for part in (x, down, up)]
    if not bench.dry:
        choices.measure([(tokens, inputs, outputs, rank)], dtype)
    case = f"{model} {tokens}x{inputs}x{outputs} rank {rank}"
    floor = 1e3 * 2 * tokens * outputs * inputs * 2 / bench.facts["bf16_flops"]
    arms: dict[str, Callable[[], Tensor]] = {
        "frozen layer alone": lambda: torch.nn.functional.linear(x, weight),
        "ours": lambda: kernels.lora_linear(x, weight, None, down, up, 0.5, choices=choices),
        "ours plain": lambda: kernels.lora_linear(x, weight, None, down, up, 0.5),
        "PEFT order": lambda: torch.nn.functional.linear(x, weight) + ((x @ down.T) @ up.T) * 0.5,
        "Unsloth style": lambda: torch.addmm(torch.mm(x, weight.T), torch.mm(x, down.T), up.T, alpha=0.5),
    }
    if not bench.dry:
        arms["torch.compile"] = torch.compile(arms["PEFT order"])
    for arm, forward in arms.items():

        def both(forward: Callable[[], Tensor] = forward) -> None:
            torch.autograd.grad(forward(), leaves, gradient, allow_unused=True)

        bench.time("linear", f"{case} forward + backward, wall", arm, both, floor)
        if not bench.dry and arm != "torch.compile":
            bench.time(
                "linear",
                f"{case} forward, graph",
                arm,
                as_graph(lambda f=forward: f().detach(), bench.device),
                floor / 2,
            )


def bench_factors(bench: Bench) -> None:
    """The factors of all differences of a model, rank 32."""
    sizes = shapes.matrices(shapes.TINY if bench.dry else shapes.SDXL)
    sizes = sizes if bench.dry or torch.cuda.mem_get_info()[0] > 20e9 else sizes[::8]
    matrices = [bench.normal(*size, scale=1e-3) for size in sizes]
    case, rank = f"{len(sizes)} matrices", 4 if bench.dry else 32
    bench.time("factors", case, "ours", lambda: kernels.low_rank(matrices, rank))
    few = matrices[:: max(len(matrices) // 24, 1)]
    bench.time("factors", f"{len(few)} of them", "ours", lambda: kernels.low_rank(few, rank))
    bench.time(
        "factors",
        f"{len(few)} of them",
        "torch.svd_lowrank",
        lambda: [torch.svd_lowrank(m.float(), rank + 8) for m in few],
    )
    found = kernels.low_rank(few[:4], rank)
    for own, factors in zip(few[:4], found, strict=True):
        best = torch.linalg.svdvals(own.double())[rank:].square().sum().sqrt()
        error = (own.double() - factors.up.double() @ factors.down.double()).norm() / best
        bench.rows.append(
            {"stage": "factors", "case": f"error over the least possible, {tuple(own.shape)}", "ratio": float(error)}
        )


def table(bench: Bench) -> str:
    """All rows, one a line."""
    facts = bench.facts
    lines = [
        f"{facts['gpu']}, torch {facts['torch']}, Triton {facts.get('triton', 'none')}",
        f"copy {facts['copy_bytes_per_second'] / 1e12:.2f} TB/s, bf16 {facts['bf16_flops'] / 1e12:.0f} TFLOP/s",
        f"correct: {', '.join(facts['correct']) or 'nothing'}",
        "",
        f"{'case':<46} {'arm':<26} {'ms':>9} {'+-':>7} {'floor':>9} {'of floor':>8}",
    ]
    for row in bench.rows:
        name = f"{row['case']:<46} {row.get('arm', ''):<26}"
        if "ms" not in row:
            lines.append(f"{name} {row.get('failed') or row.get('skipped') or format(row['ratio'], '.5f')}")
            continue
        floor = "" if row["floor_ms"] is None else f"{row['floor_ms']:9.3f} {row['of_floor']:8.0%}"
        lines.append(f"{name} {row['ms']:9.3f} {row['spread']:7.3f} {floor}")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Run the stages that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("results"))
    parser.add_argument("--only", default=",".join(STAGES), help="stages, divided by commas")
    parser.add_argument("--budget", type=float, default=480, help="seconds")
    parser.add_argument("--dry-run", action="store_true")
    given = parser.parse_args(arguments)
    wanted = given.only.split(",")
    if unknown := set(wanted) - set(STAGES):
        parser.error(f"no stage {', '.join(sorted(unknown))}; there are {', '.join(STAGES)}")
    if not given.dry_run and not torch.cuda.is_available():
        parser.error("there is no CUDA device; --dry-run tries everything on the CPU with tiny shapes")
    bench = Bench(given.output, dry=given.dry_run, budget=given.budget)
    ceilings(bench)
    passed = gate(bench)
    work = {"bake": bench_bake, "merge": bench_merge, "linear": bench_linear, "factors": bench_factors}
    for stage in wanted:
        if stage in passed:
            bench.begin(stage)
            work[stage](bench)
        else:
            bench.rows.append({"stage": stage, "case": stage, "failed": "wrong results: not timed"})
        bench.save()
    print(table(bench))
    (given.output / "table.txt").write_text(table(bench) + "\n", encoding="utf-8")
    return 0 if set(wanted) <= passed else 1


if __name__ == "__main__":
    sys.exit(main())
