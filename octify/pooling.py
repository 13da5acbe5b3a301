"""Pooling on windows over both bands."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from octify.errors import ConversionError
from octify.ops import halve

_POOLS: dict[str, tuple[Any, Any, Any]] = {
    "max": (F.max_pool1d, F.max_pool2d, F.max_pool3d),
    "average": (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d),
}
_MODULES: dict[str, tuple[type[nn.Module], type[nn.Module], type[nn.Module]]] = {
    "max": (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d),
    "average": (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d),
}


@dataclass(frozen=True)
class Window:
    """A pooling's geometry, as PyTorch's modules write it; numbers stand for all axes."""

    kind: str
    kernel: int | Sequence[int]
    stride: int | Sequence[int]
    padding: int | Sequence[int] = 0
    dilation: int | Sequence[int] = 1
    ceil_mode: bool = False
    count_include_pad: bool = True
    divisor: int | None = None
    dims: int = 2

    def checked(self, return_indices: bool) -> Window:
        """The window itself.

        Raises:
            ConversionError: indices are asked for; they have no meaning on bands.
        """
        if return_indices:
            raise ConversionError("a pooling that returns indices cannot be split")
        return self

    def axis(self, value: int | Sequence[int], index: int) -> int:
        """One axis' number."""
        if isinstance(value, int):
            return value
        return int(value[index if len(value) > 1 else 0])

    def module(self) -> nn.Module:
        """The same as PyTorch's module."""
        made: Any = _MODULES[self.kind][self.dims - 1]
        if self.kind == "max":
            return made(self.kernel, self.stride, self.padding, self.dilation, ceil_mode=self.ceil_mode)
        divisor = () if self.dims == 1 else (self.divisor,)
        return made(self.kernel, self.stride, self.padding, self.ceil_mode, self.count_include_pad, *divisor)

    def __call__(self, x: Tensor) -> Tensor:
        """Pools a dense map."""
        pool = _POOLS[self.kind][self.dims - 1]
        if self.kind == "max":
            return pool(x, self.kernel, self.stride, self.padding, self.dilation, self.ceil_mode)
        if self.dims == 1 or self.divisor is None:
            return pool(x, self.kernel, self.stride, self.padding, self.ceil_mode, self.count_include_pad)
        return pool(x, self.kernel, self.stride, self.padding, self.ceil_mode, self.count_include_pad, self.divisor)


class OctPool(nn.Module):
    """A pooling of both bands: (N, Ch, H, W) and (N, Cl, ⌈H/2⌉, ⌈W/2⌉) → the same of the pooled size.

    The low band is pooled by the window that covers what the source's two windows cover.
    """

    def __init__(self, window: Window) -> None:
        super().__init__()
        self.window = window
        spatial = min(2, window.dims)
        axes = range(window.dims)
        split = [index >= window.dims - spatial for index in axes]
        stride = [window.axis(window.stride, index) for index in axes]
        span = [window.axis(window.dilation, i) * (window.axis(window.kernel, i) - 1) for i in axes]
        pad = [window.axis(window.padding, index) for index in axes]
        first = [-((pad[i] + 1) // 2) if split[i] else -pad[i] for i in axes]
        last = [(stride[i] + span[i] - pad[i]) // 2 if split[i] else span[i] - pad[i] for i in axes]
        self.split = tuple(split)
        self.low_stride = tuple(stride)
        self.low_kernel = tuple(b - a + 1 for a, b in zip(first, last, strict=True))
        self.left = tuple(-a for a in first)
        self.reach = tuple(last)

    def extra_repr(self) -> str:
        """The window on each grid."""
        return f"{self.window}, low kernel {self.low_kernel}, stride {self.low_stride}, padding {self.left}"

    def forward(self, high: Tensor, low: Tensor) -> tuple[Tensor, Tensor]:
        """The pooled bands."""
        pooled = self.window(high) if high.shape[1] else carrier(self.window, high)
        return pooled, self.pool_low(low, pooled.shape[2:])

    def pool_low(self, low: Tensor, size: Sequence[int]) -> Tensor:
        """The pooled low band for a pooled high band of this size."""
        wanted = [halve([n])[0] if split else n for n, split in zip(size, self.split, strict=True)]
        pool = _POOLS[self.window.kind][self.window.dims - 1]
        include = () if self.window.kind == "max" else (False, self.window.count_include_pad)
        sizes = low.shape[2:]
        plain = all(
            (n + 2 * left - kernel) // stride + 1 == want and 2 * left <= kernel
            for n, left, kernel, stride, want in zip(
                sizes, self.left, self.low_kernel, self.low_stride, wanted, strict=True
            )
        )
        if plain and self.window.kind == "max":
            return pool(low, self.low_kernel, self.low_stride, self.left)
        if plain:
            return pool(low, self.low_kernel, self.low_stride, self.left, *include)
        pads: list[int] = []
        for n, left, stride, reach, want in reversed(
            list(zip(sizes, self.left, self.low_stride, self.reach, wanted, strict=True))
        ):
            pads += [left, stride * (want - 1) + reach - (n - 1)]
        return pool(F.pad(low, pads, "replicate"), self.low_kernel, self.low_stride)


def carrier(window: Window, high: Tensor) -> Tensor:
    """The size of the pooled map without channels."""
    probe = window(high.new_zeros((1, 1, *high.shape[2:])))
    return high.new_empty((high.shape[0], 0, *probe.shape[2:]))


class Twin(nn.Module):
    """One module a band, for what changes a map's size; a high band without channels only takes the new size."""

    def __init__(self, high: nn.Module | None, low: nn.Module) -> None:
        super().__init__()
        self.high, self.low = high, low

    def forward(self, high: Tensor, low: Tensor) -> tuple[Tensor, Tensor]:
        """Both results."""
        if self.high is not None:
            return self.high(high), self.low(low)
        probe = self.low(high.new_zeros((1, low.shape[1], *high.shape[2:])))
        return high.new_empty((high.shape[0], 0, *probe.shape[2:])), self.low(low)
