"""Operations that regroup or reorder axes, and those that ask for sizes."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import torch
import torchvision.ops
from torch import nn

from octify.graph import input_nodes, value_of
from octify.ops import full_shape
from octify.rules.base import Bands, Build, Dense, Map, Op, Rule, Ties, register
from octify.rules.select import select


class View(Rule):
    """A view that regroups the channel axes and leaves the others (both halves of a channel shuffle)."""

    kind = "splits"

    def flow(self, op: Op, ties: Ties) -> Map:
        """The same channels under other axes."""
        source = op.argument(0, "input")
        if not isinstance(source, Map):
            raise Dense("its input is no map")
        first, last = source.channel[0], source.channel[-1]
        head, tail = source.shape[:first], source.shape[last + 1 :]
        shape = op.shape
        middle = shape[first : len(shape) - len(tail)]
        if shape[:first] != head or shape[len(shape) - len(tail) :] != tail or math.prod(middle) != source.ids.size:
            raise Dense("it reshapes more than channels")
        if not middle:
            raise Dense("it drops the channel axis")
        if head[:1] == (1,) and _first_size(op) == 1:
            raise Dense("it makes one image of a batch")
        shift = len(middle) - len(source.channel)
        spatial = tuple(axis + shift if axis > last else axis for axis in source.spatial)
        return Map(shape, np.reshape(source.ids, middle), tuple(range(first, first + len(middle))), spatial)

    def emit(self, op: Op, build: Build) -> Bands:
        """Nothing moves: a band's channels are flattened in the same order."""
        source: Bands = build.value(input_nodes(op.node)[0])
        return Bands(source.high, source.low, source.layout, op.values[op.node])


def _first_size(op: Op) -> object:
    """The first axis's length as the source writes it: a number, or a node that computes one."""
    sizes: Any = op.node.args[1] if len(op.node.args) > 1 else op.node.kwargs.get("shape")
    return next(iter(cast("list[Any]", sizes)), None) if isinstance(sizes, (tuple, list)) else sizes


class Permute(Rule):
    """Axes in another order: channels-last maps, and the transposition inside a channel shuffle."""

    kind = "splits"

    def flow(self, op: Op, ties: Ties) -> Map:
        """The same channels, possibly in another order."""
        source = op.argument(0, "input")
        if not isinstance(source, Map):
            raise Dense("its input is no map")
        order = self._order(op, source)
        channel = tuple(position for position, axis in enumerate(order) if axis in source.channel)
        if channel != tuple(range(channel[0], channel[0] + len(channel))):
            raise Dense("it tears the channel axes apart")
        inner = [source.channel.index(order[position]) for position in channel]
        spatial = tuple(order.index(axis) for axis in source.spatial)
        if 0 in (*channel, *spatial):
            raise Dense("it moves the images from the first axis")
        return Map(op.shape, np.transpose(source.ids, inner), channel, spatial)

    def _order(self, op: Op, source: Map) -> list[int]:
        rank = len(source.shape)
        name = op.node.target if isinstance(op.node.target, str) else getattr(op.node.target, "__name__", "")
        if op.node.op == "call_module":
            return [axis % rank for axis in op.module.dims]  # pyright: ignore
        if name in ("transpose", "swapaxes"):
            first, second = (op.concrete(i, n) % rank for i, n in ((1, "dim0"), (2, "dim1")))
            order = list(range(rank))
            order[first], order[second] = second, first
            return order
        dims: Any = op.concrete(1, "dims")
        if isinstance(dims, int):
            dims = [op.concrete(i, "") for i in range(1, len(op.node.args))]
        return [axis % rank for axis in dims]

    def emit(self, op: Op, build: Build) -> Any:
        """Permutes each band's axes, then reorders channels if the channel axes changed places."""
        source: Bands = build.value(input_nodes(op.node)[0])
        given: Map = op.values[op.node]
        order = self._order(op, source.map)
        flat = _flatten_order(order, source.map.channel)
        bands = [source.high, source.low]
        if flat != list(range(len(flat))):
            bands = [build.method("permute", band, *flat) for band in bands]
        moved = Bands(bands[0], bands[1], source.layout, given)
        places = np.reshape(np.arange(source.map.ids.size), source.map.ids.shape)
        inner = [source.map.channel.index(order[position]) for position in given.channel]
        index = np.transpose(places, inner).ravel()
        return select(build, moved, index, given)


def _flatten_order(order: Sequence[int], channel: Sequence[int]) -> list[int]:
    """A permutation of axes with the channel axes taken as one."""
    first, extra = channel[0], len(channel) - 1
    merged = [axis for axis in order if axis not in channel[1:]]
    return [axis if axis <= first else axis - extra for axis in merged]


class Shape(Rule):
    """Sizes: as in the source, whatever band they are read from."""

    kind = "closes"

    def flow(self, op: Op, ties: Ties) -> Any:
        """A number or a shape, nothing with channels."""
        name = op.node.args[1] if op.node.op == "call_function" else ""
        if op.node.op == "call_function" and name not in ("shape", "ndim", "dtype", "device", "is_cuda"):
            raise Dense(f"its attribute {name} has no meaning on bands")
        return value_of(op.node)

    def emit(self, op: Op, build: Build) -> Any:
        """Reads the high band, which has the source's size."""
        source: Bands = build.value(op.node.args[0])  # pyright: ignore
        name = str(op.node.args[1] if op.node.op == "call_function" else op.node.target)
        if name in ("dtype", "device", "is_cuda"):
            return build.function(getattr, source.high, name)
        if name in ("dim", "ndimension", "ndim"):
            return len(source.map.shape)
        channels = tuple(source.map.shape[axis] for axis in source.map.channel)
        shape = build.function(full_shape, source.high, channels, source.map.channel[0])
        where = op.argument(1, "dim") if name == "size" else None
        return shape if where is None else build.function(operator.getitem, shape, build.rest(where))


register(
    View(), functions=(torch.reshape, torch.unsqueeze, torch.squeeze, torch.flatten), modules=(nn.Flatten,),
    methods=("view", "reshape", "unsqueeze", "squeeze", "flatten", "unflatten"),
)  # fmt: skip
register(
    Permute(), modules=(torchvision.ops.Permute,), functions=(torch.permute, torch.transpose),
    methods=("permute", "transpose"),
)  # fmt: skip
register(Shape(), functions=(getattr,), methods=("size", "dim", "ndimension"))
register(View(), modules=(nn.Unflatten,))
