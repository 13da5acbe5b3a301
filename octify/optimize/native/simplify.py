"""Nodes of many spellings in the few that programs know."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from timm.layers.norm import LayerNorm2d
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torchvision.models.convnext import LayerNorm2d as TorchvisionLayerNorm2d

from octify.graph import get_attribute, map_nodes, set_module, shape_of, value_of
from octify.layers import Merge, Split
from octify.norms import OctChannelNorm
from octify.ops import resize_bands, take_channels
from octify.optimize.forms import Affine, Centred, grid_of, half_of, join, low_moments, moments, scaled_grid
from octify.optimize.native.operations import Graph, is_map, module_of
from octify.resample import pool_low, up_to

Result = fx.Node | tuple[fx.Node, ...] | None
NORMS = (LayerNorm2d, TorchvisionLayerNorm2d)
PARTS: tuple[Any, ...] = ("chunk", "split", "tensor_split", torch.chunk, torch.split, torch.tensor_split)
ARITHMETIC: dict[Any, str] = {
    operator.add: "add", torch.add: "add", "add": "add", operator.sub: "sub", torch.sub: "sub", "sub": "sub",
    operator.mul: "mul", torch.mul: "mul", "mul": "mul", operator.truediv: "div", torch.div: "div", "div": "div",
}  # fmt: skip


def simplify(module: Graph) -> None:
    """Writes nodes anew, in the order of the graph; the values that were recorded are kept, and those of new nodes."""
    for node in list(module.graph.nodes):
        with module.graph.inserting_before(node):
            writer = Writer(module)
            found = next((result for rule in RULES if (result := rule(writer, node)) is not None), None)
        if found is None:
            continue
        if isinstance(found, fx.Node):
            node.replace_all_uses_with(found)
        else:
            for reader in list(node.users):
                reader.replace_all_uses_with(found[cast(int, reader.args[1])])
                module.graph.erase_node(reader)
        module.graph.erase_node(node)


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

    def call(self, made: nn.Module, like: fx.Node, *args: fx.Node) -> fx.Node:
        """A call of a new module that gives what looks like a node's value."""
        path = f"octify_{type(made).__name__.lower()}_{len(self.graph.nodes)}"
        while hasattr(self.module, path):
            path += "_"
        set_module(self.module, path, made)
        node = self.graph.call_module(path, args)
        node.meta["value"] = value_of(like)
        return node

    def affine(self, x: fx.Node, scale: Tensor | float, shift: Tensor | float) -> fx.Node:
        """`scale · x + shift`, in one with what x is."""
        channels = cast(Tensor, value_of(x)).shape[1]
        scale, shift = (torch.as_tensor(value).detach().float().flatten().expand(channels) for value in (scale, shift))
        before = module_of(self.module, x)
        if isinstance(before, Affine) and len(x.users) == 1:
            scale, shift = before.scale * scale, before.shift * scale + shift
            x = cast(fx.Node, x.args[0])
        if bool((scale == 1).all()) and not bool(shift.any()):
            return x
        return self.call(Affine(scale.clone(), shift.clone()), x, x)

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


def _same(_: Writer, node: fx.Node) -> Result:
    """x.contiguous() → x."""
    return (
        cast(fx.Node, node.args[0])
        if node.op == "call_method" and node.target == "contiguous" and is_map(node)
        else None
    )


def _slice(writer: Writer, node: fx.Node) -> Result:
    """x[:, a:b], one of x.chunk(n, 1) → take_channels."""
    if node.target is not operator.getitem or not is_map(node):
        return None
    source, index = cast("tuple[fx.Node, Any]", node.args)
    if isinstance(index, int) and source.target in PARTS and isinstance(source.args[0], fx.Node):
        return _part(writer, source, index)
    every = slice(None)
    if not is_map(source) or not isinstance(index, (tuple, list)) or any(isinstance(part, fx.Node) for part in index):
        return None
    index = [part for part in cast("Sequence[Any]", index) if part is not Ellipsis]
    if len(index) < 2 or not isinstance(index[1], slice) or any(part != every for part in (index[0], *index[2:])):
        return None
    bounds = (index[1].start, index[1].stop, index[1].step)
    if any(isinstance(bound, fx.Node) for bound in bounds):
        return None
    order = range(cast(Tensor, value_of(source)).shape[1])[index[1]]
    return writer.function(take_channels, source, tuple(order), 1)


def _part(writer: Writer, source: fx.Node, index: int) -> Result:
    x, parts = cast(fx.Node, source.args[0]), cast("tuple[Tensor, ...]", value_of(source))
    counts = [part.shape[1] for part in parts]
    if not is_map(x) or sum(counts) != cast(Tensor, value_of(x)).shape[1]:
        return None
    start = sum(counts[: index % len(counts)])
    return writer.function(take_channels, x, tuple(range(start, start + counts[index])), 1)


def _shuffle(writer: Writer, node: fx.Node) -> Result:
    """x.view(n, g, c/g, h, w).transpose(1, 2).reshape(n, c, h, w) → take_channels."""
    if node.op != "call_method" or node.target not in ("view", "reshape") or not is_map(node):
        return None
    swap = cast(fx.Node, node.args[0])
    if swap.op == "call_method" and swap.target == "contiguous":
        swap = cast(fx.Node, swap.args[0])
    swapped = swap.target in (torch.transpose, "transpose") and sorted(swap.args[1:]) == [1, 2]
    if not swapped or swap.kwargs or not isinstance(apart := swap.args[0], fx.Node):
        return None
    source = apart.args[0] if apart.target in ("view", "reshape") else None
    shape, given = shape_of(value_of(apart)) or (), shape_of(value_of(node))
    if not is_map(source) or shape_of(value_of(source)) != given or len(shape) != 5 or shape[3:] != given[2:]:
        return None
    order = torch.arange(given[1]).view(shape[1:3]).t().flatten().tolist()
    return writer.function(take_channels, source, tuple(order), 1)


