"""Operations that move channels: cat, chunk, split, slices, views, permutations."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import torch
import torchvision.ops
from torch import fx, nn
from torch.nn import functional as F

from octify.graph import input_nodes, nodes_in, value_of
from octify.layout import Layout, run_of
from octify.ops import full_shape, pad_bands, take_channels
from octify.rules.base import Bands, Build, Dense, Ids, Map, Op, Rule, Ties, register


def select(build: Build, source: Bands, index: Ids, given: Map) -> Any:
    """Some of a value's channels, by position in its flattened order, in any order: bands, or the high band alone."""
    layout = Layout.of(source.layout.bits[int(i)] for i in index)
    where = np.asarray(source.layout.order)[index]
    axis = source.map.channel[0]
    bits = np.asarray(layout.bits, dtype=bool)
    high = _take(build, source.high, where[~bits], source.layout.high, axis)
    if layout.is_dense:
        return high
    low = _take(build, source.low, where[bits] - source.layout.high, source.layout.low, axis)
    return Bands(high, low, layout, given)


def _take(build: Build, band: fx.Node, index: Ids, count: int, axis: int) -> fx.Node:
    if index.tolist() == list(range(count)):
        return band
    return build.function(take_channels, band, run_of(index.tolist()), axis)


class Cat(Rule):
    """Concatenation along the channels: layouts add up."""

    kind = "joins"

    def flow(self, op: Op, ties: Ties) -> Map:
        """Dense parts join as high channels, unless something ties them to low ones."""
        parts = op.argument(0, "tensors")
        maps = [part for part in parts if isinstance(part, Map)]
        first = maps[0]
        axis = op.concrete(1, "dim", op.concrete(1, "axis", 0)) % len(first.shape)
        if first.channel != (axis,) or any(part.channel != (axis,) or part.spatial != first.spatial for part in maps):
            raise Dense("it joins along another axis than the channels")
        ids = [part.ids if isinstance(part, Map) else ties.follow(part.shape[axis]) for part in parts]
        return first.with_ids(np.concatenate(ids), op.shape)

    def emit(self, op: Op, build: Build) -> Bands:
        """Concatenates band by band."""
        given: Map = op.values[op.node]
        layout = build.layout(given)
        axis = given.channel[0]
        high: list[fx.Node] = []
        low: list[fx.Node] = []
        start = 0
        for node in input_nodes(op.node):
            part = layout[start : start + op.values[node].shape[axis]]
            start += part.channels
            if part.is_dense:
                high.append(build.dense(node))
                continue
            bands = build.bands(node, given, part)
            high.append(bands.high)
            low.append(bands.low)
        joined = [
            parts[0] if len(parts) == 1 else build.function(torch.cat, tuple(parts), axis) for parts in (high, low)
        ]
        return Bands(joined[0], joined[1], layout, given)


class Pieces(Rule):
    """chunk, split and unbind along the channels."""

    kind = "splits"

    def flow(self, op: Op, ties: Ties) -> Any:
        """One map a piece."""
        source = op.argument(0, "input")
        if not isinstance(source, Map):
            raise Dense("its input is no map")
        axis = op.concrete(2, "dim", 0) % len(source.shape)
        if source.channel[0] != axis or (self._drops_axis(op) and len(source.channel) < 2):
            raise Dense("it divides another axis than the channels")
        pieces: list[Map] = []
        start = 0
        for value in value_of(op.node):
            count = 1 if self._drops_axis(op) else value.shape[axis]
            ids = source.ids[start : start + count]
            start += count
            pieces.append(self._piece(source, ids, tuple(value.shape), op))
        return tuple(pieces)

    def _drops_axis(self, op: Op) -> bool:
        return "unbind" in str(op.node.target)

    def _piece(self, source: Map, ids: Ids, shape: tuple[int, ...], op: Op) -> Map:
        if not self._drops_axis(op):
            return source.with_ids(ids, shape)
        return Map(shape, ids[0], source.channel[:-1], tuple(axis - 1 for axis in source.spatial))

    def emit(self, op: Op, build: Build) -> Any:
        """Slices of the bands."""
        source: Bands = build.value(input_nodes(op.node)[0])
        pieces: tuple[Map, ...] = op.values[op.node]
        found: list[Any] = []
        start = 0
        for piece in pieces:
            found.append(select(build, source, np.arange(start, start + piece.ids.size), piece))
            start += piece.ids.size
        return tuple(found)


class Glu(Rule):
    """Gated linear units: one half of the channels times the sigmoid of the other, which has the same layout."""

    kind = "joins"

    def flow(self, op: Op, ties: Ties) -> Map:
        """Ties the halves, channel by channel."""
        (found,) = op.maps
        if found.channel != (self._axis(op) % len(found.shape),):
            raise Dense("it gates along another axis than the channels")
        first, second = np.split(found.ids, 2)
        ties.tie(first, second)
        return found.with_ids(first, op.shape)

    def _axis(self, op: Op) -> int:
        return cast(Any, op.module).dim if op.module is not None else op.concrete(1, "dim", -1)

    def emit(self, op: Op, build: Build) -> Bands:
        """The same function once a band: the halves lie one behind the other in each."""
        source: Bands = build.value(input_nodes(op.node)[0])
        given: Map = op.values[op.node]
        high, low = (build.function(F.glu, band, given.channel[0]) for band in (source.high, source.low))
        return Bands(high, low, build.layout(given), given)


