"""Graph passes that every backend gets: each a function of the graph module that returns how often it applied."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any, cast

import torch
from timm.layers.activations import HardSigmoid, HardSwish, Sigmoid, Swish, Tanh
from timm.layers.conv2d_same import Conv2dSame
from timm.layers.drop import DropPath
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torchvision.ops import StochasticDepth

from octify.graph import get_module, named_modules, set_module, value_of
from octify.optimize.forms import PadSame, join
from octify.reparametrized import computed_by, settled
from octify.resample import average, pool_low

IDLE = (
    nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout,
    DropPath, StochasticDepth,
)  # fmt: skip
CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
ADDS: tuple[Any, ...] = (operator.add, cast(Any, operator).iadd, torch.add)
MODULE_ACTS: dict[type, str] = {
    nn.ReLU: "relu", nn.ReLU6: "relu6", nn.SiLU: "silu", nn.Hardswish: "hardswish", nn.Sigmoid: "sigmoid",
    nn.Tanh: "tanh", nn.Hardsigmoid: "hardsigmoid", Swish: "silu", HardSwish: "hardswish", Sigmoid: "sigmoid",
    Tanh: "tanh", HardSigmoid: "hardsigmoid",
}  # fmt: skip
FUNCTION_ACTS: dict[Callable[..., Any], str] = {
    F.relu: "relu", F.relu_: "relu", torch.relu: "relu", torch.relu_: "relu", F.relu6: "relu6", F.silu: "silu",
    F.hardswish: "hardswish", torch.sigmoid: "sigmoid", F.sigmoid: "sigmoid", F.hardsigmoid: "hardsigmoid",
    torch.tanh: "tanh", F.tanh: "tanh",
}  # fmt: skip
METHOD_ACTS = {"relu": "relu", "relu_": "relu", "sigmoid": "sigmoid", "tanh": "tanh"}


def settle_weights(module: fx.GraphModule) -> int:
    """Before: weights computed at each call (weight norm).   After: the weights."""
    found = [(path, child) for path, child in named_modules(module) if path and computed_by(child)]
    for path, child in found:
        set_module(module, path, settled(child))
    return len(found)


def pad_before(module: fx.GraphModule) -> int:
    """Before: a convolution that pads by its input's size (TensorFlow's "same").   After: a pad, a convolution."""
    count = 0
    for node in list(module.graph.nodes):
        conv = get_module(module, str(node.target)) if node.op == "call_module" else None
        if type(conv) is not Conv2dSame:
            continue
        home = nn.Module()
        home.add_module("pad", PadSame(cast(Any, conv)))
        home.add_module("conv", _without_padding(conv))
        set_module(module, f"{node.target}_same", home)  # one module may be called more than once
        with module.graph.inserting_before(node):
            padded = module.graph.call_module(f"{node.target}_same.pad", node.args)
        node.target, node.args = f"{node.target}_same.conv", (padded,)
        count += 1
    return count


def _without_padding(conv: Any) -> nn.Conv2d:
    geometry = (conv.kernel_size, conv.stride, 0, conv.dilation, conv.groups, conv.bias is not None)
    plain = nn.Conv2d(conv.in_channels, conv.out_channels, *cast(Any, geometry), device="meta")
    plain.weight, plain.bias = conv.weight, conv.bias
    return plain.train(conv.training)


def drop_idle(module: fx.GraphModule) -> int:
    """Before: x → dropout (eval) → y.   After: x → y."""
    count = 0
    for node in list(module.graph.nodes):
        if node.op == "call_module" and type(get_module(module, str(node.target))) in IDLE and len(node.args) == 1:
            node.replace_all_uses_with(cast(fx.Node, node.args[0]))
            module.graph.erase_node(node)
            count += 1
    return count


def share_pools(module: fx.GraphModule) -> int:
    """Before: every octave convolution pools the high band that it reads.   After: one pooling for all its readers."""
    first: dict[tuple[Any, ...], fx.Node] = {}
    count = 0
    for node in list(module.graph.nodes):
        if node.op != "call_function" or node.target not in (pool_low, average):
            continue
        kept = first.setdefault((node.target, *node.args), node)
        if kept is not node:
            node.replace_all_uses_with(kept)
            module.graph.erase_node(node)
            count += 1
    return count


def gather_sums(module: fx.GraphModule) -> int:
    """Before: join(…) + residual.   After: join(residual, …), one pass over the map, convolutions last."""
    count = 0
    for node in list(module.graph.nodes):
        if node.op != "call_function" or node.target not in ADDS or len(node.args) != 2 or node.kwargs:
            continue
        if not all(isinstance(term, fx.Node) and _shape(term) == _shape(node) for term in node.args):
            continue
        parts = [_parts(cast(fx.Node, term)) for term in node.args]
        with module.graph.inserting_before(node):
            highs = sorted((high for part in parts for high in part[0]), key=lambda high: _is_conv(module, high))
            lows = [low for part in parts for low in part[1]]
            spatial = max(part[2] for part in parts) or 2
            joined = module.graph.call_function(join, (highs, lows, spatial))
        joined.meta = dict(node.meta)
        _take_over(node, joined)
        count += 1
    return count


def _is_conv(module: fx.GraphModule, node: fx.Node) -> bool:
    return node.op == "call_module" and isinstance(get_module(module, str(node.target)), CONVS)


def _shape(node: fx.Node) -> tuple[int, ...] | None:
    value = value_of(node)
    return tuple(value.shape) if isinstance(value, Tensor) else None


def _parts(term: fx.Node) -> tuple[list[fx.Node], list[fx.Node], int]:
    """A term's own terms where it is a sum that nobody else reads."""
    if term.target is join and len(term.users) == 1 and len(term.args) < 4:
        highs, lows, spatial = cast(Any, term.args)
        return list(highs), list(lows), spatial
    return [term], [], 0


def _take_over(node: fx.Node, by: fx.Node) -> None:
    sources = node.all_input_nodes
    node.replace_all_uses_with(by)
    node.graph.erase_node(node)
    for source in sources:
        if not source.users and source.target is join:
            source.graph.erase_node(source)


def gather_acts(module: fx.GraphModule) -> int:
    """Before: join(…) → relu.   After: join(…, act="relu")."""
    count = 0
    for node in list(module.graph.nodes):
        name = act_of(module, node)
        source = node.args[0] if node.args else None
        if not name or not isinstance(source, fx.Node) or source.target is not join or len(source.users) > 1:
            continue
        if len(source.args) < 4:
            source.args = (*source.args, name)
            source.meta = dict(node.meta)
            node.replace_all_uses_with(source)
            module.graph.erase_node(node)
            count += 1
    return count


def act_of(module: fx.GraphModule, node: fx.Node) -> str:
    """The name in `forms.ACTS` of an activation's node, else nothing."""
    if node.op == "call_module":
        return MODULE_ACTS.get(type(get_module(module, str(node.target))), "")
    extra = {key: value for key, value in node.kwargs.items() if key != "inplace"}
    if extra or len(node.all_input_nodes) != 1 or len(node.args) != 1:
        return ""
    if node.op == "call_function":
        return FUNCTION_ACTS.get(cast(Any, node.target), "")
    return METHOD_ACTS.get(str(node.target), "") if node.op == "call_method" else ""
