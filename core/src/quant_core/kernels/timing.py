"""How kernels are timed: cold weights, contestants interleaved, medians.

Calls go over so many copies of the weights that together they exceed the last cache several times.
All contestants run in turn, round after round, so a slow moment of the machine slows all alike;
reported is the median time per call. On a GPU the calls of one contestant are one CUDA graph:
launch gaps count, the host does not. On a CPU the host is all there is.
"""

from __future__ import annotations

import itertools
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

__all__ = ["captured", "copies_for", "host_us", "interleaved", "interleaved_cpu", "medians"]

COLD_BYTES = 150e6  # three times the L2 cache of an H100, and more than most processors cache
Call = Callable[[], Tensor]


def copies_for(nbytes: float) -> int:
    """Copies of weights of ``nbytes`` that make a round cold."""
    return max(2, math.ceil(COLD_BYTES / max(nbytes, 1)))


def captured(calls: Sequence[Call]) -> tuple[torch.cuda.CUDAGraph, list[Tensor]]:
    """A graph of all calls, and what it writes. Runs two of them first."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for call in calls[:2]:
            call()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = [call() for call in calls]
    return graph, outputs


def interleaved(
    graphs: Mapping[str, tuple[torch.cuda.CUDAGraph, int]], *, rounds: int = 9, ms: float = 1.5
) -> dict[str, float]:
    """Median microseconds per call.

    Args:
        graphs: name -> (graph, calls in it).
        ms: least time of one contestant in one round.
    """
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    repeats = {}
    for name, (graph, _) in graphs.items():
        graph.replay()
        start.record()
        graph.replay()
        stop.record()
        torch.cuda.synchronize()
        repeats[name] = max(1, math.ceil(ms / max(start.elapsed_time(stop), 1e-3)))
    times: dict[str, list[float]] = {name: [] for name in graphs}
    for _ in range(rounds):
        for name, (graph, calls) in graphs.items():
            start.record()
            for _ in range(repeats[name]):
                graph.replay()
            stop.record()
            torch.cuda.synchronize()
            times[name].append(start.elapsed_time(stop) / repeats[name] / calls * 1e3)
    return {name: statistics.median(t) for name, t in times.items()}


def host_us(call: Call, count: int = 200) -> float:
    """Microseconds the host needs to enqueue one call; least of five runs."""
    for _ in range(10):
        call()
    best = math.inf
    for _ in range(5):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(count):
            call()
        best = min(best, time.perf_counter() - start)
        torch.cuda.synchronize()
    return best / count * 1e6


def interleaved_cpu(
    calls: Mapping[str, Sequence[Call]], *, rounds: int = 7, ms: float = 20.0
) -> dict[str, float]:
    """Median microseconds per call on the host; each contestant goes over its copies in turn."""
    turns = {name: itertools.cycle(thunks) for name, thunks in calls.items()}
    repeats = {}
    for name, turn in turns.items():
        next(turn)()
        start = time.perf_counter()
        next(turn)()
        took = max(time.perf_counter() - start, 1e-6)
        repeats[name] = max(1, min(200, math.ceil(ms / 1e3 / took)))
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, turn in turns.items():
            start = time.perf_counter()
            for _ in range(repeats[name]):
                next(turn)()
            times[name].append((time.perf_counter() - start) / repeats[name] * 1e6)
    return {name: statistics.median(t) for name, t in times.items()}


def medians(calls: Mapping[str, Sequence[Call]], device: str) -> dict[str, float]:
    """Median microseconds per call of each contestant, on ``device``."""
    if torch.device(device).type != "cuda":
        return interleaved_cpu(calls)
    graphs = {name: (captured(thunks)[0], len(thunks)) for name, thunks in calls.items()}
    return interleaved(graphs)
