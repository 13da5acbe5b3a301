"""Pooling: on windows (keeps channels) and over the whole map (closes)."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any, cast

import numpy as np
import torch
from torch import fx, nn
from torch.nn import functional as F

from octify.graph import input_nodes, nodes_in, value_of
from octify.layout import run_of
from octify.ops import along_axes, global_max, global_mean, global_sum, over_channels, over_parts, without_places
from octify.pooling import OctPool, Window
from octify.rules.base import Bands, Build, Dense, Map, Op, Plain, Rule, Ties, register
from octify.rules.elementwise import OfTwo


class WindowPool(Rule):
    """Max and average pooling; on the low band with the folded window, which is only approximately right."""

    def __init__(self, window: Callable[[Op], Window]) -> None:
        self.window = window

    def flow(self, op: Op, ties: Ties) -> Map | Plain:
        """Keeps its input's channels, unless the pooled map is too small to split."""
        (found,) = op.maps
        if not found.is_plain:
            raise Dense("its input's axes are in another order")
        size = tuple(op.shape[axis] for axis in found.spatial)
        if op.too_small(size):
            raise Dense(f"its map of {'x'.join(map(str, size))} is less than twice min_size")
        self.window(op)
        ties.note("approximate on the low band")
        return found.with_ids(found.ids, op.shape)

    def emit(self, op: Op, build: Build) -> Any:
        """One module over both bands."""
        source: Bands = build.value(input_nodes(op.node)[0])
        window = self.window(op)
        node = build.module(lambda: OctPool(window), source.high, source.low)
        return Bands(*build.pair(node), source.layout, op.values[op.node])


def _from_module(op: Op) -> Window:
    pool: Any = op.module
    return Window(
        "max" if type(pool).__name__.startswith("Max") else "average",
        pool.kernel_size, pool.stride, pool.padding, getattr(pool, "dilation", 1), pool.ceil_mode,
        getattr(pool, "count_include_pad", True), getattr(pool, "divisor_override", None),
        dims=len(op.shape) - 2,
    ).checked(getattr(pool, "return_indices", False))  # fmt: skip


def _from_function(op: Op) -> Window:
    function = op.node.target
    dims = len(op.shape) - 2
    kernel = op.concrete(1, "kernel_size")
    stride = op.concrete(2, "stride") or kernel
    padding = op.concrete(3, "padding", 0)
    if function in MAX_FUNCTIONS:
        dilation, ceil = op.concrete(4, "dilation", 1), op.concrete(5, "ceil_mode", False)
        return Window("max", kernel, stride, padding, dilation, ceil, dims=dims).checked(
            op.concrete(6, "return_indices", False)
        )
    ceil, include = op.concrete(4, "ceil_mode", False), op.concrete(5, "count_include_pad", True)
    return Window("average", kernel, stride, padding, 1, ceil, include, op.concrete(6, "divisor_override"), dims=dims)


Reduction = tuple[tuple[int, ...], bool]  # over which axes, and whether they are kept
KINDS: dict[Callable[..., Any], str] = {global_mean: "mean", global_sum: "sum", global_max: "amax"}


class GlobalPool(Rule):
    """The mean (or maximum) over the whole map, from both bands: each low position counts for those it stands for.

    Along one of two axes, too: at each place along the other the low band gives the same for two.
    """

    kind = "closes"

    def __init__(self, function: Callable[..., Any], reduces: Callable[[Op, Map], Reduction | None]) -> None:
        self.function = function
        self.reduces = reduces

    def flow(self, op: Op, ties: Ties) -> Plain:
        """Gives a dense vector, or a row of them, in the source's channel order."""
        (found,) = op.maps
        if self.reduces(op, found) is None or len(found.channel) > 1:
            raise Dense("it does not reduce whole axes of the map")
        ties.close(found.ids)
        return Plain(op.shape)

    def emit(self, op: Op, build: Build) -> fx.Node:
        """One function over both bands."""
        source: Bands = build.value(input_nodes(op.node)[0])
        found, order = source.map, run_of(source.layout.order)
        axes, keep = cast(Reduction, self.reduces(op, found))
        if not set(axes) >= set(found.spatial):
            rest = (KINDS[self.function], order, found.channel[0], found.spatial, axes, keep)
            return build.function(along_axes, source.high, source.low, *rest)
        time = len(axes) > len(found.spatial)
        bands = source.high, source.low
        node = build.function(self.function, *bands, order, found.channel[0], found.spatial, keep or time)
        if not time:
            return node
        return build.function(getattr(torch, KINDS[self.function]), node, axes, keep)


