"""Timing two functions side by side."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

Call = Callable[[], Any]
Progress = Callable[[str], None]


@dataclass(frozen=True)
class Timing:
    """Latencies of one call in ms: the median, the least, and the quartiles around the median."""

    median: float
    least: float
    quartiles: tuple[float, float]

    @classmethod
    def of(cls, seconds: list[float]) -> Timing:
        """From single measurements in seconds."""
        values = [1000 * value for value in seconds]
        low, middle, high = statistics.quantiles(values, n=4) if len(values) > 1 else values * 3
        return cls(middle, min(values), (low, high))


def clock_of(device: torch.device) -> Callable[[Call], float]:
    """Measures one call in seconds: by events on a CUDA device, else by the wall clock."""
    return _by_events if device.type == "cuda" else _by_wall


def _by_wall(call: Call) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _by_events(call: Call) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1000


def interleave(calls: list[Call], rounds: int, warmup: int, clock: Callable[[Call], float]) -> list[list[float]]:
    """Seconds of each call, one list a call: the calls take turns, every other round in the opposite order."""
    for _ in range(warmup):
        for call in calls:
            call()
    times: list[list[float]] = [[] for _ in calls]
    for turn in range(rounds):
        order = list(range(len(calls)))
        for index in order if turn % 2 == 0 else reversed(order):
            times[index].append(clock(calls[index]))
    return times
