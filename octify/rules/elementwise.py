"""One rule for all that is done number by number, whatever the operands: what sums, gates and activations share."""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from torch import fx

from octify.graph import input_nodes, map_nodes, value_of
from octify.layers import pool_low
from octify.layout import Layout, run_of
from octify.ops import take_channels
from octify.rules.base import Bands, Build, Dense, Map, Op, Plain, Rule, Ties


class Elementwise(Rule):
    """Every operand of the output's shape shares its bits; vectors and spatial gates are cut to the bands.

    Exact on the low band: it stands for a map that is constant on 2x2 blocks, and so is any function of such maps.
    """

    kind = "joins"

    def flow(self, op: Op, ties: Ties) -> Map:
        """Ties the full operands; the others must broadcast over whole axes."""
        shape = op.shape
        full = [found for found in op.maps if found.shape == shape]
        if not full:
            raise Dense("no operand has the output's shape")
        first = full[0]
        for found in full[1:]:
            if found.channel != first.channel or found.spatial != first.spatial:
                raise Dense("its operands' axes are in different orders")
            ties.tie(first.ids, found.ids)
        for node in input_nodes(op.node):
            value = op.values[node]
            if isinstance(value, Plain) and value.shape == shape and not _has_mean(node):
                raise Dense("an operand is no map of numbers: it cannot be pooled")
            role = _role(value, first, shape)
            if role == "gate" and (len(cast("Plain", value).shape) != len(shape) or not _can_pool(first)):
                raise Dense("a spatial gate on a map with its axes in another order")
            if role == "odd":
                raise Dense(f"an operand of shape {getattr(value, 'shape', value)} broadcasts over a part of the axes")
            if isinstance(value, Map) and value.shape != shape:
                ties.want_dense(value.ids)
        return first

    def emit(self, op: Op, build: Build) -> Bands:
        """The same call once a band."""
        given: Map = op.values[op.node]
        layout = build.layout(given)
        operands = {node: _operand(op, build, node, given, layout) for node in input_nodes(op.node)}
        high, low = (_call(op, build, {node: pair[band] for node, pair in operands.items()}) for band in (0, 1))
        return Bands(high, low, layout, given)


def _has_mean(node: fx.Node) -> bool:
    """Whether a tensor's elements have a mean."""
    value = value_of(node)
    return isinstance(value, torch.Tensor) and (value.is_floating_point() or value.is_complex())


def _call(op: Op, build: Build, operands: dict[fx.Node, Any]) -> fx.Node:
    node, target = op.node, cast(Any, op.node.target)
    args: tuple[Any, ...] = map_nodes(node.args, lambda source: operands[source])
    kwargs: dict[str, Any] = map_nodes(node.kwargs, lambda source: operands[source])
    if node.op == "call_module":
        return build.module(build.source_module, *args, **kwargs)
    if node.op == "call_method":
        return build.method(target, *args, **kwargs)
    return build.function(target, *args, **kwargs)


def _role(value: Any, like: Map, shape: tuple[int, ...]) -> str:
    """What an operand is to a map: full, a vector of channels, a spatial gate, a scalar, or something odd."""
    if not isinstance(value, (Map, Plain)):
        return "scalar"
    aligned = (1,) * (len(shape) - len(value.shape)) + value.shape
    if len(aligned) != len(shape):
        return "odd"
    if aligned == shape:
        return "full"
    channels = tuple(aligned[axis] for axis in like.channel)
    spatial = tuple(aligned[axis] for axis in like.spatial)
    if math.prod(channels) == math.prod(spatial) == 1:
        return "scalar"
    if math.prod(spatial) == 1 and channels == tuple(shape[axis] for axis in like.channel):
        return "vector"
    if math.prod(channels) == 1 and spatial == tuple(shape[axis] for axis in like.spatial):
        return "gate"
    return "odd"


def _operand(op: Op, build: Build, node: fx.Node, like: Map, layout: Layout) -> tuple[Any, Any]:
    """An operand for the high and for the low band."""
    value = op.values[node]
    role = _role(value, like, op.shape)
    if role == "full":
        bands = build.bands(node, like, layout)
        return bands.high, bands.low
    dense = build.dense(node)
    if role == "scalar":
        return dense, dense
    missing = len(op.shape) - len(value.shape)
    first = like.channel[0] - missing
    if role == "vector" and len(like.channel) > 1:
        dense = build.method("flatten", dense, first, first + len(like.channel) - 1)
    if role == "vector":
        high, low = (
            build.function(take_channels, dense, run_of(index), first)
            for index in (layout.high_index, layout.low_index)
        )
        return high, low
    axis = min(like.channel)
    if axis == 1:
        return dense, build.function(pool_low, dense, len(like.spatial))
    pooled = build.function(pool_low, build.method("movedim", dense, axis, 1), len(like.spatial))
    return dense, build.method("movedim", pooled, 1, axis)


def _can_pool(found: Map) -> bool:
    """Whether the halved axes are the last ones once the one channel axis stands second."""
    axis, rank = found.channel[0], len(found.shape)
    places = {place + (place < axis) for place in found.spatial}
    return len(found.channel) == 1 and places == set(range(rank - len(found.spatial), rank))


class OfTwo(Elementwise):
    """`torch.max` and `torch.min` of two tensors; of one they reduce."""

    def applies(self, op: Op) -> bool:
        """Whether the second argument is a tensor."""
        return isinstance(op.argument(1, "other"), Map | Plain)
