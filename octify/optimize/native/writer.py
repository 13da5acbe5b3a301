"""Writes nodes into a graph, each with the value that it has."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, fx, nn

from octify.graph import get_attribute, map_nodes, meta_copy, set_module, value_of
from octify.norms import OctChannelNorm, OctGroupNorm
from octify.optimize.forms import Affine, Centred, GroupFactors, low_moments, moments
from octify.optimize.native.operations import Graph, is_map, module_of

Result = fx.Node | tuple[fx.Node, ...] | None


class Writer:
    """Writes nodes before the one that is looked at."""

    def __init__(self, module: Graph) -> None:
        self.module, self.graph = module, module.graph

    def function(self, target: Callable[..., Any], *args: Any) -> fx.Node:
        """A call, with the value that it has."""
        made = self.graph.call_function(target, args)
        with torch.no_grad():
            made.meta["value"] = target(*map_nodes(args, value_of))
        return made

    def call(self, made: nn.Module, value: Any, *args: fx.Node) -> fx.Node:
        """A call of a new module that gives such a value."""
        path = f"octify_{type(made).__name__.lower()}_{len(self.graph.nodes)}"
        while hasattr(self.module, path):
            path += "_"
        set_module(self.module, path, made)
        node = self.graph.call_module(path, args)
        node.meta["value"] = value
        return node

    def layer(self, made: nn.Module, *args: fx.Node) -> fx.Node:
        """A call of a new module, with the value that it has."""
        with torch.no_grad():
            value = meta_copy(made).eval()(*map(value_of, args))
        return self.call(made.eval(), value, *args)

    def affine(self, x: fx.Node, scale: Tensor | float, shift: Tensor | float) -> fx.Node:
        """`scale · x + shift`, in one with what x is."""
        channels = cast(Tensor, value_of(x)).shape[1]
        factor, rest = (torch.as_tensor(value).detach().float().flatten().expand(channels) for value in (scale, shift))
        before = module_of(self.module, x)
        if isinstance(before, Affine) and len(x.users) == 1:
            factor, rest = before.scale * factor, before.shift * factor + rest
            x = cast(fx.Node, x.args[0])
        if bool((factor == 1).all()) and not bool(rest.any()):
            return x
        return self.call(Affine(factor.clone(), rest.clone()), value_of(x), x)

    def constant(self, argument: Any, like: fx.Node) -> Tensor | float | None:
        """A number, or one a channel of a map."""
        if isinstance(argument, (int, float)) and not isinstance(argument, bool):
            return float(argument)
        if not isinstance(argument, fx.Node) or argument.op != "get_attr":
            return None
        value: Any = get_attribute(self.module, str(argument.target))
        if not isinstance(value, Tensor) or value.dtype != torch.float32 or value.device.type != "cpu":
            return None
        channels = cast(Tensor, value_of(like)).shape[1]
        by_channel = value.shape in ((1, channels, 1, 1), (channels, 1, 1))
        return value if (value.numel() == 1 and value.dim() <= 4) or by_channel else None

    def centred(self, norm: nn.Module, bands: Sequence[fx.Node]) -> tuple[fx.Node, ...]:
        """A layer norm over the channels of each position, of a map or of both bands: moments, and what they centre."""
        found, eps = list(bands), cast(float, norm.eps)
        real = [band for band in bands if is_map(band)]  # a high band without channels stays one
        for by, band in zip((moments, low_moments), real, strict=False):
            index = bands.index(band)
            made = Centred(*_rows(norm, index))
            found[index] = self.call(made, value_of(band), band, self.function(by, real, eps))
        return tuple(found)

    def group_factors(self, norm: Any, bands: Sequence[fx.Node]) -> fx.Node:
        """A group or instance norm's factors for each image, of a map or of both bands."""
        octave = isinstance(norm, OctGroupNorm)
        channels = sum(cast(Tensor, value_of(band)).shape[1] for band in bands)
        groups = norm.groups if octave else getattr(norm, "num_groups", channels)
        rows = [torch.arange(channels) // (channels // groups), *_affine_of(norm, channels)]
        if octave:
            order = [*norm.layout.high_index, *norm.layout.low_index]
            rows = [row[order] for row in rows]
        group, scale, shift = rows
        made = GroupFactors(tuple(int(index) for index in group), norm.eps, scale.float(), shift.float())
        values = [cast(Tensor, value_of(band)) for band in bands]
        return self.call(made, values[0].new_empty((len(values[0]), 2 * channels, 1, 1)), *bands)


def _affine_of(norm: Any, channels: int) -> list[Tensor]:
    """A norm's own scale and shift."""
    return [torch.ones(channels) if norm.weight is None else norm.weight.detach(),
            torch.zeros(channels) if norm.bias is None else norm.bias.detach()]  # fmt: skip


def _rows(norm: nn.Module, index: int) -> list[Tensor]:
    """A norm's scale and shift for its high or low band (of a norm of dense maps, all there is)."""
    held = cast(Any, norm)
    channels = held.layout.channels if isinstance(norm, OctChannelNorm) else held.normalized_shape[0]
    rows = _affine_of(held, channels)
    return [norm.pick(row, bool(index)).flatten() for row in rows] if isinstance(norm, OctChannelNorm) else rows