class FunctionPool(WindowPool):
    """Pooling by a function; a window that is computed to be as large as the map is the mean or maximum of the map."""

    def flow(self, op: Op, ties: Ties) -> Map | Plain:
        """As pooling on windows, or over the whole map."""
        whole = self._whole(op)
        return super().flow(op, ties) if whole is None else whole.flow(op, ties)

    def emit(self, op: Op, build: Build) -> Any:
        """One module, or one function, over both bands."""
        whole = self._whole(op)
        return super().emit(op, build) if whole is None else whole.emit(op, build)

    def _whole(self, op: Op) -> GlobalPool | None:
        """`F.avg_pool2d(x, x.size()[2:])`, at any size."""
        node = op.node
        kernel: Any = node.args[1] if len(node.args) > 1 else node.kwargs.get("kernel_size")
        if (
            not nodes_in(kernel)
            or any(length != 1 for length in op.shape[2:])
            or op.concrete(3, "padding", 0) not in (0, (0, 0))
        ):
            return None
        return GlobalPool(global_max if node.target in MAX_FUNCTIONS else global_mean, _whole_map)


def _whole_map(_: Op, found: Map) -> Reduction | None:
    return (tuple(range(2, len(found.shape))), True) if found.is_plain else None


class Reduce(GlobalPool):
    """`mean`, `sum` and `amax` over the whole map, over all channels, or over one of several channel axes.

    Over channels the result is dense: full resolution from U of the low band. Over one of several channel axes the
    reduced channels share their bits, and the bands stay.
    """

    def __init__(self, kind: str) -> None:
        super().__init__(next(function for function, name in KINDS.items() if name == kind), _over_axes)
        self.over = kind

    def flow(self, op: Op, ties: Ties) -> Any:
        """A vector, a dense map of one channel, or a map of fewer channel axes."""
        (found,) = op.maps
        axes = _reduced_axes(op, found)
        if axes is None or not set(axes) <= set(found.channel):
            return super().flow(op, ties)
        if axes == found.channel and found.channel in ((1,), (len(found.shape) - 1,)):
            ties.close(found.ids)
            return Plain(op.shape)
        if axes not in ((found.channel[0],), (found.channel[-1],)) or len(found.channel) == 1:
            raise Dense("it reduces a part of the channel axes")
        return self._parts(op, ties, found, *axes)

    def _parts(self, op: Op, ties: Ties, found: Map, axis: int) -> Map:
        rows = np.moveaxis(found.ids, found.channel.index(axis), 0)
        for row in rows[1:]:
            ties.tie(rows[0], row)
        if _keeps(op):
            return found.with_ids(np.expand_dims(rows[0], found.channel.index(axis)), op.shape)
        spatial = tuple(where - (where > axis) for where in found.spatial)
        return Map(op.shape, rows[0], found.channel[:-1], spatial)

    def emit(self, op: Op, build: Build) -> Any:
        """One function over both bands, or one a band."""
        source: Bands = build.value(input_nodes(op.node)[0])
        found, given = source.map, op.values[op.node]
        if isinstance(given, Map):
            (axis,) = cast("tuple[int]", _reduced_axes(op, found))
            rest = (self.over, found.channel[0], found.shape[axis], axis == found.channel[0])
            high, low = (build.function(over_parts, band, *rest) for band in (source.high, source.low))
            return Bands(high, low, build.layout(given), given)
        if set(found.channel) != set(cast("tuple[int, ...]", _reduced_axes(op, found))):
            return super().emit(op, build)
        keep = _keeps(op)
        rest = (self.over, found.channel[0], len(found.spatial), keep)
        return build.function(over_channels, source.high, source.low, *rest)


