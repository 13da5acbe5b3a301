"""Layers on turned maps, channels last or flattened, as layers on maps.

Before: permute(0, 2, 3, 1) → layer norm → linear → GELU → linear → permute(0, 3, 1, 2).
After:  norm of each position → 1x1 convolution → GELU → 1x1 convolution.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from timm.layers.norm import LayerNorm
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torchvision.ops import Permute

from octify.graph import get_attribute, shape_of, value_of
from octify.linear import OctLinear
from octify.norms import OctChannelNorm
from octify.ops import global_mean
from octify.optimize.forms import Affine, Centred, flat_of, join, last_of
from octify.optimize.native.operations import grid_of, is_map, module_of
from octify.optimize.native.pools import is_grid, is_mean, is_mean_of_bands
from octify.optimize.native.writer import Result, Writer
from octify.optimize.passes import act_of
from octify.resample import pool_low

TURNS: tuple[Any, ...] = (last_of, flat_of)
VIEWS: tuple[Any, ...] = (torch.flatten, "flatten", "view", "reshape", "squeeze")


def turn(writer: Writer, node: fx.Node) -> Result:
    """x.permute(0, 2, 3, 1) → last_of, back again → x; what drops the axes of a mean → flat_of."""
    found, source = module_of(writer.module, node), node.args[0] if node.args else None
    if not isinstance(source, fx.Node):
        return None
    order: Any = found.dims if type(found) is Permute else _order(node)
    if order == [0, 2, 3, 1] and is_map(source):
        return writer.function(last_of, source)
    if order == [0, 3, 1, 2] and source.target is last_of:
        return cast(fx.Node, source.args[0])
    if node.target in VIEWS or type(found) is nn.Flatten:
        flat = shape_of(value_of(node)) == (shape_of(value_of(source)) or ())[:2]
        return writer.function(flat_of, source) if flat and _is_one_position(writer, source) else None
    return _mean(writer, node)


def _order(node: fx.Node) -> list[Any] | None:
    if node.target not in (torch.permute, "permute"):
        return None
    order: Any = node.args[1] if len(node.args) == 2 else node.args[1:]
    return list(order)


def _mean(writer: Writer, node: fx.Node) -> Result:
    """A mean over positions that drops their axes → one that keeps them, flattened."""
    if node.target is global_mean and node.args[5] is False and node.args[3] == 1 and node.args[4] == (2, 3):
        return writer.function(flat_of, writer.function(global_mean, *node.args[:5], True))
    if node.target not in (torch.mean, "mean") or not is_map(node.args[0]):
        return None
    named: dict[str, Any] = dict(zip(("dim", "keepdim"), node.args[1:], strict=False)) | node.kwargs
    if not set(named) <= {"dim", "keepdim"} or named.get("keepdim") or not is_grid(named.get("dim")):
        return None
    return writer.function(flat_of, writer.function(torch.mean, node.args[0], (2, 3), True))


def _is_one_position(writer: Writer, node: fx.Node) -> bool:
    """Whether a map has one position whatever the input's size: a mean, and what is made of it one by one."""
    if not is_map(node) or grid_of(node) != (1, 1):
        return False
    if is_mean(writer.module, node) or is_mean_of_bands(writer.module, node):
        return True
    conv = module_of(writer.module, node)
    plain = type(conv) is nn.Conv2d and (conv.kernel_size, conv.padding) == ((1, 1), (0, 0))
    one_by_one = plain or type(conv) in (Affine, Centred, nn.BatchNorm2d) or act_of(writer.module, node)
    source = node.args[0] if one_by_one else None
    return isinstance(source, fx.Node) and _is_one_position(writer, source)


def on_turned(writer: Writer, node: fx.Node) -> Result:
    """A layer on turned maps → the turned result of one on the maps themselves."""
    sources = node.all_input_nodes
    turned = [source for source in sources if source.target in TURNS]
    if not turned or len({source.target for source in turned}) > 1 or node.target in TURNS:
        return None
    maps = {source: cast(fx.Node, source.args[0]) for source in turned}
    for rule in (_linear, _octave_linear, _norm, _elementwise):
        found = rule(writer, node, maps)
        if found is None:
            continue
        back: Callable[..., Any] = cast(Any, turned[0].target)
        if isinstance(found, fx.Node):
            return writer.function(back, found)
        return tuple(writer.function(back, band) for band in found)
    return None


