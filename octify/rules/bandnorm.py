"""Norms whose statistics join both bands: over positions (group norm's kin) and over channels (layer norm's kin)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import timm.layers
import torch
from timm.layers.grn import GlobalResponseNorm
from timm.layers.norm import LayerNormExp2d
from torch import fx, nn
from torch.nn import functional as F
from torchvision.models.convnext import LayerNorm2d as TorchvisionLayerNorm2d

from octify.graph import input_nodes, value_of
from octify.layout import Layout
from octify.norms import BandNorm, OctChannelNorm, OctEvoNorm, OctFilterResponse, OctGlobalResponse, OctGroupNorm
from octify.rules.base import Bands, Build, Dense, Map, Op, Rule, Ties, register

tl = cast(Any, timm.layers)
APPROXIMATE = "approximate on the low band: its activation acts on the mean of 2x2 positions"
Make = Callable[[Any, Layout, Map], BandNorm]


class ModuleNorm(Rule):
    """A norm module; the low band's positions count for those that they stand for, so it is exact.

    Exact with its activation too: a low band that stands for 2x2 blocks still does behind a scale a channel.
    """

    def __init__(self, make: Make) -> None:
        self.make = make

    def flow(self, op: Op, ties: Ties) -> Map:
        """Keeps its input's channels."""
        (found,) = op.maps
        axis = len(found.shape) - 1 if getattr(op.module, "channel_dim", 1) == -1 else 1
        if found.channel != (axis,):
            raise Dense("its input's axes are in another order")
        refuse_mixing(op.module)
        return found

    def emit(self, op: Op, build: Build) -> Bands:
        """One module over both bands, under the source's name."""
        source: Bands = build.value(input_nodes(op.node)[0])
        node = build.module(
            lambda: self.make(build.source_module(), source.layout, source.map), source.high, source.low
        )
        return Bands(*build.pair(node), source.layout, source.map)


class FunctionNorm(Rule):
    """`F.group_norm` (and `F.instance_norm` without running statistics)."""

    def flow(self, op: Op, ties: Ties) -> Map:
        """Keeps its input's channels."""
        found = op.argument(0, "input")
        if not isinstance(found, Map) or found.channel != (1,):
            raise Dense("its input's axes are in another order")
        return found

    def emit(self, op: Op, build: Build) -> Bands:
        """One module without parameters over both bands; the source's parameters are passed to it."""
        first: fx.Node = op.node.args[0] if op.node.args else op.node.kwargs["input"]  # pyright: ignore
        source: Bands = build.value(first)
        groups, eps = op.concrete(1, "num_groups"), op.concrete(4, "eps", 1e-5)
        weight, bias = (build.rest(_raw(op, index, name)) for index, name in ((2, "weight"), (3, "bias")))
        spatial = len(source.map.spatial)
        node = build.module(
            lambda: OctGroupNorm(source.layout, spatial, groups, eps), source.high, source.low, weight, bias
        )
        return Bands(*build.pair(node), source.layout, source.map)


def _raw(op: Op, position: int, name: str) -> Any:
    return op.node.args[position] if position < len(op.node.args) else op.node.kwargs.get(name)


def refuse_mixing(module: nn.Module | None) -> None:
    """Refuses norms whose inner activation or dropout knows channels.

    Raises:
        Dense: with the reason.
    """
    if type(getattr(module, "drop", None)) not in (type(None), nn.Identity):
        raise Dense("its dropout inside draws a mask over positions")
    act = getattr(module, "act", None)
    if isinstance(act, nn.Module) and any(parameter.numel() > 1 for parameter in act.parameters()):
        raise Dense("its activation has parameters a channel")


def _group(norm: Any, layout: Layout, found: Map) -> BandNorm:
    return OctGroupNorm(layout, len(found.spatial), norm.num_groups, norm.eps).take(norm)


def _evo(norm: Any, layout: Layout, found: Map) -> BandNorm:
    kind = cast(Any, type(norm))
    divides = norm.apply_act or kind in (tl.EvoNorm2dS0a, tl.EvoNorm2dS1a, tl.EvoNorm2dS2a)
    rms = kind in (tl.EvoNorm2dS2, tl.EvoNorm2dS2a)
    made = OctEvoNorm(layout, len(found.spatial), norm.groups, norm.eps, rms, divides).take(norm, "v")
    return made


def _filter(norm: Any, layout: Layout, found: Map) -> BandNorm:
    return OctFilterResponse(layout, len(found.spatial), norm.eps).take(norm, "tau")


def _response(norm: Any, layout: Layout, found: Map) -> BandNorm:
    axis = 1 if found.channel == (1,) else -1
    return OctGlobalResponse(layout, len(found.spatial), axis, norm.eps).take(norm)