class Max(OfTwo):
    """`max` of two tensors, elementwise; or of one along axes, where nobody asks at which places."""

    def __init__(self) -> None:
        self.along = Reduce("amax")

    def applies(self, op: Op) -> bool:
        """Whether it is one of both."""
        read = [user for user in op.node.users if user.users or user.op == "output"]
        values = all(user.target is operator.getitem and user.args[1] == 0 for user in read)
        return super().applies(op) or values

    def flow(self, op: Op, ties: Ties) -> Any:
        """As a sum's, or as `amax`, in a tuple that leaves the places out."""
        return super().flow(op, ties) if super().applies(op) else (self.along.flow(_first(op), ties), None)

    def emit(self, op: Op, build: Build) -> Any:
        """The same call once a band, or one function over both."""
        if super().applies(op):
            return super().emit(op, build)
        found = self.along.emit(_first(op), build)
        return build.function(without_places, found) if isinstance(found, fx.Node) else (found, None)


def _first(op: Op) -> Op:
    """An operation that gives a tuple as one that gives the first of it."""
    values = {**op.values, op.node: op.values[op.node][0]} if op.node in op.values else op.values
    return _Values(op.node, op.module, values, op.settings, op.dense_stem)


class _Values(Op):
    @property
    def shape(self) -> tuple[int, ...]:
        """The first tensor's shape."""
        return tuple(value_of(self.node)[0].shape)


def _adaptive(op: Op, found: Map) -> Reduction | None:
    module: Any = op.module
    size: Any = module.output_size if module is not None else op.concrete(1, "output_size")
    axes = range(2, len(found.shape))
    lengths = cast("Sequence[int | None]", size if isinstance(size, (tuple, list)) else [size] * len(axes))
    sizes = dict(zip(axes, lengths, strict=True))
    reduced = tuple(axis for axis, length in sizes.items() if length == 1)
    known = found.is_plain and all(length in (1, None) for length in sizes.values())
    return (reduced, True) if known and _is_reduction(reduced, found) else None


def _is_reduction(axes: tuple[int, ...], found: Map) -> bool:
    """Whether both bands can be reduced along these axes: all that are halved (and others), or some of them."""
    return set(axes) >= set(found.spatial) or (bool(axes) and set(axes) < set(found.spatial))


def _over_axes(op: Op, found: Map) -> Reduction | None:
    """The axes, if they are spatial ones: all of them (and time), or some."""
    reduced = _reduced_axes(op, found)
    if reduced is None or not _is_reduction(reduced, found) or {0, *found.channel} & set(reduced):
        return None
    return reduced, _keeps(op)


def _keeps(op: Op) -> bool:
    return bool(op.concrete(2, "keepdim", op.node.kwargs.get("keepdims", False)))


def _reduced_axes(op: Op, found: Map) -> tuple[int, ...] | None:
    axes = op.concrete(1, "dim", op.node.kwargs.get("axis"))
    if axes is None or "dtype" in op.node.kwargs:
        return None
    return tuple(sorted(axis % len(found.shape) for axis in ((axes,) if isinstance(axes, int) else axes)))


MAX_FUNCTIONS = (F.max_pool1d, F.max_pool2d, F.max_pool3d, torch.max_pool1d, torch.max_pool2d, torch.max_pool3d)
AVG_FUNCTIONS = (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)

register(
    WindowPool(_from_module),
    modules=(nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d),
)
register(FunctionPool(_from_function), functions=dict.fromkeys((*MAX_FUNCTIONS, *AVG_FUNCTIONS)))
register(
    GlobalPool(global_mean, _adaptive),
    modules=(nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d),
    functions=dict.fromkeys((F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d)),
)
register(
    GlobalPool(global_max, _adaptive),
    modules=(nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d),
    functions=dict.fromkeys((F.adaptive_max_pool1d, F.adaptive_max_pool2d, F.adaptive_max_pool3d)),
)
register(Reduce("mean"), functions=(torch.mean,), methods=("mean",))
register(Reduce("sum"), functions=(torch.sum,), methods=("sum",))
register(Reduce("amax"), functions=(torch.amax,), methods=("amax",))
register(Max(), functions=(torch.max,), methods=("max",))
