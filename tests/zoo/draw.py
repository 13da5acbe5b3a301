"""Random weights quickly: large tensors repeat a million numbers, for drawing takes a tenth of a network's census."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

PERIOD = 1_048_583  # a prime, so that no two channels are alike
LARGE = 1 << 16
STEP = 7_919  # from where one tensor begins to where the next does


@contextmanager
def drawn_quickly() -> Generator[None, None, None]:
    """While active, what fills a large float32 tensor with random numbers takes them from a few."""
    dice = torch.Generator().manual_seed(0)
    starts = itertools.count(0, STEP)
    pools = {"uniform_": torch.rand(PERIOD, generator=dice), "normal_": torch.randn(PERIOD, generator=dice)}

    def fill(x: Tensor, pool: Tensor, factor: float, offset: float) -> Tensor:
        pool = torch.roll(pool, next(starts) % PERIOD) * factor + offset
        for part in x.detach().view(-1).split(PERIOD):
            part.copy_(pool[: len(part)])
        return x

    def uniform(x: Tensor, low: float = 0.0, high: float = 1.0) -> Tensor:
        return fill(x, pools["uniform_"], high - low, low)

    def normal(x: Tensor, mean: float = 0.0, std: float = 1.0) -> Tensor:
        return fill(x, pools["normal_"], std, mean)

    def stretched(x: Tensor) -> Tensor:
        """Numbers between -1 and 1 that were about to become normal ones."""
        return x.mul_(1.25)

    with ExitStack() as stack:
        for name, quick in (("uniform_", uniform), ("normal_", normal), ("erfinv_", stretched)):
            stack.enter_context(patch.object(Tensor, name, _or_real(quick, getattr(Tensor, name))))
        yield


def _or_real(quick: Callable[..., Tensor], real: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def method(x: Tensor, *args: Any, generator: Any = None, **named: Any) -> Tensor:
        large = x.numel() >= LARGE and x.dtype == torch.float32 and x.device.type == "cpu" and x.is_contiguous()
        if large:
            return quick(x, *args, **named)
        return real(x, *args, **named) if generator is None else real(x, *args, generator=generator, **named)

    return method
