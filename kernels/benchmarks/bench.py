"""One run of the benchmark: where, how large, how much time is left, and what was found."""

from __future__ import annotations

import json
import platform
import subprocess
import time
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from timing import Time, measure
from torch import Tensor

OURS = "ours"  # arms that begin so are
# What an arm raises that does not work here: libraries that are missing or have changed, torch, compilers, Triton.
FAILURES: tuple[type[Exception], ...] = (
    ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, OSError, RuntimeError, TypeError,
    ValueError,
)  # fmt: skip
if find_spec("triton") is not None:
    FAILURES = (*FAILURES, import_module("triton.errors").TritonError)


class Bench:
    """Measures arms, notes rows, and saves after each.

    Args:
        folder: Where results.json goes.
        device: cuda, or cpu to try everything.
        dry: Tiny shapes and few repeats.
        budget: Seconds for the whole run.

    Attributes:
        rows: One per measurement; what failed or was skipped is a row, too.
        facts: The machine and its ceilings.
    """

    def __init__(self, folder: Path, *, device: str, dry: bool, budget: float) -> None:
        self.folder, self.device, self.dry = folder, device, dry
        self.until = time.monotonic() + budget
        self.rows: list[dict[str, Any]] = []
        self.facts: dict[str, Any] = {"python": platform.python_version(), "torch": torch.__version__, "dry_run": dry}
        self.random = torch.Generator(device).manual_seed(0)
        self._stage, self._stage_until = "", self.until

    def begin(self, stage: str, seconds: float) -> None:
        """Give a stage its share of the time."""
        self._stage, self._stage_until = stage, min(self.until, time.monotonic() + seconds)

    @property
    def late(self) -> bool:
        """Whether the stage's time is over."""
        return time.monotonic() > self._stage_until

    @property
    def on_gpu(self) -> bool:
        """Whether there are graphs, events and kernels."""
        return self.device == "cuda"

    def fits(self, nbytes: float) -> bool:
        """Whether so much memory is free."""
        return not self.on_gpu or torch.cuda.mem_get_info()[0] > 1.1 * nbytes

    def normal(self, *size: int, dtype: torch.dtype = torch.float16, scale: float = 1.0) -> Tensor:
        """Random numbers; zeros would run faster."""
        made = torch.randn(size, generator=self.random, device=self.device, dtype=torch.float32)
        return (made * scale).to(dtype)

    def note(self, case: str, arm: str, **more: Any) -> None:
        """A row without a time."""
        self.rows.append({"stage": self._stage, "case": case, "arm": arm, **more})
        self.save()

    def time(
        self, case: str, arm: str, work: Callable[[], Any], floor: float | None = None, *, calls: int = 1, **more: Any
    ) -> Time | None:
        """Measure one arm; `floor` in milliseconds is what the bytes or products of a call take at the ceilings.

        Args:
            calls: How many calls `work` makes.
            more: Said of the row beside the time; callables are asked after it was measured.
        """
        if self.late:
            self.note(case, arm, skipped="no time left")
            return None
        repeats, warm_up = (2, 1) if self.dry else (20, 3)
        left = max(self._stage_until - time.monotonic(), 1.0)
        try:
            spent = measure(work, self.device, repeats=repeats, warm_up=warm_up, budget=min(6.0, left))
        except FAILURES as error:
            self.note(case, arm, failed=f"{type(error).__name__}: {error}"[:300])
            return None
        spent = Time(spent.median / calls, spent.spread / calls)
        ratio = None if not floor else floor / spent.median
        said = {name: value() if callable(value) else value for name, value in more.items()}
        self.note(case, arm, ms=spent.median, spread=spent.spread, floor_ms=floor, of_floor=ratio, **said)
        return spent

    def made(self, case: str, arm: str, make: Callable[[], Callable[[], Any]]) -> Callable[[], Any] | None:
        """What a peer's set-up gives; None, and a row, where its package is missing or does not work here."""
        if self.late:
            self.note(case, arm, skipped="no time left")
            return None
        try:
            return make()
        except FAILURES as error:
            self.note(case, arm, failed=f"{type(error).__name__}: {error}"[:300])
            return None

    def bytes_ms(self, count: float) -> float:
        """Milliseconds that so many bytes take at the measured copy bandwidth."""
        return 1e3 * count / float(self.facts["copy_bytes_per_second"])

    def flops_ms(self, count: float) -> float:
        """Milliseconds that so many operations take at the measured rate of products in bfloat16."""
        return 1e3 * count / float(self.facts["bf16_flops"])

    def save(self) -> None:
        """Write what there is."""
        self.folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"facts": self.facts, "rows": self.rows}, indent=1)
        (self.folder / "results.json").write_text(text + "\n", encoding="utf-8")


def ceilings(bench: Bench) -> None:
    """What this GPU can do: bytes copied (read and written), products in bfloat16; its clocks are read, not set."""
    size, side = (1 << 22, 256) if bench.dry else (1 << 31, 8192)
    source = torch.ones(size, dtype=torch.uint8, device=bench.device)
    target = torch.empty_like(source)
    copy = measure(lambda: target.copy_(source), bench.device)
    a, b = (bench.normal(side, side, dtype=torch.bfloat16) for _ in range(2))
    product = measure(lambda: torch.mm(a, b), bench.device, repeats=3 if bench.dry else 20)
    bench.facts |= {
        "gpu": torch.cuda.get_device_name() if bench.on_gpu else platform.processor() or "CPU",
        "copy_bytes_per_second": 2 * size / (copy.median * 1e-3),
        "bf16_flops": 2 * side**3 / (product.median * 1e-3),
    }
    if bench.on_gpu:
        import triton

        bench.facts |= {"triton": triton.__version__, "clocks": _clocks()}
    bench.save()


def _clocks() -> str:
    query = ["nvidia-smi", "--query-gpu=clocks.sm,clocks.mem,power.limit,driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"