def _affine(writer: Writer, node: fx.Node) -> Result:
    """A map plus, minus, times or over a constant → Affine; one minus another → their sum."""
    name = ARITHMETIC.get(cast(Any, node.target), "") if node.op in ("call_function", "call_method") else ""
    if not name or len(node.args) != 2 or node.kwargs or not is_map(node):
        return None
    one, other = cast("tuple[Any, Any]", node.args)
    maps = [argument for argument in (one, other) if is_map(argument) and argument.op != "get_attr"]
    if name == "sub" and len(maps) == 2 and shape_of(value_of(one)) == shape_of(value_of(other)):
        return writer.function(join, [one, writer.affine(other, -1.0, 0.0)], [], 2)
    if len(maps) != 1 or shape_of(value_of(maps[0])) != shape_of(value_of(node)):
        return None
    (x,) = maps
    number = writer.constant(other if x is one else one, x)
    if number is None:
        return None
    if name == "mul":
        return writer.affine(x, number, 0.0)
    if name == "add":
        return writer.affine(x, 1.0, number)
    if name == "sub":
        return writer.affine(x, 1.0, -number) if x is one else writer.affine(x, -1.0, number)
    return writer.affine(x, 1.0 / number, 0.0) if x is one else None


def _merge(writer: Writer, node: fx.Node) -> Result:
    """Merge → the low band raised and the channels put in order."""
    merge = module_of(writer.module, node)
    if type(merge) is not Merge or merge.spatial != 2 or len(node.args) != 2 or not is_map(node):
        return None
    high, low = cast("tuple[fx.Node, fx.Node]", node.args)
    raised = writer.function(up_to, low, writer.function(grid_of, high))
    if not merge.layout.high:
        return raised
    whole = writer.function(torch.cat, [high, raised], 1)
    order = tuple(merge.layout.order)
    return whole if order == tuple(range(len(order))) else writer.function(take_channels, whole, order, 1)


def _split(writer: Writer, node: fx.Node) -> Result:
    """Split → channels taken, and the low ones pooled."""
    split, x = module_of(writer.module, node), node.args[0] if node.args else None
    if type(split) is not Split or split.spatial != 2 or not is_map(x) or not split.layout.high or not split.layout.low:
        return None
    high, low = (writer.function(take_channels, x, tuple(picked.order), 1) for picked in (split.high, split.low))
    return high, writer.function(pool_low, low, 2)


def _channel_norm(writer: Writer, node: fx.Node) -> Result:
    """A layer norm over the channels of each position → moments, and what they centre."""
    norm, bands = module_of(writer.module, node), cast("tuple[fx.Node, ...]", node.args)
    if not all(is_map(band) for band in bands) or node.kwargs:
        return None
    if type(norm) in NORMS and len(bands) == 1:
        eps, act = cast(nn.LayerNorm, norm).eps, None
    elif isinstance(norm, OctChannelNorm) and (norm.kind, norm.axis, norm.spatial, len(bands)) == ("layer", 1, 2, 2):
        eps, act = norm.eps, norm.act
    else:
        return None
    if act is not None:
        return None
    found = [
        writer.call(Centred(*_rows(norm, index)), band, band, writer.function(by, list(bands), eps))
        for index, (band, by) in enumerate(zip(bands, (moments, low_moments), strict=False))
    ]
    return tuple(found) if len(bands) == 2 else found[0]


def _rows(norm: nn.Module, index: int) -> list[Tensor]:
    """A norm's scale and shift for its high or low band (of a norm of dense maps, all there is)."""
    held = cast(Any, norm)
    channels = held.layout.channels if isinstance(norm, OctChannelNorm) else held.normalized_shape[0]
    rows = [torch.ones(channels) if held.weight is None else held.weight.detach(),
            torch.zeros(channels) if held.bias is None else held.bias.detach()]  # fmt: skip
    return [norm.pick(row, bool(index)).flatten() for row in rows] if isinstance(norm, OctChannelNorm) else rows


def _resize(writer: Writer, node: fx.Node) -> Result:
    """Nearest upsampling by a size or by whole factors → up_to."""
    found = module_of(writer.module, node)
    given: dict[str, Any] = dict(zip(("input", "size", "scale_factor", "mode"), node.args, strict=False)) | node.kwargs
    if node.target is resize_bands:
        given = dict(zip(("input", "low", "size", "scale_factor", "mode"), node.args, strict=False)) | node.kwargs
    elif type(found) in (nn.Upsample, nn.UpsamplingNearest2d):
        given = {"input": node.args[0], **{name: getattr(found, name) for name in ("size", "scale_factor", "mode")}}
    elif node.target is not F.interpolate:
        return None
    x, size, factor = given["input"], given.get("size"), given.get("scale_factor")
    if given.get("mode", "nearest") != "nearest" or not is_map(x) or given.get("recompute_scale_factor"):
        return None
    size = (size, size) if isinstance(size, int) else size
    if size is None:
        factors = [float(number) for number in (factor if isinstance(factor, (list, tuple)) else [factor] * 2)]
        if any(number != math.floor(number) for number in factors):
            return None
        size = writer.function(scaled_grid, x, factors)
    raised = writer.function(up_to, x, size)
    if "low" not in given:
        return raised
    return raised, writer.function(up_to, given["low"], writer.function(half_of, raised))


RULES: tuple[Callable[[Writer, fx.Node], Result], ...] = (
    _same, _slice, _shuffle, _affine, _merge, _split, _channel_norm, _resize,
)  # fmt: skip
