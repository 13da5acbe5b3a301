"""Moving a map between the two grids, and padding it: plain functions on tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F

Pads = tuple[int, ...]


def pool_low(x: Tensor, spatial: int = 2) -> Tensor:
    """D: averages 2 by 2 over the last `spatial` axes, (…, H, W) to (…, ⌈H/2⌉, ⌈W/2⌉)."""
    return average(x, (1,) * (x.dim() - 2 - spatial) + (2,) * spatial)


def average(x: Tensor, window: tuple[int, ...]) -> Tensor:
    """Averages windows side by side, one size per axis behind the channels; the last window may be a smaller one."""
    if len(window) == 1:
        return F.avg_pool1d(x, window, ceil_mode=True, count_include_pad=False)
    if window == (2, 2) and _halves_quickly(x) and not _learns(x):
        return _halve(x)
    if len(window) == 2:
        return F.avg_pool2d(x, window, ceil_mode=True, count_include_pad=False)
    if window[0] > 1:
        return F.avg_pool3d(x, window, ceil_mode=True, count_include_pad=False)
    # Frame by frame: `avg_pool3d` refuses a map of one row, and is 20 times slower on channels-last ones.
    if x.is_contiguous(memory_format=torch.channels_last_3d) and not x.is_contiguous():
        frames = average(x.transpose(1, 2).flatten(0, 1), window[1:])
        return frames.reshape(x.shape[0], x.shape[2], *frames.shape[1:]).transpose(1, 2)
    rows = average(x.flatten(1, 2), window[1:])
    return rows.reshape(*x.shape[:3], *rows.shape[2:])


def read_both(x: Tensor, spatial: int = 2) -> tuple[Tensor, Tensor]:
    """A map and D of it; where gradients are wanted, the two that come back are added in one pass."""
    return _Read.apply(x) if spatial == 2 and _halves_quickly(x) and _learns(x) else (x, pool_low(x, spatial))


def add_raised(x: Tensor, low: Tensor, size: Sequence[int]) -> Tensor:
    """`x + U(low)`, in `x` itself where its memory is not worth more than a pass."""
    if len(size) == 2 and _halves_quickly(x) and _learns(x) and _fits(x, low):
        return cast(Tensor, _Add.apply(x, low))
    return x.add_(up_to(low, size))


def _learns(x: Tensor) -> bool:
    return x.requires_grad and torch.is_grad_enabled()


def _fits(x: Tensor, low: Tensor) -> bool:
    """Whether `low` lies in memory as `x` does and is half of its size."""
    return 2 * low.shape[-1] == x.shape[-1] and 2 * low.shape[-2] == x.shape[-2] and _is_last(x) == _is_last(low)


def _halves_quickly(x: Tensor) -> bool:
    """Whether what stands below fits: 2 to 5 times faster than PyTorch's own pooling and its gradient on a CPU."""
    if torch.compiler.is_compiling() or cast(Any, torch.jit).is_tracing():
        return False
    if x.device.type != "cpu" or x.dtype not in (torch.float32, torch.float64) or x.dim() != 4:
        return False
    return x.shape[-1] % 2 == x.shape[-2] % 2 == 0 and (x.is_contiguous() or _is_last(x))


def _is_last(x: Tensor) -> bool:
    return not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)


def _halve(x: Tensor) -> Tensor:
    if not x.is_contiguous():
        return F.avg_pool2d(x, 2)
    rows = x[..., ::2, :] + x[..., 1::2, :]
    return (rows[..., ::2] + rows[..., 1::2]).mul_(0.25)


def _plus_raised(x: Tensor, low: Tensor, weight: float) -> Tensor:
    """`x + weight · U(low)`, written once."""
    height, width = low.shape[-2:]
    if not x.is_contiguous():
        apart = x.view(*x.shape[:-2], height, 2, width, 2)
        return torch.add(apart, low[..., :, None, :, None], alpha=weight).flatten(-2).flatten(-3, -2)
    wide = low.unsqueeze(-1).expand(*low.shape, 2).flatten(-2)
    return torch.add(x.view(*x.shape[:-2], height, 2, 2 * width), wide.unsqueeze(-2), alpha=weight).flatten(-3, -2)


