"""The paths of an octave convolution as plain numbers, and running one of them on a map."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from octify.kernels import (
    Axis,
    Taps,
    fits_always,
    fold_taps,
    half,
    halve_taps,
    keep_taps,
    phase_offsets,
    right_reach,
    sharpen_taps,
)
from octify.resample import Pads, average, cut, pad, pad_same

# The low grid's counterpart of a padding mode: reflection starts at the edge itself there, because the first reflected
# element of the source's grid lies in the same low element as the edge.
LOW_MODES = {"zeros": "constant", "reflect": "mirror", "replicate": "replicate", "circular": "circular"}


@dataclass(frozen=True)
class Route:
    """What happens to a map on one path, in this order; tuples have one entry per axis behind the channels.

    `same` pads as TensorFlow does; `pool` averages windows side by side; `pads` pads, `(mode, F.pad's amounts)` each;
    `pick` averages the two positions that a strided kernel of one tap folds to, `(dim, distance, stride)` each; then
    the convolution; `crop` cuts these dims to the grid's size. `low` says which axes the result has on the low grid: of
    a path to the high band they are still to be upsampled.
    """

    taps: tuple[Taps, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    padding: tuple[int, ...] | str
    low: tuple[bool, ...] = ()
    pads: tuple[tuple[str, Pads], ...] = ()
    pool: tuple[int, ...] = ()
    pick: tuple[tuple[int, int, int], ...] = ()
    crop: tuple[int, ...] = ()
    same: bool = False

    @property
    def kernel(self) -> tuple[int, ...]:
        """The path's kernel size."""
        return tuple(len(tap.matrix) for tap in self.taps)


def run_route(
    route: Route,
    conv: Callable[..., Tensor],
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    groups: int,
    size: Sequence[int],
) -> Tensor:
    """One path, up to its convolution's grid; `size` is the source's output size on the last axes."""
    x = enter(route, x, size)
    x = conv(x, weight, bias, route.stride, route.padding, route.dilation, groups)
    return leave(route, x, size)


def enter(route: Route, x: Tensor, size: Sequence[int]) -> Tensor:
    """What a path does before its convolution."""
    if route.same:
        x = pad_same(x, route.kernel, route.stride, route.dilation)
    if route.pool:
        x = average(x, route.pool)
    for mode, pads in route.pads:
        x = pad(x, mode, pads)
    for dim, distance, stride in route.pick:
        x = _pick(x, dim, distance, stride, half(size[dim]))
    return x


def leave(route: Route, x: Tensor, size: Sequence[int]) -> Tensor:
    """What a path does after its convolution."""
    for dim in route.crop:
        x = cut(x, dim, 0, half(size[dim]) if route.low[dim] else size[dim])
    return x


def _pick(x: Tensor, dim: int, distance: int, stride: int, length: int) -> Tensor:
    reach = stride * (length - 1) + 1

    def strided(start: int) -> Tensor:
        index = (slice(None),) * (x.dim() + dim) + (slice(start, start + reach, stride),)
        return x[index]

    return (strided(0) + strided(distance)) * 0.5


def source_route(axes: Sequence[Axis], mode: str, padding: tuple[int, ...] | str) -> Route:
    """High to high: the source's own geometry, by the same calls as `torch.nn` makes them."""
    taps = tuple(keep_taps(axis) for axis in axes)
    stride, dilation = tuple(axis.stride for axis in axes), tuple(axis.dilation for axis in axes)
    none = (0,) * len(axes)
    if axes[-1].dynamic:
        return Route(taps, stride, dilation, none, same=True)
    if mode == "zeros":
        return Route(taps, stride, dilation, padding)
    pads = tuple(amount for axis in reversed(axes) for amount in (axis.left, axis.right))
    return Route(taps, stride, dilation, none, pads=((mode, pads),))


@dataclass(frozen=True)
class _Place:
    """One axis of a path: its kernel and what it needs around it on its grid."""

    taps: Taps
    left: int
    right: int
    mode: str
    low: bool = False
    crop: bool = False
    pool: int = 1
    pick: tuple[int, int] | None = None

    @property
    def by_conv(self) -> bool:
        """Whether the convolution's own symmetric zeros do; what that adds on the right is cropped."""
        return self.mode == "constant" and self.left >= self.right and not self.pick


