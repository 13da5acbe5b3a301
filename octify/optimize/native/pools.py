"""Pooling, means and resizing as steps."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import fx, nn
from torch.nn import functional as F

from octify.graph import get_module
from octify.octconv import as_tuple
from octify.ops import global_mean
from octify.optimize.forms import LowPool
from octify.optimize.native.builder import ONE_TAP, Builder, channels_of, reading, size_of
from octify.optimize.native.convs import is_read_in_parts
from octify.optimize.native.expressions import expression, grid_given, is_size
from octify.optimize.native.operations import Graph, Operation, grid_of, module_of
from octify.optimize.native.sizes import Chosen, Convolved, Given, Halved, Like, OnGrid, Vector, Worked
from octify.optimize.native.steps import Beside, Conv, Edge, Kind, Step
from octify.optimize.spread import blend, grid_left, interleave
from octify.pooling import OctPool
from octify.resample import average, pool_low, up_to

_GRID = ((2, 3), (-2, -1), (3, 2), (-1, -2))  # how the axes of a map are written


def is_grid(axes: Any) -> bool:
    """Whether these are the two axes of a map."""
    return isinstance(axes, (tuple, list)) and tuple(cast("Any", axes)) in _GRID


def _is_average(_: Graph, node: fx.Node) -> bool:
    return node.target is average or (node.target is pool_low and bool(node.args[1] == 2))


def _average(builder: Builder, node: fx.Node) -> None:
    source, window = cast("tuple[fx.Node, Any]", node.args)
    if window not in (2, (2, 2)):
        conv = Conv(builder.value(source), window, window, (0, 0), (1, 1))
        builder.values[node] = builder.emit(Step(Kind.AVERAGE, builder.new(), Convolved(conv, (0, 0), True), [conv]))
        return
    if is_read_in_parts(builder, source):
        given = reading(builder.beside[source])
        builder.values[node] = builder.emit(Step(Kind.POOL, builder.new(), Halved(size_of(given)), [given]))
        return
    builder.values[node] = builder.halved(source)


def _is_window(module: Graph, node: fx.Node) -> bool:
    found = module_of(module, node)
    if type(found) is nn.MaxPool2d:
        return not found.return_indices
    if type(found) is nn.AvgPool2d:
        pads = found.count_include_pad and found.padding not in (0, (0, 0))
        return found.divisor_override is None and not (found.ceil_mode and pads)
    return type(found) is LowPool and len(found.pool.low_kernel) == 2 and found.pool.window.divisor is None


def _window(builder: Builder, node: fx.Node) -> None:
    found: Any = module_of(builder.module, node)
    value = builder.value(cast(fx.Node, node.args[0]))
    if isinstance(found, LowPool):
        pooled = grid_given(builder, cast(fx.Node, node.args[1]), value)
        builder.values[node] = _low_window(builder, value, OnGrid(value, Halved(pooled)), found.pool, found.halves)
        return
    geometry = [as_tuple(given, 2) for given in (found.kernel_size, found.stride, found.padding)]
    kernel, stride, before = cast("list[tuple[int, int]]", geometry)
    if isinstance(found, nn.MaxPool2d):
        window = Conv(value, kernel, stride, before, cast("tuple[int, int]", as_tuple(found.dilation, 2)))
        step = Step(Kind.GREATEST, builder.new(), Convolved(window, before, found.ceil_mode), [window])
    elif geometry == [(2, 2), (2, 2), (0, 0)]:
        builder.values[node] = builder.halve(value, Halved(Like(value), found.ceil_mode))
        return
    else:
        area = kernel[0] * kernel[1] if found.count_include_pad and before != (0, 0) else 0
        window = Conv(value, kernel, stride, before, (1, 1), area=area)
        step = Step(Kind.AVERAGE, builder.new(), Convolved(window, before, found.ceil_mode), [window])
    builder.values[node] = builder.emit(step)


def _low_window(builder: Builder, value: int, size: OnGrid, pool: OctPool, halves: bool) -> int:
    """Beyond the borders the edge is repeated, which the greatest value does not depend on."""
    if halves:
        return builder.halve(value, size)
    kernel, stride, before = cast("tuple[Any, Any, Any]", (pool.low_kernel, pool.low_stride, pool.left))
    window = Conv(value, kernel, stride, before, (1, 1))
    if pool.window.kind == "average":
        window.area = kernel[0] * kernel[1] if pool.window.count_include_pad else 0
        window.edge = Edge.REPEATED_UNLESS_FITTING
    kind = Kind.GREATEST if pool.window.kind == "max" else Kind.AVERAGE
    return builder.emit(Step(kind, builder.new(), size, [window]))


def is_mean(module: Graph, node: fx.Node) -> bool:
    """The mean over a map's positions, (N, C, 1, 1)."""
    if not node.args or grid_of(node) != (1, 1):
        return False
    if node.op == "call_module":
        return type(get_module(module, str(node.target))) is nn.AdaptiveAvgPool2d
    if node.target is F.adaptive_avg_pool2d:
        return True
    if node.target is not torch.mean and (node.op, node.target) != ("call_method", "mean"):
        return False
    named: dict[str, Any] = dict(zip(("dim", "keepdim"), node.args[1:], strict=False)) | node.kwargs
    return set(named) == {"dim", "keepdim"} and is_grid(named["dim"])


