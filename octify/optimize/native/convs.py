"""Convolutions and their sums as steps: padding, cropping, activations, norms that stand alone."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

import torch
from torch import fx, nn

from octify.graph import get_module, shape_of, value_of
from octify.optimize.forms import Affine, Enter, Leave, PadSame, join
from octify.optimize.native.builder import Builder, Padding, Pending, channels_of
from octify.optimize.native.expressions import grid_given, is_size
from octify.optimize.native.operations import Graph, Operation, is_map, module_of
from octify.optimize.native.packing import Kernel, small_group, waste
from octify.optimize.native.sizes import Convolved, Cropped, SameSize
from octify.optimize.native.steps import SAME, Beside, Conv, Edge
from octify.optimize.norms import scale_and_shift
from octify.optimize.passes import act_of
from octify.optimize.spread import Pad
from octify.resample import average, pool_low

WASTE = 8.0  # products made for one that is needed, up to which a grouped convolution is run here
PANEL = 16  # as most machines have it
_EDGES = {"constant": Edge.NOTHING, "replicate": Edge.REPEATED}


def is_conv(module: Graph, node: fx.Node) -> bool:
    """Whether a node is a convolution that the kernels can run."""
    conv: Any = module_of(module, node)
    if type(conv) is not nn.Conv2d or conv.padding_mode != "zeros" or isinstance(conv.padding, str):
        return False
    if conv.weight.dtype != torch.float32 or conv.weight.device.type != "cpu":
        return False
    if conv.groups == 1 or small_group(conv.weight.shape, conv.groups):
        return True
    return waste(Kernel.of(conv.weight.shape, conv.groups), PANEL) <= WASTE


def borders(module: Graph, node: fx.Node) -> bool:
    """Whether a node pads with zeros for convolutions alone, or crops what a convolution gives it alone."""
    found = module_of(module, node)
    if type(found) is Pad:
        return all(is_conv(module, reader) for reader in node.users)
    if type(found) is Leave:
        source, size = cast("tuple[fx.Node, fx.Node]", node.args[:2])
        high = size if len(node.args) > 2 else cast(fx.Node, size.args[0])
        return is_conv(module, source) and len(source.users) == 1 and (is_map(high) or is_size(module, high))
    if type(found) is PadSame:
        return all(is_conv(module, reader) for reader in node.users)
    if type(found) is not Enter or found.route.pool or found.route.pick or (found.route.same and found.route.pads):
        return False
    modes = [mode for mode, _ in found.route.pads]
    if modes == ["replicate"]:
        return all(is_conv(module, reader) and not _is_grouped(module, reader) for reader in node.users)
    return all(mode == "constant" for mode in modes) and all(is_conv(module, reader) for reader in node.users)


def _is_grouped(module: Graph, node: fx.Node) -> bool:
    return cast(nn.Conv2d, module_of(module, node)).groups > 1


def _pads(builder: Builder, node: fx.Node) -> None:
    """Kept until the convolutions that read it."""
    found = get_module(builder.module, str(node.target))
    if isinstance(found, PadSame):
        builder.padding[node] = Padding(SAME, Edge.NOTHING)
        return
    if isinstance(found, Pad):
        builder.padding[node] = Padding(found.amounts, Edge.NOTHING)
        return
    route = cast(Enter, found).route
    mode, pads = route.pads[0] if route.pads else ("constant", (0, 0, 0, 0))
    builder.padding[node] = Padding(SAME if route.same else pads, _EDGES[mode])


def _crops(builder: Builder, node: fx.Node) -> None:
    pending, (high, halved) = builder.pending.pop(cast(fx.Node, node.args[0])), cast(Any, node.args[1:])
    inner, route = cast(Convolved, pending.size), cast(Leave, module_of(builder.module, node)).route
    builder.pending[node] = replace(
        pending,
        size=Cropped(inner, grid_given(builder, high, inner.conv.value), tuple(halved), route.crop, route.low),
    )


def _border(builder: Builder, node: fx.Node) -> None:
    (_crops if type(module_of(builder.module, node)) is Leave else _pads)(builder, node)


def _conv(builder: Builder, node: fx.Node) -> None:
    conv, source = cast(nn.Conv2d, module_of(builder.module, node)), cast(fx.Node, node.args[0])
    before = after = cast("tuple[int, int]", conv.padding)
    padding = builder.padding.get(source)
    if padding is not None:
        source = cast(fx.Node, source.args[0])
    if padding is not None and padding.amounts == SAME:
        before = SAME
    elif padding is not None:  # F.pad's order: the last axis first
        left, right, top, bottom = padding.amounts
        before, after = (before[0] + top, before[1] + left), (after[0] + bottom, after[1] + right)
    stride, dilation = cast("tuple[int, int]", conv.stride), cast("tuple[int, int]", conv.dilation)
    kernel, weight = cast("tuple[int, int]", conv.kernel_size), conv.weight.detach()
    beside = builder.beside[source] if is_read_in_parts(builder, source) else None
    value = builder.value(source) if beside is None else beside.parts[0][0]
    made = Conv(value, kernel, stride, before, dilation, conv.groups, weight, beside)
    made.edge = padding.edge if padding else Edge.NOTHING
    bias = None if conv.bias is None else conv.bias.detach()
    builder.pending[node] = Pending(SameSize(made) if before == SAME else Convolved(made, after), bias, made)


def is_read_in_parts(builder: Builder, source: fx.Node) -> bool:
    """Whether all that read what is not yet done can do so pixel by pixel: then no map of it is ever written."""
    return source in builder.beside and all(_reads_pixels(builder.module, reader) for reader in source.users)


def _reads_pixels(module: Graph, reader: fx.Node) -> bool:
    if reader.target in (pool_low, average):
        return True
    conv = module_of(module, reader)
    if type(conv) is not nn.Conv2d or conv.groups > 1:
        return False
    return (conv.kernel_size, conv.stride, conv.padding) == ((1, 1), (1, 1), (0, 0))


def _joins_here(_: Graph, node: fx.Node) -> bool:
    """Whether all terms of a sum have its size (or, upsampled, half of it)."""
    if node.target is not join:
        return False
    shape = shape_of(value_of(node)) or ()
    highs, lows, spatial = cast("tuple[list[fx.Node], list[fx.Node], int]", node.args[:3])
    small = (*shape[:2], *((size + 1) // 2 for size in shape[2:]))
    fits = all(shape_of(value_of(term)) == shape for term in highs)
    return spatial == 2 and fits and all(shape_of(value_of(term)) == small for term in lows)


def _join(builder: Builder, node: fx.Node) -> None:
    highs, lows = cast("tuple[list[fx.Node], list[fx.Node]]", node.args[:2])
    act = cast(str, node.args[3]) if len(node.args) > 3 else ""
    up = None
    if len(lows) == 1 and not builder.is_free(lows[0], node):
        up = builder.value(lows[0])
    elif lows:
        up = builder.sum(lows, node, "", None)
    builder.values[node] = builder.sum(highs, node, act, up)


def _act(builder: Builder, node: fx.Node) -> None:
    source, act = cast(fx.Node, node.args[0]), act_of(builder.module, node)
    if source in builder.pending and len(source.users) == 1:
        builder.settle(node, builder.pending.pop(source), act)
        return
    if source in builder.beside and not builder.beside[source].act and len(source.users) == 1:
        builder.beside[node] = replace(builder.beside.pop(source), act=act)
        return
    builder.beside[node] = Beside(((builder.value(source), channels_of(node)),), act=act)


def _is_norm(module: Graph, node: fx.Node) -> bool:
    found = module_of(module, node)
    return type(found) is Affine or (type(found) is nn.BatchNorm2d and found.running_var is not None)


def _norm(builder: Builder, node: fx.Node) -> None:
    source, found = cast(fx.Node, node.args[0]), cast(nn.Module, module_of(builder.module, node))
    rows = (found.scale, found.shift) if isinstance(found, Affine) else scale_and_shift(found)
    scale, shift = (row.float() for row in rows)
    given = builder.beside.get(source)
    alone = given is not None and given.plain and len(source.users) == 1
    parts = builder.beside.pop(source).parts if alone else ((builder.value(source), len(scale)),)
    builder.beside[node] = Beside(parts, scale, shift)


OPERATIONS = (
    Operation("padding and cropping", borders, _border),
    Operation("convolution", is_conv, _conv),
    Operation("sum", _joins_here, _join),
    Operation("activation", lambda module, node: bool(act_of(module, node)), _act),
    Operation("norm", _is_norm, _norm),
)
