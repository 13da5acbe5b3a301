"""Transposed convolutions: they choose the layout of what they give and read any layout."""

from __future__ import annotations

from typing import Any

from torch import nn

from octify.graph import input_nodes
from octify.layers import OctConvTranspose, OctConvTranspose1d, OctConvTranspose2d, OctConvTranspose3d
from octify.layout import Layout
from octify.rules.base import Bands, Build, Dense, Map, Op, Plain, Rule, Ties, register

OCTAVE: dict[int, type[OctConvTranspose]] = {1: OctConvTranspose1d, 2: OctConvTranspose2d, 3: OctConvTranspose3d}


class Transposed(Rule):
    """Folded kernels in the geometry of a transposed convolution; the last rows of odd sizes are approximate."""

    kind = "chooses"

    def flow(self, op: Op, ties: Ties) -> Map:
        """Reads any layout; gives new channels, those of its input if it is depthwise."""
        conv: Any = op.module
        source = op.argument(0, "input")
        rank = len(op.shape)
        if rank != len(conv.kernel_size) + 2 or not isinstance(source, (Map, Plain)):
            raise Dense("its input is no batch of maps")
        if isinstance(source, Map) and not source.is_plain:
            raise Dense("its input's axes are in another order")
        if len(op.node.args) + len(op.node.kwargs) > 1:
            raise Dense("its output size is given at run time")
        spatial = tuple(range(rank - min(2, rank - 2), rank))
        why = _small(op, source, spatial)
        if isinstance(source, Map) and conv.groups == conv.in_channels > 1:
            return self._depthwise(op, source, ties, why)
        if isinstance(source, Map):
            ties.read(source.ids)
            if conv.groups > 1:
                ties.balance(source.ids, conv.groups)
        ids = ties.high(conv.out_channels, why) if why else ties.free(conv.out_channels)
        if conv.groups > 1 and not why:
            ties.balance(ids, conv.groups)
        return Map(op.shape, ids, (1,), spatial)

    def _depthwise(self, op: Op, source: Map, ties: Ties, why: str) -> Map:
        conv: Any = op.module
        if why:
            raise Dense(why)
        ids = source.ids.repeat(conv.out_channels // conv.in_channels)
        ties.write(ids)
        return source.with_ids(ids, op.shape)

    def options(self, op: Op, reads: list[Layout], gives: list[Layout]) -> tuple[dict[str, Any], list[str]]:
        """Which paths there are, if not all; the paper has no kernels for it."""
        settings = op.settings
        notes = ["folded kernels: the paper has no transposed convolution"] if settings.kernels == "paper" else []
        return ({"paths": list(settings.paths)} if len(settings.paths) < 4 else {}), notes

    def emit(self, op: Op, build: Build) -> Any:
        """One transposed octave convolution under the source's name."""
        conv: Any = op.module
        source = build.value(input_nodes(op.node)[0])
        given: Map = op.values[op.node]
        gives = build.layout(given)
        reads = source.layout if isinstance(source, Bands) else Layout.dense(conv.in_channels)
        options = build.options()

        def make() -> nn.Module:
            return OCTAVE[len(conv.kernel_size)].from_conv(conv, reads, gives, **options)

        arguments = (source.high, source.low) if isinstance(source, Bands) else (source,)
        node = build.module(make, *arguments)
        return node if gives.is_dense else Bands(*build.pair(node), gives, given)


def _small(op: Op, source: Map | Plain, spatial: tuple[int, ...]) -> str:
    """What `min_size` is held to: its output's map, and its input's, which is smaller, if that may be split."""
    for shape in (source.shape, op.shape) if isinstance(source, Map) else (op.shape,):
        size = tuple(shape[axis] for axis in spatial)
        if op.too_small(size):
            return f"its map of {'x'.join(map(str, size))} is less than twice min_size"
    return ""


register(Transposed(), modules=(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d))
