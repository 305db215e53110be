"""The benchmark runs from end to end, on tiny shapes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "bench_all.py"
STAGES = ["bake", "merge", "linear", "step", "factors"]


def run(*arguments):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True, env=environment, check=False
    )


def test_a_dry_run_times_every_arm(tmp_path):
    done = run("--dry-run", "--output", str(tmp_path))
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "results.json").read_text())
    assert found["facts"]["correct"] == sorted(STAGES)
    assert all(found["facts"]["checks"].values())
    missing = {row["arm"] for row in found["rows"] if "failed" in row or "skipped" in row}
    assert missing <= {
        "PEFT merge",
        "PEFT safe_merge (diffusers' fuse_lora)",
        "PEFT, eager",
        "LyCORIS merged weights",
        "U-Net",
    }
    timed = {(row["stage"], row["arm"].split(",")[0]) for row in found["rows"] if "ms" in row}
    assert {("bake", "ours"), ("merge", "ours"), ("linear", "ours"), ("factors", "ours")} <= timed
    assert ("step", "ours") in timed or "U-Net" in missing  # which diffusers builds
    assert {("merge", "ours exact"), ("merge", "ours fast"), ("linear", "PEFT order"), ("bake", "addmm loop")} <= timed
    assert all(row["ms"] > 0 for row in found["rows"] if "ms" in row)
    report = (tmp_path / "table.txt").read_text()
    assert "of floor" in report
    assert "times as fast" in report
    assert report.count("not measured") >= 10


def test_the_bars_are_checked(tmp_path):
    from bench import Bench
    from table import bars

    bench = Bench(tmp_path, device="cpu", dry=False, budget=1)

    def add(case, arm, ms, of_floor=None):
        bench.note(case, arm, ms=ms, spread=0.01, floor_ms=None, of_floor=of_floor)

    for case, arm, ms, share in (
        ("sdxl rank 16 x 1", "ours", 2.6, 0.83),
        ("sdxl rank 16 x 4", "ours", 3.2, 0.7),
        ("sdxl rank 16 x 1", "PEFT merge", 50.0, None),
        ("sdxl rank 16 x 1", "addmm loop", 5.0, None),
        ("788 matrices, rank 32", "ours", 200.0, None),
        ("sdxl 77x2x3 rank 16 forward", "ours", 1.0, None),
        ("sdxl 77x2x3 rank 16 forward", "ours, plain", 0.9, None),
        ("sdxl 77x2x3 rank 16 forward", "PEFT order", 1.3, None),
    ):
        add(case, arm, ms, share)
    said = dict(line.rsplit(maxsplit=1) for line in bars(bench) if line.endswith(("met", "missed")))
    met = {line.split("  ")[0]: word for line, word in said.items()}
    assert met == {
        "bake of SDXL over the copy bandwidth": "met",
        "bake of SDXL beside PEFT's merge": "met",
        "bake of SDXL beside an addmm loop": "missed",
        "four LoRAs beside one": "missed",
        "seconds for the factors of SDXL": "met",
    }
    assert bars(bench)[-2:] == [
        "LoRA layers slower than ours, plain: 1 of 1: sdxl 77x2x3 rank 16 forward",
        "LoRA layers slower than PEFT order: 0 of 1",
    ]


def test_what_is_wrong_is_not_timed(tmp_path, monkeypatch):
    import bench_all
    import gate

    monkeypatch.setattr(gate, "_gains", lambda _: False)
    monkeypatch.setattr(gate, "_products_of_models", lambda _: 1 / 0)
    assert bench_all.main(["--dry-run", "--only", "bake,merge", "--output", str(tmp_path)]) == 1
    found = json.loads((tmp_path / "results.json").read_text())
    assert [(row["case"], row["failed"]) for row in found["rows"]] == [
        ("bake", "wrong results: not timed"),
        ("merge", "wrong results: not timed"),
    ]


def test_without_a_gpu_it_says_so(tmp_path, capsys):
    import bench_all
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(SystemExit) as stop:
        bench_all.main(["--output", str(tmp_path)])
    assert stop.value.code == 2
    assert "--dry-run" in capsys.readouterr().err
