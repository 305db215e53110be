"""How runs end before their time: Ctrl-C, too little memory, a process that was killed while it wrote its log."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys

import pytest
import torch

from sdops.errors import SdopsError
from sdops.training.interruption import Interruption
from sdops.training.optimizer import Optimizer
from tests.training.test_bars import tensors

SETTINGS = {"steps": 4, "rank": 2, "lr": 1e-3, "save_dtype": "fp32", "validate_every": 2, "validation": 1, "ema": 0.5}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_goes_on_as_if_nothing_had_been(train, tmp_path, monkeypatch, number):
    class Ended(BaseException):
        pass

    def end(*_):
        raise Ended

    plain, steps, said = Optimizer.step, [], []

    def interrupted(self, loss):
        steps.append(1)
        if len(steps) == 3:
            signal.raise_signal(number)  # in the middle of a step
        plain(self, loss)

    train("lora", **SETTINGS, output=str(tmp_path / "whole.safetensors"))
    usual = signal.signal(number, end)
    try:
        monkeypatch.setattr(Optimizer, "step", interrupted)
        with pytest.raises(Ended):
            train("lora", **SETTINGS, say=said.append)
        monkeypatch.setattr(Optimizer, "step", plain)
        assert signal.getsignal(number) is end
    finally:
        signal.signal(number, usual)
    assert len(steps) == 3
    assert said[-2:] == [
        "ending after this step; once more ends at once",
        "what was learnt in 3 steps is saved; `--resume` goes on",
    ]
    assert (tmp_path / "out-step000003.safetensors").exists()
    assert not (tmp_path / "out.safetensors").exists()
    train("lora", **SETTINGS, resume=True)
    for name in ("", ".state"):
        assert tensors(tmp_path / f"out{name}.safetensors") == tensors(tmp_path / f"whole{name}.safetensors")


def test_the_second_signal_acts_at_once():
    told = []
    with Interruption(lambda: told.append(1)) as interruption:
        signal.raise_signal(signal.SIGINT)
        assert interruption.came
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert told == [1]


def test_too_little_memory_is_told_with_what_helps(train, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(Optimizer, "step", full)
    with pytest.raises(SdopsError, match=r"memory of `cpu` is not enough; this run needs about [\d.]+ MB") as caught:
        train("lora", steps=1, rank=2, batch=4, validate_every=0, dtype="fp32")
    assert caught.value.hint == (
        "`--batch 2 --accumulate 2`, `--checkpointing`, `--dtype bf16`, a `--resolution` below 32"
    )


def test_a_log_that_was_cut_off_does_not_stop_anybody_from_going_on(train, tmp_path):
    train("lora", **SETTINGS, until=2)
    log = tmp_path / "out.jsonl"
    with log.open("a", encoding="utf-8") as file:
        file.write('{"step": 2, "lo')
    train("lora", **SETTINGS, resume=True)
    found = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    assert [line["step"] for line in found if "loss" in line] == [1, 2, 3, 4]


def test_a_command_ends_without_complaints_of_libraries(tiny, circles, tmp_path):
    given = ["--bucket-step", "8", "--rank", "2", "--steps", "1", "--validate-every", "0"]
    command = [sys.executable, "-m", "sdops", "train", "lora", "--model", str(tiny), "--images", str(circles), *given]
    done = subprocess.run(
        [*command, "-o", str(tmp_path / "out.safetensors")],
        check=True,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONWARNINGS": "ignore"},
    )
    assert "out.safetensors" in done.stdout
    assert "leaked" not in done.stderr
    assert done.stderr.rstrip().endswith("shows the curves")
