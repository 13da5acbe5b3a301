"""Pixel shuffle and its inverse: positions become channels, and back."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn

from octify.graph import input_nodes
from octify.ops import shuffle_bands, unshuffle_bands
from octify.rules.base import Bands, Build, Dense, Ids, Map, Op, Rule, Ties, register


class PixelShuffle(Rule):
    """`(B, C·r², H, W)` to `(B, C, rH, rW)`: the r² channels that become one are all high or all low."""

    kind = "splits"

    def flow(self, op: Op, ties: Ties) -> Map:
        """One channel of each r²; the low band's is exact for the map that it stands for."""
        source, factor = _map_of(op), _factor(op)
        parts: Ids = np.reshape(source.ids, (-1, factor * factor))
        for place in range(1, factor * factor):
            ties.tie(parts[:, 0], parts[:, place])
        return source.with_ids(parts[:, 0], op.shape)

    def emit(self, op: Op, build: Build) -> Bands:
        """One function over both bands."""
        return _over_both(shuffle_bands, op, build)


class PixelUnshuffle(Rule):
    """`(B, C, rH, rW)` to `(B, C·r², H, W)`: the r² channels that one becomes are as it is."""

    kind = "splits"

    def flow(self, op: Op, ties: Ties) -> Map:
        """r² channels of each."""
        source, factor = _map_of(op), _factor(op)
        size = [op.shape[axis] for axis in source.spatial]
        if op.too_small(size):
            raise Dense(f"its map of {'x'.join(map(str, size))} is less than twice min_size")
        return source.with_ids(source.ids.repeat(factor * factor), op.shape)

    def emit(self, op: Op, build: Build) -> Bands:
        """One function over both bands."""
        return _over_both(unshuffle_bands, op, build)


def _map_of(op: Op) -> Map:
    source = op.argument(0, "input")
    if not isinstance(source, Map) or not source.is_plain or len(source.shape) != 4:
        raise Dense("its input is no batch of channels-first images")
    return source


def _factor(op: Op) -> int:
    names = ("upscale_factor", "downscale_factor")
    if op.module is not None:
        return next(vars(op.module)[name] for name in names if name in vars(op.module))
    return op.concrete(1, names[0]) or op.concrete(1, names[1])


def _over_both(function: Any, op: Op, build: Build) -> Bands:
    source: Bands = build.value(input_nodes(op.node)[0])
    given: Map = op.values[op.node]
    node = build.function(function, source.high, source.low, _factor(op))
    return Bands(*build.pair(node), build.layout(given), given)


register(PixelShuffle(), modules=(nn.PixelShuffle,), functions=(torch.pixel_shuffle,))  # also F.pixel_shuffle
register(PixelUnshuffle(), modules=(nn.PixelUnshuffle,), functions=(torch.pixel_unshuffle,))
