"""The most memory that tensors take at once while a function runs."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch.profiler import ProfilerActivity, profile

from octify.bench.clock import Call
from octify.optimize.native import release_all

MIB = 2**20


def peak_memory(call: Call, device: torch.device) -> float:
    """MiB allocated above what was there before, what octify's kernels keep between calls included; no weights."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated(device) - before) / MIB
    release_all()
    with _hushed(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        call()
    events: Any = cast(Any, found).profiler.kineto_results.events()
    changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    held = most = 0
    for _, change in changes:
        held += change
        most = max(most, held)
    return most / MIB


@contextmanager
def _hushed() -> Generator[None]:
    """Without what the profiler's library writes about itself to the process's standard error."""
    sys.stderr.flush()
    kept = os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)
