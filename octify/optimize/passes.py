"""Graph passes that every backend gets: each a function of the graph module that returns how often it applied."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any, cast

import torch
from timm.layers.activations import GELU, GELUTanh, HardSigmoid, HardSwish, Mish, Sigmoid, Swish, Tanh
from timm.layers.conv2d_same import Conv2dSame
from timm.layers.drop import DropPath
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torchvision.ops import StochasticDepth

from octify.graph import get_module, has_hooks, named_modules, set_module, value_of
from octify.modes import ModeCall
from octify.optimize.forms import PadSame, join
from octify.reparametrized import computed_by, settled
from octify.resample import average, pool_low
from octify.rules.base import MODULES, rule_of_type
from octify.rules.conv import SCALED, STANDARDISED, plain_conv
from octify.rules.join import SharedDrop

IDLE = (
    nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout,
    DropPath, StochasticDepth,
)  # fmt: skip
DROPOUTS: tuple[Any, ...] = (F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout)
CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
ADDS: tuple[Any, ...] = (operator.add, cast(Any, operator).iadd, torch.add)
MODULE_ACTS: dict[type, str] = {
    nn.ReLU: "relu", nn.SiLU: "silu", nn.Hardswish: "hardswish", nn.Sigmoid: "sigmoid", nn.Tanh: "tanh",
    nn.Hardsigmoid: "hardsigmoid", nn.Mish: "mish", Swish: "silu", HardSwish: "hardswish", Sigmoid: "sigmoid",
    Tanh: "tanh", HardSigmoid: "hardsigmoid", Mish: "mish", GELUTanh: "gelu_tanh",
}  # fmt: skip
# Those with numbers, and where a module keeps them.
NUMBERED_ACTS: dict[type, tuple[str, tuple[str, ...]]] = {
    nn.ReLU6: ("hardtanh", ("min_val", "max_val")), nn.Hardtanh: ("hardtanh", ("min_val", "max_val")),
    nn.LeakyReLU: ("leaky_relu", ("negative_slope",)), nn.ELU: ("elu", ("alpha",)),
}  # fmt: skip
FUNCTION_ACTS: dict[Callable[..., Any], str] = {
    F.relu: "relu", F.relu_: "relu", torch.relu: "relu", torch.relu_: "relu", F.relu6: "hardtanh 0.0 6.0",
    F.silu: "silu", F.hardswish: "hardswish", torch.sigmoid: "sigmoid", F.sigmoid: "sigmoid",
    F.hardsigmoid: "hardsigmoid", torch.tanh: "tanh", F.tanh: "tanh", F.mish: "mish", F.gelu: "gelu",
    F.leaky_relu: "leaky_relu", F.elu: "elu", F.hardtanh: "hardtanh",
}  # fmt: skip
# What those with numbers are called with.
ARGUMENTS: dict[str, dict[str, Any]] = {
    "leaky_relu": {"negative_slope": 0.01}, "elu": {"alpha": 1.0}, "hardtanh": {"min_val": -1.0, "max_val": 1.0},
    "gelu": {"approximate": "none"},
}  # fmt: skip
RESHAPES = {"view": "reshape", "view_as": "reshape_as"}
METHOD_ACTS = {"relu": "relu", "relu_": "relu", "sigmoid": "sigmoid", "tanh": "tanh"}


def settle_weights(module: fx.GraphModule) -> int:
    """Before: weights computed at each call (weight norm, standardisation).   After: the weights."""
    found = [(path, settled(child)) for path, child in named_modules(module) if path and computed_by(child)]
    for path, child in named_modules(module):
        if type(child) in (*STANDARDISED, *SCALED):
            found.append((path, plain_conv(child)))
    for path, made in found:
        set_module(module, path, made)
    return len(found)


def take_base_types(module: fx.GraphModule) -> int:
    """Before: a user's class that changes nothing of what its base does.   After: the base, which every pass knows."""
    count = 0
    for _, child in named_modules(module):
        kind = type(child)
        if kind not in MODULES and rule_of_type(kind) is not None:
            child.__class__ = next(base for base in kind.__mro__ if base in MODULES)
            count += 1
    return count


