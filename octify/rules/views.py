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
    passes_on = True

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
    passes_on = True

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
        """Which axis comes to stand where: asked of a tensor whose axes differ in length."""
        marked = torch.empty([2 + axis for axis in range(len(source.shape))], device="meta")
        args = [op.concrete(position, "") for position in range(1, len(op.node.args))]
        options = {name: op.concrete(len(op.node.args), name) for name in op.node.kwargs if name != "input"}
        target: Any = op.module or op.node.target
        move = getattr(torch.Tensor, target) if isinstance(target, str) else target
        return [length - 2 for length in move(marked, *args, **options).shape]

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


MOVES = ("permute", "transpose", "swapaxes", "swapdims", "movedim", "moveaxis")

register(
    View(), functions=(torch.reshape, torch.unsqueeze, torch.squeeze, torch.flatten), modules=(nn.Flatten,),
    methods=("view", "reshape", "unsqueeze", "squeeze", "flatten", "unflatten"),
)  # fmt: skip
register(
    Permute(), modules=(torchvision.ops.Permute,), methods=MOVES,
    functions=[getattr(torch, name) for name in MOVES],
)  # fmt: skip
register(Shape(), functions=(getattr,), methods=("size", "dim", "ndimension"))
register(View(), modules=(nn.Unflatten,))
