"""Convolutions: they choose the layout of what they give and read any layout."""

from __future__ import annotations

from typing import Any, cast

import torch
from timm.layers.conv2d_same import Conv2dSame
from timm.layers.std_conv import ScaledStdConv2d, ScaledStdConv2dSame, StdConv2d, StdConv2dSame
from torch import Tensor, fx, nn
from torch.nn import functional as F

from octify.graph import shape_of, value_of
from octify.layers import OctConv, OctConv1d, OctConv2d, OctConv3d, fits_paper
from octify.layout import Layout
from octify.rules.base import Bands, Build, Dense, Ids, Map, Op, Plain, Rule, Ties, register

OCTAVE: dict[int, type[OctConv]] = {1: OctConv1d, 2: OctConv2d, 3: OctConv3d}
SAME = (Conv2dSame, StdConv2dSame, ScaledStdConv2dSame)  # padded at run time, from the input's size
STANDARDISED = (StdConv2d, StdConv2dSame)
SCALED = (ScaledStdConv2d, ScaledStdConv2dSame)


class Convolution(Rule):
    """`Y^H = f(X^H; W_HH) + up(f(X^L; W_LH))`, `Y^L = f(X^L; W_LL) + f(pool(X^H); W_HL)`."""

    kind = "chooses"

    def applies(self, op: Op) -> bool:
        """Not on a dense tensor of one channel that is no image: ECA's vectors, lambda layers' lattices."""
        source = op.argument(0, "input")
        return not (isinstance(source, Plain) and not source.image and op.module.in_channels == 1)  # pyright: ignore

    def flow(self, op: Op, ties: Ties) -> Map:
        """Reads any layout; gives new channels, those of its input if it is depthwise."""
        conv: Any = op.module
        source = op.argument(0, "input")
        shape = op.shape
        spatial = tuple(range(len(shape) - min(2, len(shape) - 2), len(shape)))
        if len(shape) != len(conv.kernel_size) + 2 or not isinstance(source, (Map, Plain)):
            raise Dense("its input is no batch of maps")
        if isinstance(source, Plain) and _is_token_axis(op, shape):
            raise Dense("its axis is none of the image's: tokens or channels")
        if isinstance(source, Map) and not source.is_plain:
            raise Dense("its input's axes are in another order")
        if isinstance(source, Map) and _is_depthwise(conv):
            return self._depthwise(op, source, ties)
        if op.settings.split_input:
            ties.note("input: split is for depthwise convolutions that read a map")
        if isinstance(source, Map):
            ties.read(source.ids)
            if conv.groups > 1:
                ties.balance(source.ids, conv.groups)
        why = _reason_for_dense(op, source, shape, spatial)
        ids = ties.high(conv.out_channels, why) if why else ties.free(conv.out_channels)
        if conv.groups > 1 and not why:
            ties.balance(ids, conv.groups)
        return Map(shape, ids, (1,), spatial)

    def _depthwise(self, op: Op, source: Map, ties: Ties) -> Map:
        conv: Any = op.module
        size = tuple(op.shape[axis] for axis in source.spatial)
        if op.too_small(size):
            raise Dense(_small(size))
        if op.settings.split_input:
            ties.pin(source.ids, "its reader splits it again")
            ids: Ids = ties.free(conv.in_channels).repeat(conv.out_channels // conv.in_channels)
            return source.with_ids(ids, op.shape)
        ids = source.ids.repeat(conv.out_channels // conv.in_channels)
        ties.write(ids)
        return source.with_ids(ids, op.shape)

    def changes(self, op: Op, reads: list[Layout], gives: list[Layout]) -> bool:
        """Whether the convolution changes; the paper pools before strided convolutions in dense stages too."""
        settings, conv = op.settings, cast(Any, op.module)
        if super().changes(op, reads, gives):
            return True
        source = op.argument(0, "input")
        stem = isinstance(source, Plain) and source.image and op.dense_stem
        pools = settings.kernels == "paper" and settings.downsample == "pool" and max(conv.stride[-2:]) > 1  # pyright: ignore
        return pools and not stem and fits_paper(conv) is None

    def options(self, op: Op, reads: list[Layout], gives: list[Layout]) -> tuple[dict[str, Any], list[str]]:
        """Which kernels are used; paper kernels fall back to folded ones where they do not fit."""
        settings = op.settings
        options: dict[str, Any] = {"kernels": settings.kernels, "downsample": settings.downsample}
        if len(settings.paths) < 4:
            options["paths"] = list(settings.paths)
        notes: list[str] = []
        if settings.kernels == "paper":
            misfit = fits_paper(cast(nn.Module, op.module))
            if misfit:
                options = {"kernels": "fold"}
                notes.append(f"folded kernels: {misfit}")
        else:
            options = {key: value for key, value in options.items() if key != "downsample"}
        return options, notes

    def emit(self, op: Op, build: Build) -> Any:
        """One octave convolution under the source's name."""
        first: fx.Node = op.node.args[0] if op.node.args else op.node.kwargs["input"]  # pyright: ignore
        conv: Any = op.module
        given: Map = op.values[op.node]
        gives = build.layout(given)
        if op.settings.split_input and _is_depthwise(conv):
            source = build.bands(first, given, gives[:: conv.out_channels // conv.in_channels])
        else:
            source = build.value(first)
        reads = source.layout if isinstance(source, Bands) else Layout.dense(conv.in_channels)
        options = build.options()

        def make() -> nn.Module:
            return make_octave(conv, reads, gives, options)

        arguments = (source.high, source.low) if isinstance(source, Bands) else (source,)
        node = build.module(make, *arguments)
        return node if gives.is_dense else Bands(*build.pair(node), gives, given)


def _is_token_axis(op: Op, shape: tuple[int, ...]) -> bool:
    """Whether a 1-D convolution stands in a network that reads images or clips: neighbours there are no neighbours."""
    inputs = (shape_of(value_of(node)) for node in op.node.graph.nodes if node.op == "placeholder")
    return len(shape) == 3 and any(len(found) > 3 for found in inputs if found)


def _is_depthwise(conv: Any) -> bool:
    return conv.groups == conv.in_channels > 1


def _small(size: tuple[int, ...]) -> str:
    return f"its map of {'x'.join(map(str, size))} is less than twice min_size"


def _reason_for_dense(op: Op, source: Map | Plain, shape: tuple[int, ...], spatial: tuple[int, ...]) -> str:
    size = tuple(shape[axis] for axis in spatial)
    if op.too_small(size):
        return _small(size)
    if isinstance(source, Plain) and source.image and op.dense_stem:
        return "the first convolution on the image"
    if isinstance(source, Plain) and _is_depthwise(op.module):
        return "depthwise on a dense map: it has no cross paths to split it with"
    return ""


def make_octave(conv: Any, reads: Layout, gives: Layout, options: dict[str, Any]) -> OctConv:
    """The octave convolution that takes a convolution's place."""
    more: dict[str, Any] = {}
    if pads_same(conv):
        more["padding"] = "same_dynamic"
    if type(conv) in (*STANDARDISED, *SCALED):
        more["weight"] = standardised_weight(conv)
    return OCTAVE[len(conv.kernel_size)].from_conv(conv, reads, gives, **options, **more)


def pads_same(conv: Any) -> bool:
    """Whether timm pads at run time; its standardising kinds decide that when they are built."""
    return type(conv) in SAME and getattr(conv, "same_pad", True)


def plain_conv(conv: nn.Module) -> nn.Module:
    """PyTorch's convolution (or timm's that pads by size) with the weight that a standardising one convolves with."""
    held, kind = cast(Any, conv), Conv2dSame if pads_same(conv) else nn.Conv2d
    geometry = (held.kernel_size, held.stride, held.padding, held.dilation, held.groups)
    made: Any = kind(held.in_channels, held.out_channels, *geometry, held.bias is not None, device="meta")
    made.weight, made.bias = nn.Parameter(standardised_weight(held), requires_grad=False), held.bias
    return made.train(conv.training)


@torch.no_grad()
def standardised_weight(conv: Any) -> Tensor:
    """The weight that a weight-standardising convolution convolves with, exact for what it holds now."""
    flat = conv.weight.reshape(1, conv.out_channels, -1)
    gain = (conv.gain * conv.scale).view(-1) if type(conv) in SCALED else None
    weight = F.batch_norm(flat, None, None, weight=gain, training=True, momentum=0.0, eps=conv.eps)
    return weight.reshape_as(conv.weight).requires_grad_(conv.weight.requires_grad)


register(Convolution(), modules=(nn.Conv1d, nn.Conv2d, nn.Conv3d, *SAME, StdConv2d, ScaledStdConv2d))