def _mean(builder: Builder, node: fx.Node) -> None:
    builder.values[node] = _mean_of(builder, builder.value(cast(fx.Node, node.args[0])))


def _mean_of(builder: Builder, value: int, high: int | None = None) -> int:
    return builder.emit(Step(Kind.MEAN, builder.new(), Vector(value), [Conv(value, *ONE_TAP)], up=high))


def is_mean_of_bands(_: Graph, node: fx.Node) -> bool:
    """The mean over both bands' positions, (N, C, 1, 1)."""
    return node.target is global_mean and grid_of(node) == (1, 1) and (node.args[3], node.args[4]) == (1, (2, 3))


def _mean_of_bands(builder: Builder, node: fx.Node) -> None:
    nodes, order = cast("tuple[fx.Node, fx.Node]", node.args[:2]), cast("tuple[int, ...]", node.args[2])
    high, low = (builder.value(band) for band in nodes)
    means = _mean_of(builder, high), _mean_of(builder, low, high)
    parts = tuple((mean, channels_of(band)) for mean, band in zip(means, nodes, strict=True))
    step = Step(Kind.TAKE, builder.new(), Chosen(means[0], len(order)), [reading(Beside(parts))])
    step.order = tuple(order)
    builder.values[node] = builder.emit(step)


def _is_resize(module: Graph, node: fx.Node) -> bool:
    """Nearest or bilinear resizing, to a size that maps tell."""
    return node.target in (up_to, blend) and is_size(module, node.args[1])


def _resize(builder: Builder, node: fx.Node) -> None:
    value = builder.value(cast(fx.Node, node.args[0]))
    size = Given(value, expression(builder, node.args[1]))
    step = Step(Kind.RESIZE, builder.new(), size, [Conv(value, *ONE_TAP)])
    if node.target is blend:
        step.kind, step.order = Kind.BLEND, (int(cast(bool, node.args[2])),)
    builder.values[node] = builder.emit(step)


def _interleaves(module: Graph, node: fx.Node) -> bool:
    """Four maps in turns, to a size that maps tell."""
    return node.target is interleave and is_size(module, node.args[1])


def _interleave(builder: Builder, node: fx.Node) -> None:
    parts, size, *places = cast("tuple[list[fx.Node], Any, Any]", node.args)
    values = [builder.value(part) for part in parts]
    given = Given(values[0], Worked(grid_left, (expression(builder, size), *places)))
    convs = [Conv(value, *ONE_TAP) for value in values]
    builder.values[node] = builder.emit(Step(Kind.INTERLEAVE, builder.new(), given, convs))


OPERATIONS = (
    Operation("average by halves", _is_average, _average),
    Operation("window", _is_window, _window),
    Operation("mean", is_mean, _mean),
    Operation("mean of both bands", is_mean_of_bands, _mean_of_bands),
    Operation("resizing", _is_resize, _resize),
    Operation("maps in turns", _interleaves, _interleave),
)
