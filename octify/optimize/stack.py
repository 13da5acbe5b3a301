"""Low to high and low to low as one convolution, where both read the same map with the same geometry.

Before: conv lh(x), conv ll(x).   After: conv [lh; ll](x), and a slice of its channels for either.
"""

from __future__ import annotations

from collections import Counter
from typing import Any, cast

import torch
from torch import Tensor, fx, nn

from octify.graph import get_module, set_module

GEOMETRY = ("in_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")
CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def stack_low(module: fx.GraphModule) -> int:
    """Stacks every pair of low paths that it can; returns how many."""
    calls = Counter(str(node.target) for node in module.graph.nodes if node.op == "call_module")
    pairs: dict[str, dict[str, fx.Node]] = {}
    for node in module.graph.nodes:
        home, _, path = str(node.target).rpartition(".")
        if node.op == "call_module" and path in ("lh", "ll") and calls[str(node.target)] == 1:
            pairs.setdefault(home, {})[path] = node
    count = 0
    for home, pair in pairs.items():
        if len(pair) == 2 and _alike(module, *pair.values()):
            _stack(module, home, pair["lh"], pair["ll"])
            count += 1
    return count


def _alike(module: fx.GraphModule, one: fx.Node, other: fx.Node) -> bool:
    convs = [get_module(module, str(node.target)) for node in (one, other)]
    if type(convs[0]) not in CONVS or type(convs[0]) is not type(convs[1]) or one.args != other.args:
        return False
    first, second = (cast(Any, conv) for conv in convs)
    return first.groups == 1 and all(getattr(first, name) == getattr(second, name) for name in GEOMETRY)


def _stack(module: fx.GraphModule, home: str, lh: fx.Node, ll: fx.Node) -> None:
    convs: list[Any] = [get_module(module, str(node.target)) for node in (lh, ll)]
    sizes = [conv.out_channels for conv in convs]
    both = type(convs[0])(
        convs[0].in_channels, sum(sizes), convs[0].kernel_size, convs[0].stride, convs[0].padding, convs[0].dilation,
        bias=any(conv.bias is not None for conv in convs), device="meta",
    )  # fmt: skip
    both.weight = nn.Parameter(torch.cat([conv.weight for conv in convs]), requires_grad=False)
    if both.bias is not None:
        both.bias = nn.Parameter(torch.cat([_bias(conv) for conv in convs]), requires_grad=False)
    set_module(module, f"{home}.low", both)
    first = min(lh, ll)
    with module.graph.inserting_before(first):
        joined = module.graph.call_module(f"{home}.low", lh.args)
        parts = [
            module.graph.call_function(torch.narrow, (joined, 1, start, size))
            for start, size in zip((0, sizes[0]), sizes, strict=True)
        ]
    for node, part in zip((lh, ll), parts, strict=True):
        part.meta = dict(node.meta)
        node.replace_all_uses_with(part)
        module.graph.erase_node(node)


def _bias(conv: Any) -> Tensor:
    return conv.weight.new_zeros(conv.out_channels) if conv.bias is None else conv.bias