def _one_tap(writer: Writer, x: fx.Node, weight: Tensor, bias: Tensor | None) -> fx.Node:
    """A 1x1 convolution with the weight (O, I) of a linear layer."""
    conv = nn.Conv2d(weight.shape[1], weight.shape[0], 1, bias=bias is not None, device="meta")
    conv.weight = nn.Parameter(weight.detach()[:, :, None, None], requires_grad=False)
    if bias is not None:
        conv.bias = nn.Parameter(bias.detach(), requires_grad=False)
    n, _, h, w = cast(Tensor, value_of(x)).shape
    return writer.call(conv, torch.empty(n, len(weight), h, w, device="meta"), x)


def _linear(writer: Writer, node: fx.Node, maps: dict[fx.Node, fx.Node]) -> Result:
    found = module_of(writer.module, node)
    if type(found) is nn.Linear:
        return _one_tap(writer, maps[node.all_input_nodes[0]], found.weight, found.bias)
    if node.target is not F.linear or node.kwargs or node.args[0] not in maps:
        return None
    held = [argument for argument in node.args[1:] if isinstance(argument, fx.Node)]
    if any(argument.op != "get_attr" for argument in held):
        return None
    rows: list[Any] = [get_attribute(writer.module, str(argument.target)) for argument in held]
    return _one_tap(writer, maps[node.args[0]], rows[0], rows[1] if len(rows) > 1 else None)


def _octave_linear(writer: Writer, node: fx.Node, maps: dict[fx.Node, fx.Node]) -> Result:
    """Every path is a 1x1 convolution, of which the sums are joins."""
    layer = module_of(writer.module, node)
    if type(layer) is not OctLinear or layer.halved != 2 or not all(source in maps for source in node.args):
        return None
    high, *low = [maps[source] for source in node.all_input_nodes]
    if not is_map(high) or layer.weight_hh is None or (low and layer.weight_lh is None):
        return None
    out = _one_tap(writer, high, layer.weight_hh, layer.bias_h)
    if low and layer.weight_lh is not None:
        out = writer.function(join, [out], [_one_tap(writer, low[0], layer.weight_lh, None)], 2)
    if layer.weight_hl is None:
        return out if layer.out_layout.is_dense else None
    terms = [_one_tap(writer, writer.function(pool_low, high, 2), layer.weight_hl, layer.bias_l)]
    if low and layer.weight_ll is not None:
        terms.insert(0, _one_tap(writer, low[0], layer.weight_ll, None))
    return out, writer.function(join, terms, [], 2) if len(terms) > 1 else terms[0]


def _norm(writer: Writer, node: fx.Node, maps: dict[fx.Node, fx.Node]) -> Result:
    norm, given = module_of(writer.module, node), [maps.get(s) if isinstance(s, fx.Node) else None for s in node.args]
    if any(band is None for band in given) or not all(source.target is last_of for source in maps):
        return None
    bands = cast("list[fx.Node]", given)
    if type(norm) in (nn.LayerNorm, LayerNorm) and len(norm.normalized_shape) == 1:
        return writer.centred(norm, bands)[0]
    octave = type(norm) is OctChannelNorm and (norm.kind, norm.axis, norm.spatial) == ("layer", -1, 2)
    return writer.centred(norm, bands) if octave and norm.act is None else None


def _elementwise(writer: Writer, node: fx.Node, maps: dict[fx.Node, fx.Node]) -> Result:
    """An activation, a sum of maps turned alike, or a constant factor of each channel."""
    if act_of(writer.module, node):
        made = writer.graph.node_copy(node, lambda source: maps[source])
        made.meta["value"] = value_of(made.args[0])  # pyright: ignore[reportArgumentType]
        return made
    if node.target is join and all(source in maps for source in node.all_input_nodes) and not node.args[1]:
        highs, *rest = node.args
        return writer.function(join, [maps[source] for source in cast("list[fx.Node]", highs)], *rest)
    return None
