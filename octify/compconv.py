"""CompConv, a convolution that makes its channels from a small unit, some copies and a few cheap convolutions.

Source: Zhang, Xu, Shen, "A Compact Convolution Module for Efficient Feature Learning", CVPR Workshops 2021
(arXiv 2106.10486). At depth 3, with p the channels of the smallest unit::

    b2 = conv(x)              C_in -> p        a2 = p channels of x
    b1 = conv([a2, b2])         2p -> 2p       a1 = the next 2p channels of x
    b0 = conv([a1, b1])         4p -> 4p       a0 = depthwise conv(b0)
    y  = shuffle([a2, b2, a1, b1, a0, b0])     the last channels of a0 trimmed so that C_out are left

What the paper leaves open is decided here:

- stride and padding sit in the first convolution; the others keep the size, with the same kernel, dilation and mode
  (so "reflect" needs an output that is larger than half the kernel's reach);
- the copied channels are brought to the output's size by `copies`, an average pooling where there is a stride;
- copies that the input is too narrow for are taken cyclically;
- where a0 has fewer channels than must be trimmed (only C_out 7 at depth 2; 15 to 19 and 29 at depth 3), the last of
  b0 go too;
- `shuffle_groups` is two; of a channel count that it does not divide, the first groups are one channel longer;
- no norm or activation inside, a bias in every convolution where the source has one, no groups.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from octify.errors import ConversionError

MAX_DEPTH = 3
Conv = nn.Conv1d | nn.Conv2d | nn.Conv3d


def depth_for(c_in: int, c0: int = 128) -> int:
    """The paper's depth for a layer of `c_in` input channels, 1 to 3: one more for each doubling from `c0` on.

    >>> [depth_for(channels) for channels in (3, 128, 256, 512, 2048)]
    [1, 1, 2, 3, 3]

    Raises:
        ConversionError: `c0` is less than 1.
    """
    if c0 < 1:
        raise ConversionError(f"c0 is {c0}: expected 1 or more input channels (128 is usual)")
    return min(MAX_DEPTH, max(1, int(c_in // c0).bit_length()))


def unit_channels(c_out: int, depth: int) -> int:
    """The channels p of the smallest unit, of which 2·(2^depth - 1) make the output.

    Raises:
        ConversionError: `depth` is not 1 to 3, or there are fewer output channels than units.
    """
    _check_depth(depth, least=1)
    units = 2 * (2**depth - 1)
    if c_out < units:
        raise ConversionError(
            f"depth {depth} makes the output of {units} units, found {c_out} output channels: "
            f"expected {units} or more, or a smaller depth (depth 0 is the plain convolution)"
        )
    return -(-c_out // units)


def macs_per_position(c_in: int, c_out: int, kernel: int | Sequence[int], depth: int) -> int:
    """Multiply-adds per output position; an int `kernel` stands for a square one, depth 0 for the plain convolution.

    >>> macs_per_position(128, 128, 3, depth=1) / macs_per_position(128, 128, 3, depth=0)
    0.50390625

    Raises:
        ConversionError: as `unit_channels`.
    """
    taps = kernel * kernel if isinstance(kernel, int) else math.prod(kernel)
    if depth == 0:
        return taps * c_in * c_out
    p = unit_channels(c_out, depth)
    return taps * (c_in * p + sum((2**level * p) ** 2 for level in range(1, depth)) + 2 ** (depth - 1) * p)


def shuffle_order(channels: int, groups: int) -> tuple[int, ...]:
    """For each output of a channel shuffle, the input that it is: the groups' first channels, their second ones, ...

    >>> shuffle_order(7, groups=2)
    (0, 4, 1, 5, 2, 6, 3)
    """
    rows, rest = divmod(channels, groups)
    starts = _group_starts(channels, groups)
    full = tuple(start + row for row in range(rows) for start in starts)
    return full + tuple(start + rows for start in starts[:rest])


class _CompConv(nn.Module):
    """What the three ranks share; `units` are the convolutions that make b2, b1, b0, `tail` the one that makes a0."""

    _conv: ClassVar[Callable[..., Conv]]
    _pool: ClassVar[Callable[..., Tensor]]
    _axis: ClassVar[int]  # of the channels, from the back: a map may come without its batch axis

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, ...],
        stride: int | tuple[int, ...] = 1,
        padding: str | int | tuple[int, ...] = 0,
        dilation: int | tuple[int, ...] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        c0: int = 128,
        depth: int | None = None,
        shuffle_groups: int = 2,
    ) -> None:
        super().__init__()
        usual = depth_for(in_channels, c0)
        depth = usual if depth is None else depth
        _check_depth(depth, least=0)
        if groups != 1:
            raise ConversionError(f"a CompConv has no groups, found groups={groups}: keep this convolution as it is")
        smallest = unit_channels(out_channels, depth) if depth else out_channels
        if depth and not 1 <= shuffle_groups <= out_channels:
            raise ConversionError(f"shuffle_groups is {shuffle_groups}: expected 1 to C_out = {out_channels}")
        self.in_channels, self.out_channels, self.groups = in_channels, out_channels, groups
        self.depth, self.shuffle_groups, self.padding_mode = depth, shuffle_groups, padding_mode
        self._widths = [smallest * 2**level for level in range(max(1, depth))]
        rest: dict[str, Any] = {"bias": bias, "padding_mode": padding_mode, "device": device, "dtype": dtype}
        first = self._conv(in_channels, smallest, kernel_size, stride, padding, dilation, **rest)
        self.kernel_size, self.stride, self.dilation = first.kernel_size, first.stride, first.dilation
        self.padding: str | tuple[int, ...] = first.padding
        self._pads = _copy_pads(first)
        rest |= {"dilation": self.dilation, "padding": _same_padding(first)}
        inner = [self._conv(width, width, self.kernel_size, **rest) for width in self._widths[1:]]
        self.units = nn.ModuleList([first, *inner])
        last = self._widths[-1]
        self.tail = self._conv(last, last, self.kernel_size, groups=last, **rest) if depth else None

    def extra_repr(self) -> str:
        return f"{self.in_channels}, {self.out_channels}, depth={self.depth}, shuffle_groups={self.shuffle_groups}"

    def forward(self, x: Tensor) -> Tensor:
        """(N, C_in, ...) or (C_in, ...) -> (N, C_out, ...) or (C_out, ...), of the plain convolution's size."""
        b = cast(Tensor, self.units[0](x))
        if self.tail is None:
            return b
        parts: list[Tensor] = []
        copies, start = self.copies(x) if self.depth > 1 else x, 0
        for unit, width in zip([*self.units][1:], self._widths, strict=False):
            pair = torch.cat([self._take(copies, start, width), b], self._axis)
            parts.append(pair)
            b, start = cast(Tensor, unit(pair)), start + width
        kept_a, kept_b = self._kept()
        parts += [self._take(cast(Tensor, self.tail(b)), 0, kept_a), self._take(b, 0, kept_b)]
        return self._shuffle(torch.cat(parts, self._axis))

    def copies(self, x: Tensor) -> Tensor:
        """The copied channels at the output's size, those of a2 before those of a1.

        Along an axis of stride s, output o is the mean of the s input positions about the centre of the window that the
        convolution reads for o (half positions rounded towards o·s), on a map whose edges are repeated outwards.
        So "same" padding with stride 1 copies as it is, no padding crops the borders, and kernel 3 with stride 2
        and padding 1 pools [2o, 2o + 1] in ceil mode.
        """
        count = sum(self._widths[:-1])
        x = self._take(x, 0, min(count, self.in_channels))
        if any(pad < 0 for pad in self._pads):
            x = F.pad(x, [min(pad, 0) for pad in self._pads])
        if any(pad > 0 for pad in self._pads):
            x = F.pad(x, [max(pad, 0) for pad in self._pads], mode="replicate")
        if any(step > 1 for step in self.stride):
            x = type(self)._pool(x, self.stride, self.stride)
        if count <= self.in_channels:
            return x
        return self._take(torch.cat([x] * -(-count // self.in_channels), self._axis), 0, count)

    def stands_for(self) -> tuple[tuple[int, ...], ...]:
        """For each of `units`, then the tail: the output channels that its channels become, without trimmed ones."""
        if self.tail is None:
            return (tuple(range(self.out_channels)),)
        order = shuffle_order(self.out_channels, self.shuffle_groups)
        place = {source: output for output, source in enumerate(order)}
        counts = [count for width in self._widths[:-1] for count in (width, width)] + [*self._kept()]
        ends = list(accumulate(counts))
        runs = [tuple(place[at] for at in range(end - count, end)) for count, end in zip(counts, ends, strict=True)]
        return (*runs[1::2], runs[-2])

    def _kept(self) -> tuple[int, int]:
        """How many channels of a0 and of b0 are left when the output is trimmed."""
        last, room = self._widths[-1], self.out_channels - 2 * sum(self._widths[:-1])
        return max(0, room - last), min(last, room)

    def _take(self, x: Tensor, start: int, count: int) -> Tensor:
        return x.narrow(self._axis, start, count)

    def _shuffle(self, x: Tensor) -> Tensor:
        """`x` in `shuffle_order`, by slices: an index would be one more buffer to load and to move."""
        if self.shuffle_groups == 1:
            return x
        rows, rest = divmod(self.out_channels, self.shuffle_groups)
        starts = _group_starts(self.out_channels, self.shuffle_groups)
        even = torch.stack([self._take(x, start, rows) for start in starts], self._axis)
        even = even.flatten(self._axis - 1, self._axis)
        tails = [self._take(x, start + rows, 1) for start in starts[:rest]]
        return torch.cat([even, *tails], self._axis) if rest else even


class CompConv2d(_CompConv):
    """A CompConv in place of a `nn.Conv2d`: the same arguments, channels and sizes, fewer multiply-adds.

    `c0` gives the depth by `depth_for`, which `depth` (0 to 3) overrides; depth 0 is the plain convolution.

    >>> conv = CompConv2d(256, 256, 3, padding=1, bias=False)
    >>> conv.depth, conv(torch.ones(1, 256, 7, 7)).shape
    (2, torch.Size([1, 256, 7, 7]))

    Raises:
        ConversionError: c0 < 1, a depth that is not 0 to 3, fewer output channels than units, groups.
    """

    _conv, _pool, _axis = nn.Conv2d, F.avg_pool2d, -3


class CompConv1d(_CompConv):
    """As `CompConv2d`, for maps (N, C, L)."""

    _conv, _pool, _axis = nn.Conv1d, F.avg_pool1d, -2


class CompConv3d(_CompConv):
    """As `CompConv2d`, for maps (N, C, T, H, W)."""

    _conv, _pool, _axis = nn.Conv3d, F.avg_pool3d, -4


CompConv = CompConv1d | CompConv2d | CompConv3d


def _check_depth(depth: int, least: int) -> None:
    if not least <= depth <= MAX_DEPTH:
        raise ConversionError(f"depth is {depth}: expected {least} to {MAX_DEPTH}")


def _group_starts(channels: int, groups: int) -> list[int]:
    rows, rest = divmod(channels, groups)
    return [group * rows + min(group, rest) for group in range(groups)]


def _same_padding(conv: Conv) -> str | tuple[int, ...]:
    reach = [step * (size - 1) for size, step in zip(conv.kernel_size, conv.dilation, strict=True)]
    return "same" if any(total % 2 for total in reach) else tuple(total // 2 for total in reach)


def _copy_pads(conv: Conv) -> list[int]:
    """What `F.pad` must add to the input (negative: cut off) so that pooling by the stride gives the output's size."""
    pads: list[int] = []
    for axis in reversed(range(len(conv.kernel_size))):
        stride, reach = conv.stride[axis], conv.dilation[axis] * (conv.kernel_size[axis] - 1)
        padding: str | tuple[int, ...] = conv.padding
        if isinstance(padding, str):
            before, total = (reach // 2, reach) if padding == "same" else (0, 0)
        else:
            before, total = padding[axis], 2 * padding[axis]
        start = int((reach - 2 * before - (stride - 1)) / 2)
        pads += [-start, total - reach - 1 + start + stride]
    return pads
