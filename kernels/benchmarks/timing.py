"""How long something takes: CUDA events on a GPU, a clock on a CPU."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch


class Time(NamedTuple):
    """Milliseconds: median, and half of the range between the quartiles."""

    median: float
    spread: float


def measure(work: Callable[[], Any], device: str, *, repeats: int = 20, warm_up: int = 3, budget: float = 8.0) -> Time:
    """Median of so many runs; fewer if they take more than `budget` seconds."""
    times: list[float] = []
    begin = time.monotonic()
    for turn in range(repeats + warm_up):
        spent = _once(work, device)
        if turn >= warm_up:
            times.append(spent)
        if time.monotonic() - begin > budget and times:
            break
    times.sort()
    quartiles = times[len(times) // 4], times[(3 * len(times)) // 4]
    return Time(times[len(times) // 2], (quartiles[1] - quartiles[0]) / 2)


def _once(work: Callable[[], Any], device: str) -> float:
    if device == "cpu":
        start = time.perf_counter()
        work()
        return 1e3 * (time.perf_counter() - start)
    before, after = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    before.record()
    work()
    after.record()
    torch.cuda.synchronize()
    return before.elapsed_time(after)


def as_graph(work: Callable[[], Any], device: str) -> Callable[[], Any]:
    """The same work replayed from a CUDA graph, where launches cost nothing; itself on a CPU."""
    if device == "cpu":
        return work
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            work()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph.replay
