"""Per-channel modules: each band gets its own slice of the parameters and statistics."""

from __future__ import annotations

from typing import Any, cast

import timm.layers
from torch import nn
from torchvision.ops import FrozenBatchNorm2d

from octify.graph import input_nodes, slice_channels
from octify.norms import OctGroupNorm
from octify.rules.base import Bands, Build, Dense, Map, Op, Rule, Ties, register

tl = cast(Any, timm.layers)


class PerChannel(Rule):
    """A module whose channels do not mix; `attributes` are those that hold the channel count.

    Its channels are at axis 1, or at the `last`.
    """

    def __init__(self, *attributes: str, last: bool = False) -> None:
        self.attributes = attributes
        self.last = last

    def flow(self, op: Op, ties: Ties) -> Map:
        """Keeps its input's channels."""
        (found,) = op.maps
        if found.channel != (len(found.shape) - 1 if self.last else 1,):
            raise Dense("its input's axes are in another order")
        return found

    def emit(self, op: Op, build: Build) -> Bands:
        """The source's module twice, under its name as `high` and `low`."""
        source: Bands = build.value(input_nodes(op.node)[0])
        layout = source.layout

        def part(index: tuple[int, ...]) -> Any:
            return lambda: slice_channels(op.module, index, layout.channels, self.attributes)  # pyright: ignore

        high = source.high
        if layout.high:
            high = build.module(part(layout.high_index), source.high, part="high")
        low = build.module(part(layout.low_index), source.low, part="low")
        return Bands(high, low, layout, source.map)


class InstanceNorm(PerChannel):
    """Without running statistics a norm by those of the map: low positions count for the ones they stand for."""

    def emit(self, op: Op, build: Build) -> Bands:
        """A group norm of one channel a group; with running statistics the module twice."""
        norm: Any = op.module
        if norm.track_running_stats:
            return super().emit(op, build)
        source: Bands = build.value(input_nodes(op.node)[0])
        layout, spatial = source.layout, len(source.map.spatial)

        def make() -> nn.Module:
            return OctGroupNorm(layout, spatial, layout.channels, norm.eps).take(build.source_module())

        return Bands(*build.pair(build.module(make, source.high, source.low)), layout, source.map)


class Slopes(PerChannel):
    """`nn.PReLU`: one slope a channel, or one for all, which the bands share."""

    def emit(self, op: Op, build: Build) -> Bands:
        """The module twice, or one module called twice."""
        prelu: Any = op.module
        if prelu.weight.numel() > 1:
            return super().emit(op, build)
        source: Bands = build.value(input_nodes(op.node)[0])
        high, low = (build.module(build.source_module, band) for band in (source.high, source.low))
        return Bands(high, low, source.layout, source.map)


register(
    PerChannel("num_features"),
    modules=(
        nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm, tl.BatchNormAct2d, tl.SyncBatchNormAct,
        tl.FrozenBatchNormAct2d, FrozenBatchNorm2d,
    ),
)  # fmt: skip
register(InstanceNorm("num_features"), modules=(nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d))
register(PerChannel(), modules=(tl.LayerScale2d, tl.EvoNorm2dB0, tl.EvoNorm2dB1, tl.EvoNorm2dB2))
register(PerChannel(last=True), modules=(tl.LayerScale,))
register(Slopes("num_parameters"), modules=(nn.PReLU, tl.PReLU))
