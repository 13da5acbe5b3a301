"""Functions that appear as nodes in a rewritten graph."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F


def take_channels(x: Tensor, index: Sequence[int], axis: int) -> Tensor:
    """The channels of a band out of a dense tensor: a view where they lie in one run, else a copy."""
    first, last = index[0] if index else 0, index[-1] if index else -1
    if last - first + 1 == len(index) and all(b - a == 1 for a, b in zip(index, index[1:], strict=False)):
        return x.narrow(axis, first, len(index))
    return x.index_select(axis, torch.tensor(index, device=x.device))


def full_shape(high: Tensor, channels: Sequence[int], axis: int) -> torch.Size:
    """The shape that a split value has in the source: the high band's, with all channels at the channel axes."""
    return torch.Size((*high.shape[:axis], *channels, *high.shape[axis + 1 :]))


def halve(size: Sequence[int]) -> tuple[int, ...]:
    """The low band's size for a high band's."""
    return tuple((length + 1) // 2 for length in size)


def global_mean(
    high: Tensor, low: Tensor, order: Sequence[int], axis: int, spatial: Sequence[int], keepdim: bool
) -> Tensor:
    """The mean over a split map's spatial axes, in the source's channel order; exact for the map that is stood for."""
    mean_low = low
    for where in spatial:
        length = high.shape[where]
        if length % 2 == 0:
            mean_low = mean_low.mean(where, keepdim=True)
            continue
        # The last low position of an odd axis stands for one position, the others for two.
        body = 2 * mean_low.sum(where, keepdim=True) - mean_low.narrow(where, mean_low.shape[where] - 1, 1)
        mean_low = body / length
    mean = torch.cat((high.mean(tuple(spatial), keepdim=True), mean_low), axis) if high.shape[axis] else mean_low
    return _in_order(mean, order, axis, spatial, keepdim)


def global_max(
    high: Tensor, low: Tensor, order: Sequence[int], axis: int, spatial: Sequence[int], keepdim: bool
) -> Tensor:
    """The maximum over a split map's spatial axes, in the source's channel order."""
    parts = [band.amax(tuple(spatial), keepdim=True) for band in (high, low) if band.shape[axis]]
    return _in_order(torch.cat(parts, axis), order, axis, spatial, keepdim)


def _in_order(x: Tensor, order: Sequence[int], axis: int, spatial: Sequence[int], keepdim: bool) -> Tensor:
    x = take_channels(x, order, axis)
    return x if keepdim else x.squeeze(tuple(spatial))


def resize_bands(
    high: Tensor,
    low: Tensor,
    size: Sequence[int] | int | None = None,
    scale_factor: float | Sequence[float] | None = None,
    mode: str = "nearest",
    align_corners: bool | None = None,
    recompute_scale_factor: bool | None = None,
    antialias: bool = False,
) -> tuple[Tensor, Tensor]:
    """`F.interpolate` of both bands; the low band to half of the high one's new size."""
    probe = high if high.shape[1] else high.new_zeros((1, 1, *high.shape[2:]))
    up = F.interpolate(probe, size, scale_factor, mode, align_corners, recompute_scale_factor, antialias)
    dims = up.dim() - 2
    wanted = [*up.shape[2 : 2 + dims - min(2, dims)], *halve(up.shape[-min(2, dims) :])]
    band = F.interpolate(low, wanted, None, mode, align_corners, None, antialias)
    return (up if high.shape[1] else high.new_empty((high.shape[0], 0, *up.shape[2:]))), band


WRAPPED = (take_channels, full_shape, halve, global_mean, global_max, resize_bands)
