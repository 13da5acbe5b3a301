"""Nodes of many spellings in the few that programs know."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from timm.layers.norm import LayerNorm2d
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torchvision.models.convnext import LayerNorm2d as TorchvisionLayerNorm2d
from torchvision.ops import Permute

from octify.graph import nodes_in, shape_of, value_of
from octify.layers import Merge, Split
from octify.norms import OctChannelNorm, OctGroupNorm
from octify.ops import take_channels
from octify.optimize.forms import Affine, by_image, grid_of, join
from octify.optimize.native.operations import Graph, is_map, module_of
from octify.optimize.native.spellings import pad, resize, window
from octify.optimize.native.transposed import transposed
from octify.optimize.native.turned import TURNS, on_turned, turn
from octify.optimize.native.writer import Result, Writer
from octify.optimize.passes import act_of
from octify.resample import pool_low, up_to
from octify.rules.bandnorm import GROUP_NORMS

NORMS = (LayerNorm2d, TorchvisionLayerNorm2d)
PARTS: tuple[Any, ...] = ("chunk", "split", "tensor_split", torch.chunk, torch.split, torch.tensor_split)
_operator: Any = operator  # the standard library's own annotations of these are partly unknown
ARITHMETIC: dict[Any, str] = {
    _operator.add: "add", torch.add: "add", "add": "add", _operator.sub: "sub", torch.sub: "sub", "sub": "sub",
    _operator.mul: "mul", torch.mul: "mul", "mul": "mul", "mul_": "mul",
    _operator.truediv: "div", torch.div: "div", "div": "div",
}  # fmt: skip
MOVES: tuple[Any, ...] = (
    torch.permute, "permute", torch.transpose, "transpose", torch.swapaxes, "swapaxes", torch.movedim, "movedim",
    "view", "reshape", torch.reshape, torch.flatten, "flatten", "unflatten",
)  # fmt: skip
# What gives a tensor that nothing else sees: if it is written over, only its one reader knows.
FRESH: tuple[Any, ...] = (F.gelu, join)


def simplify(module: Graph) -> None:
    """Writes nodes anew, in the order of the graph; the values that were recorded are kept, and those of new nodes."""
    gone: set[fx.Node] = set()
    writer = Writer(module)
    for node in list(module.graph.nodes):
        if node in gone:
            continue
        node.meta["turned"] = _is_turned(module, node)
        with module.graph.inserting_before(node):
            found = next((result for rule in RULES if (result := rule(writer, node)) is not None), None)
        if found is None:
            continue
        if isinstance(found, fx.Node):
            node.replace_all_uses_with(found)
        else:
            for reader in list(node.users):
                reader.replace_all_uses_with(found[cast(int, reader.args[1])])
                module.graph.erase_node(reader)
                gone.add(reader)
        module.graph.erase_node(node)


def _is_turned(module: Graph, node: fx.Node) -> bool:
    """Whether the second axis of what a node gives need not be channels: behind a permutation or a view."""
    layer = module_of(module, node)
    if type(layer) in (nn.Conv2d, nn.BatchNorm2d, nn.ConvTranspose2d):
        return False
    moves = node.target in (*MOVES, *TURNS) or type(layer) in (Permute, nn.Flatten)
    return moves or any(s.target in TURNS or s.meta.get("turned", False) for s in node.all_input_nodes)


def _nothing(writer: Writer, node: fx.Node) -> Result:
    """What is done number by number to a map without channels, which only stands for its size → that map."""
    value = value_of(node)
    if not isinstance(value, Tensor) or value.dim() != 4 or value.shape[1]:
        return None
    known = node.target is join or node.target in ARITHMETIC or act_of(writer.module, node)
    if not known and type(module_of(writer.module, node)) not in (nn.BatchNorm2d, Affine):
        return None
    return next(source for source in nodes_in(node.args) if shape_of(value_of(source)) == tuple(value.shape))


def _same(_: Writer, node: fx.Node) -> Result:
    """x.contiguous() → x."""
    return cast(fx.Node, node.args[0]) if (node.op, node.target) == ("call_method", "contiguous") else None


def _cat(writer: Writer, node: fx.Node) -> Result:
    """A concatenation without parts that have no channels."""
    if node.target is not torch.cat or not is_map(node) or not isinstance(node.args[0], (tuple, list)):
        return None
    parts = [part for part in cast("Sequence[fx.Node]", node.args[0]) if cast(Tensor, value_of(part)).shape[1]]
    return None if len(parts) == len(node.args[0]) else writer.function(torch.cat, parts, 1)


def _slice(writer: Writer, node: fx.Node) -> Result:
    """x[:, a:b], one of x.chunk(n, 1) → take_channels."""
    if node.target is not operator.getitem or not is_map(node):
        return None
    source, index = cast("tuple[fx.Node, Any]", node.args)
    if isinstance(index, int) and source.target in PARTS and isinstance(source.args[0], fx.Node):
        return _part(writer, source, index)
    if not is_map(source) or not isinstance(index, (tuple, list)) or nodes_in(cast(Any, index)):
        return None
    first, *rest = [part for part in cast("Sequence[Any]", index) if part is not Ellipsis]
    if not rest or not isinstance(rest[0], slice) or any(part != slice(None) for part in (first, *rest[1:])):
        return None
    order = tuple(range(cast(Tensor, value_of(source)).shape[1]))[cast("slice[Any, Any, Any]", rest[0])]
    return writer.function(take_channels, source, order, 1)


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
    swapped = swap.target in (torch.transpose, "transpose") and set(swap.args[1:]) == {1, 2}
    if not swapped or swap.kwargs or not isinstance(apart := swap.args[0], fx.Node):
        return None
    source = apart.args[0] if apart.target in ("view", "reshape") else None
    shape, given = (shape_of(value_of(found)) or () for found in (apart, node))
    if not is_map(source) or shape_of(value_of(source)) != given or len(shape) != 5 or shape[3:] != given[2:]:
        return None
    groups, each = shape[1:3]
    order = tuple(group * each + place for place in range(each) for group in range(groups))
    return writer.function(take_channels, source, order, 1)


def _affine(writer: Writer, node: fx.Node) -> Result:
    """A map plus, minus, times or over a constant → Affine; one minus another → their sum."""
    name = ARITHMETIC.get(cast(Any, node.target), "") if node.op in ("call_function", "call_method") else ""
    if not name or len(node.args) != 2 or node.kwargs or not is_map(node) or node.meta.get("turned"):
        return None
    one, other = cast("tuple[Any, Any]", node.args)
    if node.target == "mul_" and not (one.target in FRESH and len(one.users) == 1):
        return None
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
    norm, given = module_of(writer.module, node), cast("tuple[fx.Node, ...]", node.args)
    octave = isinstance(norm, OctChannelNorm)
    if octave and ((norm.kind, norm.axis, norm.spatial) != ("layer", 1, 2) or norm.act is not None):
        return None
    if not octave and type(norm) not in NORMS:
        return None
    bands = [band for band in given if is_map(band)]
    if not bands or node.kwargs:
        return None
    found = writer.centred(norm, list(given))
    return found if octave else found[0]


def _group_norm(writer: Writer, node: fx.Node) -> Result:
    """A group (or instance) norm of a map or of both bands → each image's factors, what they scale, its activation."""
    norm: Any = module_of(writer.module, node)
    bands = cast("list[fx.Node]", list(node.args))
    octave = type(norm) is OctGroupNorm
    instance = type(norm) is nn.InstanceNorm2d and not norm.track_running_stats
    if not (octave or instance or type(norm) in GROUP_NORMS) or len(bands) != 1 + octave or node.kwargs:
        return None
    if not all(is_map(band) for band in bands) or (octave and norm.spatial != 2) or node.meta.get("turned"):
        return None
    act: Any = getattr(norm, "act", None)
    factors = writer.group_factors(norm, bands)
    found: list[fx.Node] = []
    first = 0
    for band in bands:
        scaled = writer.function(by_image, band, factors, first)
        found.append(scaled if act is None else writer.call(act, value_of(band), scaled))
        first += 2 * cast(Tensor, value_of(band)).shape[1]
    return tuple(found) if octave else found[0]


RULES: tuple[Callable[[Writer, fx.Node], Result], ...] = (
    turn, on_turned, _nothing, _same, _cat, _slice, _shuffle, _affine, _merge, _split, _channel_norm, _group_norm,
    resize, window, pad, transposed,
)  # fmt: skip
