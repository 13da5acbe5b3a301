"""Functions that appear as nodes in a rewritten graph."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from octify import resample
from octify.errors import TraceError
from octify.layout import run_of
from octify.resample import pool_low, up_to


def take_channels(x: Tensor, index: Sequence[int], axis: int) -> Tensor:
    """The channels of a band out of a dense tensor: a view where they lie in one run, else a copy."""
    run = run_of(index)
    if isinstance(run, range):
        return x.narrow(axis, run.start, len(run))
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
    mean_low = _mean_of_low(high, low, spatial)
    mean = torch.cat((high.mean(tuple(spatial), keepdim=True), mean_low), axis) if high.shape[axis] else mean_low
    return _in_order(mean, order, axis, spatial, keepdim)


def _mean_of_low(high: Tensor, low: Tensor, axes: Sequence[int]) -> Tensor:
    """The mean over some spatial axes of the map that a low band stands for; they are kept."""
    for where in axes:
        length = high.shape[where]
        # An exported graph must not fix the size's parity.
        if not torch.compiler.is_exporting() and length % 2 == 0:
            low = low.mean(where, keepdim=True)
            continue
        # The last low position of an odd axis stands for one position, the others for two.
        last = low.narrow(where, low.shape[where] - 1, 1)
        body = 2 * low.sum(where, keepdim=True) - last * (length % 2)
        low = body / length
    return low


def global_sum(
    high: Tensor, low: Tensor, order: Sequence[int], axis: int, spatial: Sequence[int], keepdim: bool
) -> Tensor:
    """The sum over a split map's spatial axes, in the source's channel order."""
    return global_mean(high, low, order, axis, spatial, keepdim) * math.prod(high.shape[where] for where in spatial)


def global_max(
    high: Tensor, low: Tensor, order: Sequence[int], axis: int, spatial: Sequence[int], keepdim: bool
) -> Tensor:
    """The maximum over a split map's spatial axes, in the source's channel order."""
    parts = [band.amax(tuple(spatial), keepdim=True) for band in (high, low) if band.shape[axis]]
    return _in_order(torch.cat(parts, axis), order, axis, spatial, keepdim)


def along_axes(
    high: Tensor,
    low: Tensor,
    kind: str,
    order: Sequence[int],
    axis: int,
    spatial: Sequence[int],
    reduced: Sequence[int],
    keepdim: bool,
) -> Tensor:
    """The mean, sum or maximum along some of a split map's spatial axes, at each place along the others; dense."""
    small = low.amax(tuple(reduced), keepdim=True) if kind == "amax" else _mean_of_low(high, low, reduced)
    large = high.amax(tuple(reduced), keepdim=True) if kind == "amax" else high.mean(tuple(reduced), keepdim=True)
    raised = up_to(small.movedim(axis, 1), [large.shape[where] for where in spatial]).movedim(1, axis)
    found = _in_order(torch.cat((large, raised), axis), order, axis, reduced, keepdim)
    return found * math.prod(high.shape[where] for where in reduced) if kind == "sum" else found


def _in_order(x: Tensor, order: Sequence[int], axis: int, spatial: Sequence[int], keepdim: bool) -> Tensor:
    x = take_channels(x, order, axis)
    return x if keepdim else x.squeeze(tuple(spatial))


def over_channels(high: Tensor, low: Tensor, kind: str, axis: int, spatial: int, keepdim: bool) -> Tensor:
    """The mean, sum or maximum over all channels at each position of the map that the bands stand for; dense."""
    first, second = (band.movedim(axis, 1) for band in (high, low))
    raised = up_to(_reduce(second, kind, 1), first.shape[first.dim() - spatial :])
    reduced = raised
    if first.shape[1]:
        own = _reduce(first, kind, 1)
        reduced = torch.maximum(own, raised) if kind == "amax" else own + raised
    if kind == "mean":
        reduced = reduced / (first.shape[1] + second.shape[1])
    return reduced.movedim(1, axis) if keepdim else reduced.squeeze(1)


def without_places(x: Tensor) -> tuple[Tensor, None]:
    """What `max` along an axis gives, but for where the maxima are."""
    return x, None


def _reduce(x: Tensor, kind: str, axis: int) -> Tensor:
    return x.amax(axis, keepdim=True) if kind == "amax" else x.sum(axis, keepdim=True)


def over_parts(band: Tensor, kind: str, axis: int, parts: int, first: bool) -> Tensor:
    """The mean, sum or maximum over equal parts of a band's channels: one behind the other, or interleaved."""
    each = band.shape[axis] // parts
    shape = (parts, each) if first else (each, parts)
    apart = band.reshape(*band.shape[:axis], *shape, *band.shape[axis + 1 :])
    where = axis if first else axis + 1
    if kind == "amax":
        return apart.amax(where)
    return apart.mean(where) if kind == "mean" else apart.sum(where)


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


