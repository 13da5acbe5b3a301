"""Eager mode on a CPU: channels last, and every sum and activation inside a convolution's own call.

Before: join([conv hh, residual], [conv lh], act="relu").
After:  base = residual + up(conv lh), one pass; then act(conv hh + base), written over base.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, fx, nn

from octify.graph import get_module, set_module
from octify.optimize.forms import join
from octify.optimize.packed import PackedConv, can_pack, lay_last
from octify.optimize.passes import act_of
from octify.optimize.tune import choose_products
from octify.resample import average, pool_low, up_to


def add_up(high: Tensor, low: Tensor, spatial: int, overwrite: bool) -> Tensor:
    """`high + up(low)`. Nearest upsampling and a plain add measure faster than an add that broadcasts over cells."""
    raised = up_to(low, high.shape[-spatial:])
    return high.add_(raised) if overwrite else raised.add_(high)


def up_of(low: Tensor, like: Tensor, spatial: int) -> Tensor:
    """`up(low)` for a convolution that reads `like` and keeps its size."""
    return up_to(low, like.shape[-spatial:])


def to_channels_last(x: Any) -> Any:
    """A batch of maps laid out channels last; anything else as it is."""
    return lay_last(x) if isinstance(x, Tensor) and x.dim() in (4, 5) else x


def lay_channels_last(module: nn.Module) -> nn.Module:
    """Lays a network's kernels out channels last, in place; `Module.to` refuses it where a tensor has five axes."""
    for tensor in (*module.parameters(), *module.buffers()):
        tensor.data = to_channels_last(tensor.data)
    return module


def lower_eager(module: fx.GraphModule, inputs: Sequence[Any]) -> dict[str, int]:
    """Puts oneDNN's convolutions, or matrix products, in place; returns how many of each."""
    lowering = _Lowering(module)
    lowering.run()
    module.graph.lint()
    module.recompile()
    products = choose_products(module, lowering.packed, inputs)
    return {"packed convolutions": len(lowering.packed) - products, "matrix products": products}


class _Lowering:
    """`convs` are the convolutions still to be placed, `packed` those that were, by path."""

    def __init__(self, module: fx.GraphModule) -> None:
        self.module, self.graph = module, module.graph
        self.order = {node: index for index, node in enumerate(module.graph.nodes)}
        calls = Counter(str(node.target) for node in module.graph.nodes if node.op == "call_module")
        modules = {node: get_module(module, str(node.target)) for node in self.order if node.op == "call_module"}
        self.convs = {
            node: cast(nn.Conv2d, conv)
            for node, conv in modules.items()
            if can_pack(conv) and calls[str(node.target)] == 1
        }
        self.packed: dict[str, nn.Conv2d] = {}

    def run(self) -> None:
        if not self.convs:
            return
        for node in list(self.graph.nodes):
            if node.target is join:
                self._join(node)
        for node in list(self.convs):
            self._alone(node)
        for node in list(self.graph.nodes):
            if node.op == "placeholder":
                with self.graph.inserting_after(node):
                    moved = self.graph.call_function(to_channels_last, (node,))
                node.replace_all_uses_with(moved)
                moved.args = (node,)

    def _pack(self, node: fx.Node, act: str, onto: fx.Node | None = None, overwrite: bool = False) -> None:
        """The node's convolution becomes a packed one under its own name."""
        conv = self.convs.pop(node)
        set_module(self.module, str(node.target), PackedConv(conv, act, overwrite))
        self.packed[str(node.target)] = conv
        node.args = (node.args[0],) if onto is None else (node.args[0], onto)

    def _alone(self, node: fx.Node) -> None:
        """A convolution, with the activation that alone reads it."""
        readers = list(node.users)
        act = act_of(self.module, readers[0]) if len(readers) == 1 else ""
        if act:
            readers[0].replace_all_uses_with(node)
            self.graph.erase_node(readers[0])
        self._pack(node, act)

    def _join(self, node: fx.Node) -> None:
        highs, lows, spatial = (cast(Any, entry) for entry in node.args[:3])
        act = cast(str, node.args[3]) if len(node.args) > 3 else ""
        last = next((term for term in reversed(highs) if self._is_mine(term, node)), None)
        if last is None or (len(highs) == 1 and not _keeps_size(self.convs[last])):
            return
        rest = [term for term in highs if term is not last]
        self._move_bias(last, [term for term in (*lows, *rest) if self._is_mine(term, node)])
        with self.graph.inserting_before(node):
            base, own = self._base(node, rest, lows, spatial, last)
        # The convolution moves to where everything that it is added to is there.
        node.prepend(last)
        self._pack(last, act, base, own)
        node.replace_all_uses_with(last)
        self.order[last] = self.order[node]
        self.graph.erase_node(node)

    def _is_mine(self, term: fx.Node, node: fx.Node) -> bool:
        """Whether a term is a convolution that this sum alone reads, once."""
        return term in self.convs and list(term.users) == [node]

    def _move_bias(self, last: fx.Node, others: list[fx.Node]) -> None:
        """The convolution that runs first adds the bias, if it can: a matrix product has no bias and sum at once."""
        conv = self.convs[last]
        if conv.bias is None or not others:
            return
        first = self.convs[others[0]]
        first.bias = conv.bias if first.bias is None else nn.Parameter(first.bias + conv.bias, requires_grad=False)
        conv.bias = None

    def _base(
        self, node: fx.Node, rest: list[fx.Node], lows: list[fx.Node], spatial: int, last: fx.Node
    ) -> tuple[fx.Node, bool]:
        """The sum of all other terms, and whether it may be written over."""
        low = lows[0] if lows else None
        for other in lows[1:]:
            low = self.graph.call_function(torch.add, (low, other))
        if not rest:
            return self.graph.call_function(up_of, (low, last.args[0], spatial)), True
        base, own = rest[0], self._dies(rest[0], node)
        for other in rest[1:]:
            if self._is_mine(other, node):
                node.prepend(other)
                self._pack(other, "", base, own)
                base, own = other, True
                continue
            base, own = self.graph.call_function(torch.add, (base, other)), True
        if low is None:
            return base, own
        return self.graph.call_function(add_up, (base, low, spatial, own)), True

    def _dies(self, base: fx.Node, node: fx.Node) -> bool:
        """Whether a tensor is its own and has its last reader here, so that it may be written over."""
        readers_done = all(self.order[reader] <= self.order[node] for reader in base.users if reader in self.order)
        return readers_done and self._fresh(base) and all(self._fresh(reader) for reader in base.users)

    def _fresh(self, node: fx.Node) -> bool:
        """Whether what a node gives is a tensor of its own, no view."""
        if node.op == "call_module":
            return isinstance(get_module(self.module, str(node.target)), (nn.Conv2d, PackedConv))
        return node.op == "call_function" and node.target in (join, pool_low, average, add_up, up_of)


def _keeps_size(conv: nn.Conv2d) -> bool:
    """Whether a convolution's output is as large as its input."""
    spans = (d * (k - 1) for d, k in zip(conv.dilation, conv.kernel_size, strict=True))
    pads = cast("tuple[int, ...]", conv.padding)
    return max(conv.stride) == 1 and all(2 * pad == span for pad, span in zip(pads, spans, strict=True))