def fold_low(axes: Sequence[Axis], spatial: int, mode: str, sharp: bool = False) -> Route:
    """Low to low, and high to low behind D: `D ∘ conv ∘ U` along the last `spatial` axes; `sharp` weighs the taps."""
    still, moved = axes[:-spatial], axes[-spatial:]
    return _assemble([_keep(axis, mode) for axis in still] + [_fold(axis, mode, True, sharp) for axis in moved])


def fold_high(axes: Sequence[Axis], spatial: int, mode: str, sharp: bool = False) -> Route:
    """Low to high: `conv ∘ U` along axes of even stride; along odd ones the mean of the two phases, then U."""
    still, moved = axes[:-spatial], axes[-spatial:]
    places = [_fold(axis, mode, axis.stride % 2 == 1, sharp) for axis in moved]
    return _assemble([_keep(axis, mode) for axis in still] + places)


def _fold(axis: Axis, mode: str, low: bool, sharp: bool) -> _Place:
    taps = fold_taps(axis) if low else halve_taps(axis)
    taps = sharpen_taps(axis, taps, low) if sharp else taps
    # What the source pads is padded in its mode; what only the fold's last output needs repeats the edge.
    padded = axis.left > 0 or axis.right > 0 or axis.dynamic
    low_mode = LOW_MODES[mode] if padded else "replicate"
    right = right_reach(axis, taps, low)
    near, far = phase_offsets(axis)
    if not low or axis.kernel > 1 or near == far:
        conv_right = max(right, -taps.first) if low_mode == "constant" else right
        crop = not fits_always(axis, taps, low, conv_right)
        return _Place(taps, -taps.first, right, low_mode, low, crop)
    # The two equal taps of a strided kernel of one tap would double the parameters: a fixed average does the same.
    single = Taps(0, 1, 1, ((1.0,),))
    if axis.stride == 2 and not padded:
        return _Place(single, 0, 0, low_mode, low, pool=2)
    return _Place(single, -near, right, low_mode, low, pick=(far - near, axis.stride))


def _keep(axis: Axis, mode: str) -> _Place:
    return _Place(keep_taps(axis), axis.left, axis.right, "constant" if mode == "zeros" else mode)


def paper_route(axes: Sequence[Axis], spatial: int, mode: str, downsample: str, source: str, target: str) -> Route:
    """A path of the paper's: the k×k kernel with half padding on either grid.

    With `downsample` "pool", the high map is expected to be pooled by the stride already, and low maps are pooled here.
    """
    still, moved = axes[:-spatial], axes[-spatial:]
    places = [_keep(axis, mode) for axis in still]
    for axis in moved:
        low = target == "low" or (source == "low" and axis.stride % 2 == 1)
        step = axis.stride if low or source == "high" else axis.stride // 2
        pooled = step if downsample == "pool" and source == "low" else 1
        stride = step if downsample == "stride" else 1
        margin = axis.span // 2
        taps = Taps(-margin, axis.dilation, stride, keep_taps(axis).matrix)
        padding_mode = "constant" if mode == "zeros" else mode
        places.append(_Place(taps, margin, margin, padding_mode, low, pool=pooled))
    return _assemble(places)


def _assemble(places: Sequence[_Place]) -> Route:
    axes = len(places)
    pads: dict[str, list[int]] = {}
    for position, place in enumerate(places):
        if place.by_conv or place.left == place.right == 0:
            continue
        amounts = pads.setdefault(place.mode, [0] * 2 * axes)
        start = 2 * (axes - 1 - position)
        amounts[start : start + 2] = [place.left, place.right]
    pool = tuple(place.pool for place in places)
    dims = range(-axes, 0)
    return Route(
        taps=tuple(place.taps for place in places),
        stride=tuple(place.taps.stride for place in places),
        dilation=tuple(place.taps.dilation for place in places),
        padding=tuple(place.left if place.by_conv else 0 for place in places),
        low=tuple(place.low for place in places),
        pads=tuple((mode, tuple(amounts)) for mode, amounts in pads.items()),
        pool=pool if max(pool) > 1 else (),
        pick=tuple((dim, *place.pick) for dim, place in zip(dims, places, strict=True) if place.pick),
        crop=tuple(dim for dim, place in zip(dims, places, strict=True) if place.crop),
    )
