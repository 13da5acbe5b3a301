"""The most memory that tensors take at once while a function runs."""

from __future__ import annotations

import gc
from typing import Any, cast

import torch
from torch.profiler import ProfilerActivity, profile

from octify.bench.clock import Call

MIB = 2**20


def peak_memory(call: Call, device: torch.device) -> float:
    """MiB allocated by PyTorch above what was there before; weights are not in it."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated(device) - before) / MIB
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        call()
    events: Any = cast(Any, found).profiler.kineto_results.events()
    changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    held = most = 0
    for _, change in changes:
        held += change
        most = max(most, held)
    return most / MIB
