"""Operations that move channels: cat, chunk, split, slices, shuffles."""

from __future__ import annotations

import operator
from typing import Any, cast

import numpy as np
import torch
from torch import fx, nn
from torch.nn import functional as F

from octify.graph import input_nodes, map_nodes, nodes_in, value_of
from octify.ops import crop_bands
from octify.rules.base import Bands, Build, Dense, Ids, Map, Op, Rule, Ties, register
from octify.rules.select import select


class Cat(Rule):
    """Concatenation along the channels: layouts add up."""

    kind = "joins"
    passes_on = True

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
    passes_on = True

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
    """A piece of a tuple; or a slice of channels, and of the map from some place to another."""

    kind = "splits"
    passes_on = True

    def flow(self, op: Op, ties: Ties) -> Any:
        """The piece's map."""
        source, index = op.argument(0, ""), op.concrete(1, "")
        if isinstance(source, (tuple, list)):
            return source[index]  # pyright: ignore
        found = cast(Map, source)
        parts = self._parts(found, index)
        if len(found.channel) != 1 or not all(isinstance(part, slice) for part in parts):
            raise Dense("it picks single positions")
        if self._crops(op, found) and op.too_small(op.shape[axis] for axis in found.spatial):
            raise Dense("its map is less than twice min_size")
        return found.with_ids(found.ids[parts[found.channel[0]]], op.shape)

    def _parts(self, source: Map, index: Any) -> tuple[Any, ...]:
        """One entry an axis."""
        parts = cast("tuple[Any, ...]", index if isinstance(index, tuple) else (index,))
        missing = len(source.shape) - len(parts)
        if any(part is Ellipsis for part in parts):
            where = next(i for i, part in enumerate(parts) if part is Ellipsis)
            return (*parts[:where], *(slice(None),) * (missing + 1), *parts[where + 1 :])
        return (*parts, *(slice(None),) * missing)

    def _crops(self, op: Op, source: Map) -> tuple[tuple[int, Any, Any], ...]:
        """Halved axes that are cut, counted from the last, from where and to where: as the source computes it."""
        crops: list[tuple[int, Any, Any]] = []
        for axis, part in enumerate(self._parts(source, op.node.args[1])):
            if axis in source.channel:
                if nodes_in(part):
                    raise Dense("its slice of channels depends on the map's size")
            elif part != slice(None):
                if axis not in source.spatial or part.step not in (None, 1) or not source.is_plain:
                    raise Dense("it slices more than channels")
                crops.append((len(source.shape) - 1 - axis, part.start, part.stop))
        return tuple(crops)

    def emit(self, op: Op, build: Build) -> Any:
        """The piece that was emitted, or a slice of the bands."""
        source = build.value(op.node.args[0])  # pyright: ignore
        index = op.concrete(1, "")
        if isinstance(source, (tuple, list)):
            return source[index]  # pyright: ignore
        found: Map = op.values[op.node.args[0]]  # pyright: ignore
        if crops := map_nodes(self._crops(op, found), build.dense):
            node = build.function(crop_bands, source.high, source.low, crops)
            source = Bands(*build.pair(node), source.layout, found)
        channels = np.arange(found.ids.size)[self._parts(found, index)[found.channel[0]]]
        return select(build, source, channels, op.values[op.node])


register(Cat(), functions=(torch.cat, torch.concat, torch.concatenate))
register(Pieces(), functions=(torch.chunk, torch.split, torch.unbind), methods=("chunk", "split"))
register(Glu(), modules=(nn.GLU,), functions=(F.glu,))
register(Shuffle(), modules=(nn.ChannelShuffle,), functions=(torch.channel_shuffle,))  # also F.channel_shuffle
register(GetItem(), functions=(operator.getitem,))
