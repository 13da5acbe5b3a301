"""Functions that appear as nodes in an optimised graph, in the form that any backend can read."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from octify.norms import band_moments
from octify.ops import halve
from octify.pooling import OctPool, Window, carrier
from octify.resample import pad_same, pool_low, up_to
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
    return activate(total, act) if act else total


def activate(x: Tensor, act: str) -> Tensor:
    """An activation by its name, behind which its numbers stand.

    >>> activate(torch.tensor([-2.0, 2.0]), "leaky_relu 0.5")
    tensor([-1.,  2.])
    """
    name, *numbers = act.split()
    return ACTS[name](x, *map(float, numbers))


def gelu_tanh(x: Tensor) -> Tensor:
    """GELU by tanh."""
    return F.gelu(x, approximate="tanh")


# Activations that a convolution's kernel can compute on its way out.
ACTS: dict[str, Any] = {
    "relu": F.relu,
    "hardtanh": F.hardtanh,
    "silu": F.silu,
    "hardswish": F.hardswish,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "hardsigmoid": F.hardsigmoid,
    "leaky_relu": F.leaky_relu,
    "elu": F.elu,
    "gelu": F.gelu,
    "gelu_tanh": gelu_tanh,
    "mish": F.mish,
}


class Affine(nn.Module):
    """`scale · x + shift`, by channel (C,); x (N, C, …)."""

    scale: Tensor
    shift: Tensor

    def __init__(self, scale: Tensor, shift: Tensor) -> None:
        super().__init__()
        self.register_buffer("scale", scale)
        self.register_buffer("shift", shift)

    def forward(self, x: Tensor) -> Tensor:
        """As the class says."""
        scale, shift = (row.view(-1, *(1,) * (x.dim() - 2)) for row in (self.scale, self.shift))
        return torch.addcmul(shift, x, scale)


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


class Carrier(nn.Module):
    """What a pooling of both bands gives of a high band without channels: its new size."""

    def __init__(self, window: Window) -> None:
        super().__init__()
        self.window = window

    def forward(self, high: Tensor) -> Tensor:
        """high (N, 0, H, W)."""
        return carrier(self.window, high)


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

    def forward(self, low: Tensor, pooled: Tensor) -> Tensor:
        """`pooled` is the pooled high band, whose size the result fits."""
        return self.pool.pool_low(low, pooled.shape[2:])


def empty_high(low: Tensor, size: Sequence[int]) -> Tensor:
    """A high band of no channels, which carries the size."""
    return low.new_empty((low.shape[0], 0, *low.shape[2 : low.dim() - len(size)], *size))


def grid_of(x: Tensor) -> tuple[int, ...]:
    """A map's height and width."""
    return tuple(x.shape[2:])


def half_of(x: Tensor) -> tuple[int, ...]:
    """Those of its low band."""
    return halve(x.shape[2:])


def scaled_grid(x: Tensor, factors: Sequence[float]) -> tuple[int, ...]:
    """A map's height and width, each times a factor."""
    return tuple(int(length * factor) for length, factor in zip(x.shape[2:], factors, strict=True))


def last_of(x: Tensor) -> Tensor:
    """(N, C, H, W) to (N, H, W, C)."""
    return x.permute(0, 2, 3, 1)


def flat_of(x: Tensor) -> Tensor:
    """(N, C, 1, 1) to (N, C)."""
    return x.flatten(1)


def moments(bands: Sequence[Tensor], eps: float) -> Tensor:
    """What centres and scales each position of a map, or of both bands' high one: (N, 3, H, W) for `Centred`."""
    mean, factor, _ = _moments(bands, eps)
    return torch.cat([mean, factor, torch.zeros_like(mean)], 1)


def low_moments(bands: Sequence[Tensor], eps: float) -> Tensor:
    """The same for the low band: `x_l · D(1/σ) - D(μ/σ)`, around the band's own mean."""
    mean, factor, raised = _moments(bands, eps)
    own = bands[1].mean(1, keepdim=True)
    return torch.cat([own, pool_low(factor, 2), pool_low((raised - mean) * factor, 2)], 1)


def _moments(bands: Sequence[Tensor], eps: float) -> tuple[Tensor, Tensor, Tensor]:
    size = bands[0].shape[2:]
    parts = [up_to(band, size) for band in bands]
    whole = torch.cat(parts, 1)
    variance, mean = torch.var_mean(whole, 1, correction=0, keepdim=True)
    return mean, (variance + eps).rsqrt(), parts[-1].mean(1, keepdim=True)


class GroupFactors(nn.Module):
    """What a group norm multiplies each channel of each image by, and adds then, of a map or of both bands.

    (N, 2 C, 1, 1): the first band's C₁ factors, what is added to it, and the same of the second. `group` tells each
    channel's group, `scale` and `shift` are the norm's own, all three in the order of the bands.
    """

    def __init__(self, group: tuple[int, ...], eps: float, scale: Tensor, shift: Tensor) -> None:
        super().__init__()
        self.group, self.eps = group, eps
        self.affine = Affine(scale, shift)

    def forward(self, *bands: Tensor) -> Tensor:
        """One map, or the high and the low band."""
        if len(bands) > 1:
            pairs = band_moments(bands[0], bands[1], 2)
            mean, variance = (torch.cat(pair, 1) for pair in zip(*pairs, strict=True))
        else:
            variance, mean = torch.var_mean(bands[0], (2, 3), correction=0)  # pyright: ignore[reportGeneralTypeIssues]
        member: Tensor = torch.nn.functional.one_hot(torch.tensor(self.group, device=mean.device)).to(mean)
        share = member / member.sum(0)
        middle = (mean @ share) @ member.T
        spread = ((variance + (mean - middle).square()) @ share) @ member.T
        factor = self.affine.scale.to(mean) * (spread + self.eps).rsqrt()
        offset = self.affine.shift.to(mean) - middle * factor
        counts = [band.shape[1] for band in bands]
        parts = [torch.split(rows, counts, 1) for rows in (factor, offset)]
        return torch.cat([part for pair in zip(*parts, strict=True) for part in pair], 1)[..., None, None]


def by_image(x: Tensor, factors: Tensor, first: int) -> Tensor:
    """x (N, C, H, W) times C of the factors of its image, from `first` on, plus the C behind them."""
    channels = x.shape[1]
    return torch.addcmul(factors.narrow(1, first + channels, channels), x, factors.narrow(1, first, channels))


class Centred(nn.Module):
    """`((x - m₀) · m₁ + m₂) · scale + shift`, m by position and the others by channel."""

    def __init__(self, scale: Tensor, shift: Tensor) -> None:
        super().__init__()
        self.affine = Affine(scale, shift)

    def forward(self, x: Tensor, by: Tensor) -> Tensor:
        """x (N, C, H, W), by (N, 3, H, W)."""
        centre, factor, rest = (by.narrow(1, index, 1) for index in range(3))
        return self.affine((x - centre) * factor + rest)
