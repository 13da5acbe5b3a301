"""Per-channel modules: each band gets its own slice of the parameters and statistics."""

from __future__ import annotations

from typing import Any

import timm.layers as tl
import torch
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d

from octify.graph import input_nodes, structural_copy
from octify.rules.base import Bands, Build, Dense, Map, Op, Rule, Ties, register


class PerChannel(Rule):
    """A module whose channels do not mix; `attributes` are those that hold the channel count."""

    def __init__(self, *attributes: str) -> None:
        self.attributes = attributes

    def flow(self, op: Op, ties: Ties) -> Map:
        """Keeps its input's channels."""
        (found,) = op.maps
        if found.channel != (1,):
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


def slice_channels(module: nn.Module, index: tuple[int, ...], channels: int, attributes: tuple[str, ...]) -> nn.Module:
    """A copy of a per-channel module for some of its channels."""

    def cut(tensor: Tensor) -> Tensor:
        axis = next((axis for axis, size in enumerate(tensor.shape) if size == channels), None)
        with torch.no_grad():
            if axis is None:
                part = tensor.detach().clone()
            else:
                part = tensor.detach().index_select(axis, torch.tensor(index, device=tensor.device))
        return nn.Parameter(part, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else part

    copied = structural_copy(module, cut)
    for name in attributes:
        setattr(copied, name, len(index))
    return copied


register(
    PerChannel("num_features"),
    modules=(
        nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm, nn.InstanceNorm1d, nn.InstanceNorm2d,
        nn.InstanceNorm3d, tl.BatchNormAct2d, tl.SyncBatchNormAct, tl.FrozenBatchNormAct2d, FrozenBatchNorm2d,
    ),
)  # fmt: skip
register(PerChannel(), modules=(tl.LayerScale2d,))
