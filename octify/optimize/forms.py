"""Functions that appear as nodes in an optimised graph, in the form that any backend can read."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from octify.pooling import OctPool
from octify.resample import pad_same, up_to
from octify.routes import Route, enter, leave


def join(highs: Sequence[Tensor], lows: Sequence[Tensor], spatial: int = 2, act: str = "") -> Tensor:
    """The sum of maps (N, C, H, W) and of upsampled maps (N, C, ⌈H/2⌉, ⌈W/2⌉), then an activation.

    `lows` are upsampled as one sum. The last of `highs`, a convolution where one is there, is added last: so runtimes
    add and activate inside that convolution.
    """
    *first, last = highs
    terms = list(first)
    if lows:
        terms.append(up_to(reduce(torch.add, lows), last.shape[-spatial:]))
    total = reduce(torch.add, [*terms, last])
    return ACTS[act](total) if act else total


def hardtanh_six(x: Tensor) -> Tensor:
    """ReLU6."""
    return F.hardtanh(x, 0.0, 6.0)


# Activations that a convolution's kernel can compute on its way out, as oneDNN and its PyTorch operators call them.
ACTS: dict[str, Any] = {
    "relu": F.relu,
    "relu6": hardtanh_six,
    "silu": F.silu,
    "hardswish": F.hardswish,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "hardsigmoid": F.hardsigmoid,
}


class Enter(nn.Module):
    """What a path does to its map before the convolution."""

    def __init__(self, route: Route) -> None:
        super().__init__()
        self.route = route

    def forward(self, x: Tensor, size: Sequence[int]) -> Tensor:
        """`size` is the high output's, on the halved axes."""
        return enter(self.route, x, size)


class Leave(nn.Module):
    """What a path does to its map after the convolution."""

    def __init__(self, route: Route) -> None:
        super().__init__()
        self.route = route

    def forward(self, x: Tensor, size: Sequence[int]) -> Tensor:
        """`size` is the high output's, on the halved axes."""
        return leave(self.route, x, size)


class PadSame(nn.Module):
    """TensorFlow's "same" padding before a convolution."""

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.geometry = (conv.kernel_size, conv.stride, conv.dilation)

    def forward(self, x: Tensor) -> Tensor:
        """x (N, C, H, W)."""
        return pad_same(x, *self.geometry)


class OutSize(nn.Module):
    """An octave convolution's output size on the halved axes, for its high input."""

    def __init__(self, halved: Sequence[Any]) -> None:
        super().__init__()
        self.halved = tuple(halved)

    def forward(self, high: Tensor) -> tuple[int, ...]:
        """Of an input (N, C, H, W) or one that has its size."""
        return tuple(
            axis.out_size(size) for axis, size in zip(self.halved, high.shape[-len(self.halved) :], strict=True)
        )


class LowPool(nn.Module):
    """What a pooling of both bands does to the low one."""

    def __init__(self, pool: OctPool) -> None:
        super().__init__()
        self.pool = pool

    @property
    def halves(self) -> bool:
        """Whether it averages 2 by 2 positions, side by side."""
        pool = self.pool
        geometry = (pool.low_kernel, pool.low_stride, pool.left)
        return pool.window.kind == "average" and pool.window.divisor is None and geometry == ((2, 2), (2, 2), (0, 0))

    @property
    def takes_greatest(self) -> bool:
        """Whether it takes the greatest value of windows over two axes."""
        return self.pool.window.kind == "max" and len(self.pool.low_kernel) == 2

    def forward(self, low: Tensor, pooled: Tensor) -> Tensor:
        """`pooled` is the pooled high band, whose size the result fits."""
        return self.pool.pool_low(low, pooled.shape[2:])


def empty_high(low: Tensor, size: Sequence[int]) -> Tensor:
    """A high band of no channels, which carries the size."""
    return low.new_empty((low.shape[0], 0, *low.shape[2 : low.dim() - len(size)], *size))
