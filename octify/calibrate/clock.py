"""How long a calibration will take, from what one pass of the dense network and one matrix product take here."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor

from octify.calibrate.least_squares import rows_for
from octify.calibrate.problems import can_fit
from octify.calibrate.solve import STRENGTHS
from octify.graph import shape_of, value_of
from octify.trace import Trace

SIDE = 512  # of the matrices that are multiplied to see how fast that is
OVERHEAD = 0.03  # seconds a layer, whatever its size


def fit_seconds(trace: Trace, images: int) -> float:
    """About how long it takes to fit every layer once: Gram matrices of the sampled rows, and their solutions."""
    return sum(_layer_flops(trace, node, images) for node in trace.nodes) / _flops() + OVERHEAD * sum(
        _fitted(trace, node) for node in trace.nodes
    )


def _fitted(trace: Trace, node: Any) -> bool:
    module = trace.module_of(node)
    return module is not None and can_fit(module)


def _layer_flops(trace: Trace, node: Any, images: int) -> float:
    if not _fitted(trace, node):
        return 0.0
    weight = cast(Tensor, trace.module_of(node).weight)  # pyright: ignore
    groups = int(getattr(trace.module_of(node), "groups", 1))
    unknowns, outputs = weight[0].numel(), len(weight)
    positions = images * math.prod((shape_of(value_of(node)) or (1, 1))[2:])
    rows = min(positions, rows_for(groups, unknowns))
    gram = groups * rows * unknowns**2 + 2 * rows * unknowns * outputs
    return gram + (len(STRENGTHS) + 1) * (groups * unknowns**3 / 3 + 4 * unknowns**2 * outputs)


def _flops() -> float:
    """Operations a second of a product in float64, the better of two."""
    a = torch.ones(SIDE, SIDE, dtype=torch.float64)
    seconds: list[float] = []
    for _ in range(2):
        start = time.perf_counter()
        torch.mm(a, a)
        seconds.append(time.perf_counter() - start)
    return 2 * SIDE**3 / min(seconds)


def in_words(seconds: float) -> str:
    """`about 40 seconds`, `about 3 minutes`."""
    if seconds < 90:
        return f"about {max(5, 5 * round(seconds / 5))} seconds"
    return f"about {round(seconds / 60)} minutes"


def telling_rest(progress: Callable[[str], None], name: str, count: int) -> Callable[[str], None]:
    """Progress in a step of so many parts: how many are done, and how long the rest takes if it goes on so."""
    start, done = time.perf_counter(), 0

    def tell(what: str) -> None:
        nonlocal done
        done += 1
        rest = (time.perf_counter() - start) / done * (count - done)
        left = f", {in_words(rest)} left" if done > 2 and rest > 3 else ""
        progress(f"{name} {done}/{count}{left}: {what}")

    return tell