class Hooked(nn.Module):
    """A module that something runs around: no pass knows this type, so each leaves it as it is."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the module, hooks included."""
        return self.module(*args, **kwargs)


def keep_hooked(module: fx.GraphModule) -> int:
    """Before: a module with hooks.   After: the same inside of one that no other pass takes apart."""
    called = {str(node.target) for node in module.graph.nodes if node.op == "call_module"}
    found = [path for path in called if has_hooks(get_module(module, path))]
    for path in found:
        set_module(module, path, Hooked(get_module(module, path)))
    return len(found)


def reshape_views(module: fx.GraphModule) -> int:
    """Before: view, which fails where maps are channels last.   After: reshape, which copies there."""
    count = 0
    for node in module.graph.nodes:
        another_type = any(isinstance(given, torch.dtype) for given in (*node.args, *node.kwargs.values()))
        if node.op == "call_method" and node.target in RESHAPES and not another_type:
            node.target = RESHAPES[node.target]
            count += 1
    return count


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
        found = get_module(module, str(node.target)) if node.op == "call_module" else None
        if type(found) is SharedDrop:
            for reader in list(node.users):
                reader.replace_all_uses_with(cast(fx.Node, node.args[cast(int, reader.args[1])]))
                module.graph.erase_node(reader)
        elif len(node.args) == 1 and (type(found) in IDLE or _is_dropout(found)):
            node.replace_all_uses_with(cast(fx.Node, node.args[0]))
        else:
            continue
        module.graph.erase_node(node)
        count += 1
    return count


def _is_dropout(found: nn.Module | None) -> bool:
    """Whether a module calls functional dropout, in whatever mode it is in."""
    return isinstance(found, ModeCall) and found.function in DROPOUTS


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
        shape = _shape(node)  # none of a sum of sizes
        if not shape or not all(isinstance(term, fx.Node) and _shape(term) == shape for term in node.args):
            continue
        terms = cast("list[fx.Node]", node.args)
        parts = [_parts(term) for term in terms]
        if len({_shape(low) for part in parts for low in part[1]}) > 1:  # strides by axis leave maps on several grids
            parts[1] = ([terms[1]], list[fx.Node](), 0)
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
    """The activation of a node as `forms.activate` knows it, else nothing."""
    if node.op == "call_module":
        return act_of_module(get_module(module, str(node.target)))
    if len(node.all_input_nodes) != 1 or not node.args or node.args[0] is not node.all_input_nodes[0]:
        return ""
    if node.op == "call_method":
        return METHOD_ACTS.get(str(node.target), "") if len(node.args) == 1 and not node.kwargs else ""
    name = FUNCTION_ACTS.get(cast(Any, node.target), "") if node.op == "call_function" else ""
    known = ARGUMENTS.get(name, {})
    given = {key: value for key, value in node.kwargs.items() if key != "inplace"}
    if not set(given) <= set(known) or len(node.args) - 1 > len(known):
        return ""
    found: dict[str, Any] = {**known, **dict(zip(known, node.args[1:], strict=False)), **given}
    return _numbered(name, list(found.values()))


def act_of_module(module: nn.Module) -> str:
    """A module's activation as `forms.activate` knows it, else nothing."""
    found, kind = cast(Any, module), type(module)
    if kind in NUMBERED_ACTS:
        name, attributes = NUMBERED_ACTS[kind]
        return _numbered(name, [getattr(found, attribute) for attribute in attributes])
    if kind is nn.GELU:
        return _numbered("gelu", [found.approximate])
    if kind is GELU:
        return "gelu"
    if kind is nn.PReLU and found.weight.numel() == 1:
        return _numbered("leaky_relu", [found.weight.item()])
    return MODULE_ACTS.get(kind, "")


def _numbered(name: str, numbers: list[Any]) -> str:
    if name == "gelu":
        return {"none": "gelu", "tanh": "gelu_tanh"}.get(numbers[0], "")
    return " ".join([name, *(repr(float(number)) for number in numbers)])