def pad_bands(
    high: Tensor, low: Tensor, pads: Sequence[int], mode: str = "constant", value: float = 0.0
) -> tuple[Tensor, Tensor]:
    """`F.pad` of both bands on their last axes (negative amounts cut); D of the padded map where it is constant.

    The low band's grid moves by half of the left padding: by an odd one, each new position lies between two old ones.
    """
    padded = _pad(high, pads, mode, value) if high.shape[1] else high.new_empty(_padded_shape(high, pads))
    for axis in range(len(pads) // 2):
        where = low.dim() - 1 - axis
        left, wanted = pads[2 * axis], halve([padded.shape[where]])[0]
        start = (left + 1) // 2
        length = wanted + left % 2
        low = _pad(low, [0, 0] * axis + [start, length - start - low.shape[where]], mode, value)
        if type(left) is not int or left % 2:  # an exported graph must not fix an open amount's parity
            low = (low.narrow(where, 0, wanted) + low.narrow(where, left % 2, wanted)) / 2
    return padded, low


def shuffle_bands(high: Tensor, low: Tensor, factor: int) -> tuple[Tensor, Tensor]:
    """Pixel shuffle of both bands; the low one is D of the shuffled map that it stands for."""
    size = high.shape[-2:]
    if factor % 2:
        return F.pixel_shuffle(high, factor), pool_low(F.pixel_shuffle(up_to(low, size), factor))
    half = factor // 2  # two by two, the channels become one position of the halved grid: their mean
    means = low.reshape(low.shape[0], -1, half, 2, half, 2, *low.shape[-2:]).mean((3, 5)).flatten(1, 3)
    return F.pixel_shuffle(high, factor), F.pixel_shuffle(up_to(means, size), half)


def unshuffle_bands(high: Tensor, low: Tensor, factor: int) -> tuple[Tensor, Tensor]:
    """The inverse of pixel shuffle on both bands; the low one is D of what it gives of the map that it stands for."""
    size = high.shape[-2:]
    empty = high.new_empty((high.shape[0], 0, *(length // factor for length in size)))  # torch does not divide them
    wide = F.pixel_unshuffle(high, factor) if high.shape[1] else empty
    if factor % 2:
        return wide, pool_low(F.pixel_unshuffle(up_to(low, size), factor))
    half = factor // 2  # two by two, the channels hold the same
    once = pool_low(F.pixel_unshuffle(low, half))
    once = once.reshape(once.shape[0], -1, half, 1, half, 1, *once.shape[-2:])
    return wide, once.expand(-1, -1, half, 2, half, 2, -1, -1).flatten(1, 5)


def crop_bands(high: Tensor, low: Tensor, crops: Sequence[tuple[int, Any, Any]]) -> tuple[Tensor, Tensor]:
    """Both bands of a map that is cut along some axes: (axis from the last, start, stop), as slices say it."""
    for axis, start, stop in crops:
        where = high.dim() - 1 - axis
        length = high.shape[where]
        begin, end = _place(start, length, 0), _place(stop, length, length)
        if start in (None, 0):
            high, low = high.narrow(where, 0, end), low.narrow(where, 0, halve([end])[0])
        else:
            high, low = pad_bands(high, low, [0, 0] * axis + [-begin, end - length])
    return high, low


def _place(value: Any, length: int, default: int) -> Any:
    """Where a slice begins or ends on an axis."""
    if value is None:
        return default
    shortest: Any = torch.sym_min
    return shortest(value + length if value < 0 else value, length)


def _padded_shape(x: Tensor, pads: Sequence[int]) -> list[int]:
    shape = list(x.shape)
    for axis in range(len(pads) // 2):
        shape[-1 - axis] += pads[2 * axis] + pads[2 * axis + 1]
    return shape


def _pad(x: Tensor, pads: Sequence[int], mode: str, value: float) -> Tensor:
    if mode == "constant":
        return F.pad(x, list(pads), mode, value)
    for axis in range(len(pads) // 2):
        left, right = pads[2 * axis : 2 * axis + 2]
        x = F.pad(x, [0, 0] * axis + [min(left, 0), min(right, 0)])
    return resample.pad(x, mode, tuple(max(amount, 0) for amount in pads))


def same_branch_(found: object, expected: bool) -> None:
    """Raises where a size leads the source into another branch than the example's size did; kept without readers."""
    if bool(found) != expected:
        raise TraceError(
            "this input's size takes the source through another branch than the example's: convert with "
            "example_inputs of this size"
        )


def enter_(scope: str, *args: Any) -> Any:
    """Enters a scope of torch's (`no_grad`, `autocast`) where the source's forward does, and gives it."""
    context = getattr(torch, scope)(*args)
    context.__enter__()
    return context


def leave_(context: Any) -> None:
    """Leaves a scope; kept without readers."""
    context.__exit__(None, None, None)


WRAPPED = (
    take_channels, full_shape, halve, global_mean, global_sum, global_max, along_axes, over_channels, over_parts,
    without_places, resize_bands, pad_bands, crop_bands, shuffle_bands, unshuffle_bands,
)  # fmt: skip
