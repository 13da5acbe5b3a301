"""What is the same at every call, worked out once; and constant factors of what convolutions give.

Before: gamma → reshape → mul(conv(x), …).   After: conv(x) with scaled rows.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, fx, nn

from octify.graph import get_attribute, get_module, map_nodes, writes_in_place
from octify.optimize.forms import join
from octify.optimize.norms import CONVS

MULS: tuple[Any, ...] = (operator.mul, torch.mul, "mul")
IN_PLACE: tuple[Any, ...] = ("mul_", cast(Any, operator).imul)


def settle_constants(module: fx.GraphModule) -> int:
    """Before: a parameter, reshaped.   After: what that gives, as a buffer."""
    count = 0
    for node in list(module.graph.nodes):
        sources = node.all_input_nodes
        if node.op not in ("call_function", "call_method") or not sources or writes_in_place(node):
            continue
        if not all(_is_constant(module, source) for source in sources):
            continue
        value = _call(node, map_nodes(node.args, lambda source: get_attribute(module, str(source.target))), module)
        if not isinstance(value, Tensor):
            continue
        name = f"octify_constant_{count}"
        module.register_buffer(name, value.detach().clone(), persistent=False)
        with module.graph.inserting_before(node):
            node.replace_all_uses_with(module.graph.get_attr(name))
        module.graph.erase_node(node)
        count += 1
    for node in [node for node in module.graph.nodes if node.op == "get_attr" and not node.users]:
        module.graph.erase_node(node)
    return count


def _is_constant(module: fx.GraphModule, node: fx.Node) -> bool:
    return node.op == "get_attr" and isinstance(get_attribute(module, str(node.target)), Tensor)


@torch.no_grad()
def _call(node: fx.Node, args: Sequence[Any], module: fx.GraphModule) -> Any:
    kwargs = map_nodes(node.kwargs, lambda source: get_attribute(module, str(source.target)))
    if node.op == "call_method":
        return getattr(args[0], str(node.target))(*args[1:], **kwargs)
    return cast(Any, node.target)(*args, **kwargs)


def fold_scales(module: fx.GraphModule) -> int:
    """Before: join([conv …], [conv …]) times a constant, by channel or as a whole.   After: scaled convolutions."""
    calls = Counter(str(node.target) for node in module.graph.nodes if node.op == "call_module")
    count = 0
    for node in list(module.graph.nodes):
        pair = _product(module, node)
        if pair is None:
            continue
        source, factor = pair
        terms = _terms(source)
        convs = [get_module(module, str(term.target)) for term in terms if term.op == "call_module"]
        if len(source.users) > 1 or any(len(term.users) > 1 or calls[str(term.target)] > 1 for term in terms):
            continue
        rows = [_row(factor, conv) for conv in convs if type(conv) in CONVS]
        if len(rows) < len(terms) or any(row is None for row in rows):
            continue
        for conv, row in zip(convs, cast("list[Tensor]", rows), strict=True):
            _scale(conv, row)
        node.replace_all_uses_with(source)
        module.graph.erase_node(node)
        count += 1
    return count


def _product(module: fx.GraphModule, node: fx.Node) -> tuple[fx.Node, Tensor] | None:
    """What a node multiplies, and by which constant."""
    if node.target not in (*MULS, *IN_PLACE) or len(node.args) != 2 or node.kwargs:
        return None
    one, other = cast("tuple[Any, Any]", node.args)
    for x, factor in ((one, other), (other, one)):
        if not isinstance(x, fx.Node) or x.op == "get_attr":
            continue
        if isinstance(factor, (int, float)):
            return x, torch.tensor(float(factor))
        if isinstance(factor, fx.Node) and _is_constant(module, factor):
            return x, cast(Tensor, get_attribute(module, str(factor.target))).detach()
    return None


def _terms(source: fx.Node) -> list[fx.Node]:
    """The terms of a sum without activation, or the node itself."""
    if source.target is not join or len(source.args) > 3:
        return [source]
    highs, lows = cast("tuple[list[fx.Node], list[fx.Node]]", source.args[:2])
    return [*highs, *lows]


def _row(factor: Tensor, conv: nn.Module) -> Tensor | None:
    """A constant as one number a row of a convolution's weight, if it is that."""
    weight = cast(Tensor, conv.weight)
    axes = weight.dim() - 2
    if factor.numel() == 1 and factor.dim() <= weight.dim():
        return factor.flatten().expand(len(weight))
    by_channel = factor.numel() == len(weight) and tuple(factor.shape[-axes - 1 :]) == (len(weight), *(1,) * axes)
    return factor.flatten() if by_channel else None


def _scale(conv: nn.Module, row: Tensor) -> None:
    held = cast(Any, conv)
    for name in ("weight", "bias"):
        value: Tensor | None = getattr(held, name)
        if value is not None:
            scaled = value.detach().double() * row.double().view(-1, *(1,) * (value.dim() - 1))
            setattr(held, name, nn.Parameter(scaled.to(value.dtype), requires_grad=False))