class _Read(torch.autograd.Function):
    """x to (x, D x). The gradient is g + U(d)/4 for those of the two, in one pass instead of three."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> tuple[Tensor, Tensor]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return x.view_as(x), _halve(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        """Nothing is saved."""

    @staticmethod
    def backward(ctx: Any, whole: Tensor, half: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return _plus_raised(whole, half, 0.25)

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor) -> tuple[Tensor, Tensor]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return tangent.view_as(tangent), _halve(tangent)


class _Add(torch.autograd.Function):
    """x and a low map to x + U(low): `_Read`'s other side, with its gradient g and 4 D(g)."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, low: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        # No view of its own sum, else an activation in place would be refused.
        return torch.ops.aten._unsafe_view.default(_plus_raised(x, low, 1.0), x.shape)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        """Nothing is saved."""

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return gradient, 4 * _halve(gradient)

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, low: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return _plus_raised(tangent, low, 1.0)


def up_to(x: Tensor, size: Sequence[int]) -> Tensor:
    """U: nearest upsampling of the last axes to `size`; an axis of ⌈size/2⌉ is doubled and cropped, others repeat."""
    return F.interpolate(x, size=[*x.shape[2 : x.dim() - len(size)], *size], mode="nearest")


def pad(x: Tensor, mode: str, pads: Pads) -> Tensor:
    """`F.pad`, with the mode "mirror" besides (reflection that repeats the edge); replicates where a map is too small.

    A map can be too small for its mode only because it is half the size of the one that the mode was chosen for.
    """
    if mode == "constant":
        return F.pad(x, pads, mode)
    pads = (*pads, *(0,) * (2 * (x.dim() - 2) - len(pads)))  # the other modes want every axis
    if mode == "replicate":
        return F.pad(x, pads, mode)
    spare = 1 if mode == "reflect" else 0
    if any(max(pads[2 * axis : 2 * axis + 2]) + spare > x.shape[-1 - axis] for axis in range(len(pads) // 2)):
        return F.pad(x, pads, "replicate")
    return _mirror(x, pads) if mode == "mirror" else F.pad(x, pads, mode)


def _mirror(x: Tensor, pads: Pads) -> Tensor:
    for axis in range(len(pads) // 2):
        dim, (left, right) = -1 - axis, pads[2 * axis : 2 * axis + 2]
        if left == right == 0:
            continue
        head = x.narrow(dim, 0, left).flip(dim)
        tail = x.narrow(dim, x.shape[dim] - right, right).flip(dim)
        x = torch.cat((head, x, tail), dim)
    return x


def cut(x: Tensor, dim: int, start: int, length: int) -> Tensor:
    """`length` elements from `start` along a dim counted from the end."""
    if torch.compiler.is_exporting():
        # A slice would ask whether it is the whole, which ties the program to sizes of the example's parity.
        return F.pad(x, [0, 0] * (-dim - 1) + [-start, start + length - x.shape[dim]])
    return x if start == 0 and x.shape[dim] == length else x.narrow(dim, start, length)


def pad_same(x: Tensor, kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int]) -> Tensor:
    """TensorFlow's "same" padding with zeros, from the input's size; as `timm.layers.pad_same`, for any dimension."""
    pads: list[int] = []
    for axis in reversed(range(len(kernel))):
        size = x.shape[2 + axis]
        out = (size + stride[axis] - 1) // stride[axis]
        span = (kernel[axis] - 1) * dilation[axis] + 1
        total = (out - 1) * stride[axis] + span - size
        if span < stride[axis]:  # else it is no less than their difference, and sizes that are open stay simple
            total = max(total, 0)
        pads += [total // 2, total - total // 2]
    return F.pad(x, pads)
