"""Operations that move the grid: padding, spatial slices, blur pooling, pooling padded at run time."""

from __future__ import annotations

from typing import Any, cast

from timm.layers.blur_pool import BlurPool2d
from timm.layers.pool2d_same import AvgPool2dSame, MaxPool2dSame
from torch import nn
from torch.nn import functional as F

from octify.graph import input_nodes, map_nodes, nodes_in, slice_channels
from octify.ops import pad_bands
from octify.pooling import Twin
from octify.rules.base import Bands, Build, Dense, Map, Op, Rule, Ties, register


class Pad(Rule):
    """Padding of the halved axes; the low band by half of it, averaged with its neighbour where that is no integer."""

    def flow(self, op: Op, ties: Ties) -> Map:
        """Keeps its input's channels."""
        source = op.argument(0, "input")
        if not isinstance(source, Map) or not source.is_plain:
            raise Dense("its input's axes are in another order")
        size = [op.shape[axis] for axis in source.spatial]
        if op.too_small(size):
            raise Dense(f"its map of {'x'.join(map(str, size))} is less than twice min_size")
        pads, mode, value = self._arguments(op)
        if not all(isinstance(amount, int) for amount in pads) or nodes_in((mode, value)):
            raise Dense("its padding is no list of numbers")
        if len(pads) > 2 * len(source.spatial) and any(pads[2 * len(source.spatial) :]):
            raise Dense("it pads more than the halved axes")
        return source.with_ids(source.ids, op.shape)

    def _arguments(self, op: Op) -> tuple[tuple[Any, ...], str, float]:
        """Amounts (at the example's size), mode and value."""
        module: Any = op.module
        if module is not None:
            return tuple(module.padding), _MODES[type(module)], float(getattr(module, "value", 0.0))
        pads, mode = op.concrete(1, "pad"), op.concrete(2, "mode", "constant")
        return tuple(pads), mode, float(op.concrete(3, "value") or 0.0)

    def _amounts(self, op: Op, build: Build) -> tuple[Any, ...]:
        """The amounts as arguments; what the source computes from sizes is computed in the octave network, too."""
        module: Any = op.module
        if module is not None:
            return tuple(module.padding)
        raw: Any = op.node.args[1] if len(op.node.args) > 1 else op.node.kwargs["pad"]
        return tuple(map_nodes(tuple(raw), build.dense))

    def emit(self, op: Op, build: Build) -> Bands:
        """One function over both bands."""
        source: Bands = build.value(op.node.args[0] if op.node.args else op.node.kwargs["input"])  # pyright: ignore
        _, mode, value = self._arguments(op)
        pads = self._amounts(op, build)
        pads = (*pads, *(0,) * (2 * len(source.map.spatial) - len(pads)))[: 2 * len(source.map.spatial)]
        node = build.function(pad_bands, source.high, source.low, pads, mode, value)
        return Bands(*build.pair(node), source.layout, op.values[op.node])


class Same(Rule):
    """timm's pooling padded at run time: ⌈⌈H/s⌉/2⌉ is ⌈⌈H/2⌉/s⌉, so that the low band takes the same module."""

    def flow(self, op: Op, ties: Ties) -> Map:
        """Keeps its input's channels."""
        source = _pooled(op)
        ties.note("approximate on the low band")
        return source

    def emit(self, op: Op, build: Build) -> Bands:
        """The same module twice."""
        source: Bands = build.value(input_nodes(op.node)[0])
        some = source.layout.high > 0
        node = build.module(
            lambda: Twin(build.source_module() if some else None, build.source_module()), source.high, source.low
        )
        return Bands(*build.pair(node), source.layout, op.values[op.node])


class Blur(Rule):
    """timm's blur pooling: a fixed filter a channel."""

    def flow(self, op: Op, ties: Ties) -> Map:
        """Keeps its input's channels."""
        blur: Any = op.module
        if 2 * blur.padding[0] < blur.filt_size - 1 - (blur.filt_size % 2 == 0):
            raise Dense("its padding is not half of its filter")
        source = _pooled(op)
        ties.note("approximate on the low band")
        return source

    def emit(self, op: Op, build: Build) -> Bands:
        """The filter for each band's channels."""
        source: Bands = build.value(input_nodes(op.node)[0])
        layout = source.layout

        def part(index: tuple[int, ...]) -> nn.Module:
            copied = slice_channels(cast(nn.Module, op.module), index, layout.channels, ())
            if getattr(copied, "channels", None) is not None:
                setattr(copied, "channels", len(index))  # noqa: B010
            return copied

        def make() -> nn.Module:
            return Twin(part(layout.high_index) if layout.high else None, part(layout.low_index))

        node = build.module(make, source.high, source.low)
        return Bands(*build.pair(node), layout, op.values[op.node])


def _pooled(op: Op) -> Map:
    (source,) = op.maps
    if not source.is_plain:
        raise Dense("its input's axes are in another order")
    size = [op.shape[axis] for axis in source.spatial]
    if op.too_small(size):
        raise Dense(f"its map of {'x'.join(map(str, size))} is less than twice min_size")
    return source.with_ids(source.ids, op.shape)


_MODES: dict[type[nn.Module], str] = {
    nn.ZeroPad1d: "constant", nn.ZeroPad2d: "constant", nn.ZeroPad3d: "constant",
    nn.ConstantPad1d: "constant", nn.ConstantPad2d: "constant", nn.ConstantPad3d: "constant",
    nn.ReflectionPad1d: "reflect", nn.ReflectionPad2d: "reflect", nn.ReflectionPad3d: "reflect",
    nn.ReplicationPad1d: "replicate", nn.ReplicationPad2d: "replicate", nn.ReplicationPad3d: "replicate",
    nn.CircularPad1d: "circular", nn.CircularPad2d: "circular", nn.CircularPad3d: "circular",
}  # fmt: skip

register(Pad(), modules=_MODES, functions=(F.pad,))
register(Same(), modules=(MaxPool2dSame, AvgPool2dSame))
register(Blur(), modules=(BlurPool2d,))