class Shuffle(Rule):
    """Channel shuffle as one operation: channels in another order."""

    kind = "splits"

    def flow(self, op: Op, ties: Ties) -> Map:
        """The same channels in another order."""
        (found,) = op.maps
        if found.channel != (1,):
            raise Dense("its channels are not at axis 1")
        return found.with_ids(found.ids[self._order(op, found)], op.shape)

    def _order(self, op: Op, found: Map) -> Ids:
        groups = cast(Any, op.module).groups if op.module is not None else op.concrete(1, "groups")
        return np.transpose(np.reshape(np.arange(found.ids.size), (groups, -1))).ravel()

    def emit(self, op: Op, build: Build) -> Any:
        """Reorders each band's channels."""
        source: Bands = build.value(input_nodes(op.node)[0])
        return select(build, source, self._order(op, source.map), op.values[op.node])


class GetItem(Rule):
    """A piece of a tuple, or a slice of channels."""

    kind = "splits"

    def flow(self, op: Op, ties: Ties) -> Any:
        """The piece's map."""
        source, index = op.argument(0, ""), op.concrete(1, "")
        if isinstance(source, (tuple, list)):
            return source[index]  # pyright: ignore
        if nodes_in(op.node.args[1]):
            raise Dense("its slice depends on the map's size")
        chosen = self._channels(source, index)
        found = cast(Map, source)
        if self._cuts(found, index) and op.too_small(op.shape[axis] for axis in found.spatial):
            raise Dense("its map is less than twice min_size")
        return source.with_ids(chosen, op.shape)

    def _parts(self, source: Map, index: Any) -> tuple[Any, ...]:
        """One entry an axis."""
        parts = cast("tuple[Any, ...]", index if isinstance(index, tuple) else (index,))
        missing = len(source.shape) - len(parts)
        if any(part is Ellipsis for part in parts):
            where = next(i for i, part in enumerate(parts) if part is Ellipsis)
            return (*parts[:where], *(slice(None),) * (missing + 1), *parts[where + 1 :])
        return (*parts, *(slice(None),) * missing)

    def _channels(self, source: Map, index: Any) -> Ids:
        parts = self._parts(source, index)
        if len(source.channel) != 1 or not all(isinstance(part, slice) for part in parts):
            raise Dense("it picks single positions")
        axis = source.channel[0]
        self._cuts(source, index)
        return source.ids[parts[axis]]

    def _cuts(self, source: Map, index: Any) -> list[int]:
        """What a slice cuts off the halved axes, as negative padding (last axis first); empty if nothing."""
        pads: list[int] = []
        for axis, part in reversed(list(enumerate(self._parts(source, index)))):
            start, stop, step = part.indices(source.shape[axis])
            whole = (start, stop, step) == (0, source.shape[axis], 1)
            if axis in source.channel:
                continue
            if not whole and (axis not in source.spatial or step != 1 or not source.is_plain):
                raise Dense("it slices more than channels")
            if axis in source.spatial:
                pads += [-start, self._end(part, source.shape[axis])]
        return pads if any(pads) else []

    def _end(self, part: slice, length: int) -> int:
        """The cut at the end; one counted from the front would depend on the map's size."""
        if part.stop is None or part.stop >= length:
            return 0
        if part.stop < 0:
            return part.stop
        raise Dense("it slices to a fixed position")

    def emit(self, op: Op, build: Build) -> Any:
        """The piece that was emitted, or a slice of the bands."""
        source = build.value(op.node.args[0])  # pyright: ignore
        index = op.concrete(1, "")
        if isinstance(source, (tuple, list)):
            return source[index]  # pyright: ignore
        found: Map = op.values[op.node.args[0]]  # pyright: ignore
        places = Map(found.shape, np.arange(found.ids.size), found.channel, found.spatial)
        cuts = self._cuts(found, index)
        if cuts:
            node = build.function(pad_bands, source.high, source.low, tuple(cuts))
            source = Bands(*build.pair(node), source.layout, found)
        return select(build, source, self._channels(places, index), op.values[op.node])


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
        shift = len(middle) - len(source.channel)
        spatial = tuple(axis + shift if axis > last else axis for axis in source.spatial)
        return Map(shape, np.reshape(source.ids, middle), tuple(range(first, first + len(middle))), spatial)

    def emit(self, op: Op, build: Build) -> Bands:
        """Nothing moves: a band's channels are flattened in the same order."""
        source: Bands = build.value(input_nodes(op.node)[0])
        return Bands(source.high, source.low, source.layout, op.values[op.node])


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


register(Cat(), functions=(torch.cat, torch.concat, torch.concatenate))
register(Pieces(), functions=(torch.chunk, torch.split, torch.unbind), methods=("chunk", "split"))
register(Glu(), modules=(nn.GLU,), functions=(F.glu,))
register(Shuffle(), modules=(nn.ChannelShuffle,), functions=(torch.channel_shuffle,))  # also F.channel_shuffle
register(GetItem(), functions=(operator.getitem,))
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