class ChannelNorm(Rule):
    """A norm module over all channels of a position, at axis 1 or the last; exact up to its activation inside."""

    def __init__(self, kind: str, last: bool) -> None:
        self.kind_of_norm = kind
        self.last = last

    def flow(self, op: Op, ties: Ties) -> Map:
        """Keeps its input's channels; the statistics join both bands."""
        norm: Any = op.module
        found = op.argument(0, "input")
        rank = len(op.shape)
        if not isinstance(found, Map) or found.channel != ((rank - 1,) if self.last else (1,)):
            raise Dense("its input's axes are in another order")
        if tuple(norm.normalized_shape) != (found.ids.size,):
            raise Dense("it normalises over more than the channels")
        refuse_mixing(norm)
        if type(getattr(norm, "act", nn.Identity())) is not nn.Identity:
            ties.note(APPROXIMATE)
        return found

    def emit(self, op: Op, build: Build) -> Bands:
        """One module over both bands, under the source's name."""
        source: Bands = build.value(input_nodes(op.node)[0])
        axis = -1 if self.last else 1

        def make() -> nn.Module:
            norm: Any = build.source_module()
            eps = torch.finfo(value_of(op.node).dtype).eps if norm.eps is None else norm.eps
            return OctChannelNorm(source.layout, len(source.map.spatial), axis, self.kind_of_norm, eps).take(norm)

        return Bands(*build.pair(build.module(make, source.high, source.low)), source.layout, source.map)


class FunctionChannelNorm(Rule):
    """`F.layer_norm`, `F.rms_norm` and `F.normalize` over the channels."""

    def __init__(self, kind: str, names: tuple[str, ...], eps: float | None) -> None:
        self.kind_of_norm = kind
        self.names = names
        self.eps = eps

    def flow(self, op: Op, ties: Ties) -> Map:
        """Keeps its input's channels."""
        found = op.argument(0, "input")
        if not isinstance(found, Map) or self._axes(op, found) != found.channel or len(found.channel) > 1:
            raise Dense("it normalises over other axes than the channels")
        if self._eps(op) is None or op.node.kwargs.get("out") is not None:
            raise Dense("its eps is left to the input's type")
        return found

    def _axes(self, op: Op, found: Map) -> tuple[int, ...]:
        rank = len(found.shape)
        if self.kind_of_norm != "unit":
            shape: Any = op.concrete(1, "normalized_shape")
            return tuple(range(rank - len(shape), rank))
        if op.concrete(1, "p", 2.0) != 2:
            return ()
        return (op.concrete(2, "dim", 1) % rank,)

    def _eps(self, op: Op) -> float | None:
        return op.concrete(3 if self.kind_of_norm == "unit" else 2 + len(self.names), "eps", self.eps)

    def emit(self, op: Op, build: Build) -> Bands:
        """One module without parameters over both bands; the source's parameters are passed to it."""
        first: fx.Node = op.node.args[0] if op.node.args else op.node.kwargs["input"]  # pyright: ignore
        source: Bands = build.value(first)
        eps: Any = self._eps(op)
        axis = source.map.channel[0]
        given: list[Any] = []
        for position, name in enumerate(self.names, 2):
            raw = op.node.args[position] if position < len(op.node.args) else op.node.kwargs.get(name)
            given.append(build.rest(raw))
        node = build.module(
            lambda: OctChannelNorm(source.layout, len(source.map.spatial), axis, self.kind_of_norm, eps),
            source.high, source.low, *given,
        )  # fmt: skip
        return Bands(*build.pair(node), source.layout, source.map)


GROUP_NORMS = (nn.GroupNorm, tl.GroupNorm, tl.GroupNorm1, tl.GroupNormAct, tl.GroupNorm1Act)
EVO_NORMS = (
    tl.EvoNorm2dS0, tl.EvoNorm2dS0a, tl.EvoNorm2dS1, tl.EvoNorm2dS1a, tl.EvoNorm2dS2, tl.EvoNorm2dS2a,
)  # fmt: skip

register(ModuleNorm(_group), modules=GROUP_NORMS)
register(ModuleNorm(_evo), modules=EVO_NORMS)
register(ModuleNorm(_filter), modules=(tl.FilterResponseNormTlu2d, tl.FilterResponseNormAct2d))
register(ModuleNorm(_response), modules=(GlobalResponseNorm,))
register(FunctionNorm(), functions=(F.group_norm,))
register(
    ChannelNorm("layer", last=False),
    modules=(
        tl.LayerNorm2d, tl.LayerNorm2dFp32, LayerNormExp2d, TorchvisionLayerNorm2d, tl.LayerNormAct2d,
        tl.LayerNormAct2dFp32,
    ),
)  # fmt: skip
register(
    ChannelNorm("layer", last=True),
    modules=(nn.LayerNorm, tl.LayerNorm, tl.LayerNormFp32, tl.LayerNormAct, tl.LayerNormActFp32),
)
register(
    ChannelNorm("rms", last=False),
    modules=(tl.RmsNorm2d, tl.RmsNorm2dFp32, tl.RmsNormAct2d, tl.RmsNormAct2dFp32),
)
register(
    ChannelNorm("rms", last=True),
    modules=(nn.RMSNorm, tl.RmsNorm, tl.RmsNormFp32, tl.RmsNormAct, tl.RmsNormActFp32),
)
register(ChannelNorm("simple", last=False), modules=(tl.SimpleNorm2d, tl.SimpleNorm2dFp32))
register(ChannelNorm("simple", last=True), modules=(tl.SimpleNorm, tl.SimpleNormFp32))
register(FunctionChannelNorm("layer", ("weight", "bias"), 1e-5), functions=(F.layer_norm,))
register(FunctionChannelNorm("rms", ("weight",), None), functions=(F.rms_norm,))
register(FunctionChannelNorm("unit", (), 1e-12), functions=(F.normalize,))
