"""Sizes that a graph works out from maps, as something that gives them for any sizes of those maps."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from octify.graph import get_module, map_leaves, nodes_in, value_of
from octify.ops import full_shape, halve, take_channels
from octify.optimize.forms import Carrier, Enter, Leave, LowPool, OutSize, empty_high, grid_of, half_of, scaled_grid
from octify.optimize.native.builder import Builder
from octify.optimize.native.operations import Graph, is_map, module_of
from octify.optimize.native.sizes import Given, Like, Shaped, Worked
from octify.optimize.native.steps import Shape, Sizes
from octify.optimize.spread import blend, interleave
from octify.resample import up_to

_operator: Any = operator  # the standard library's own annotations of these are partly unknown
FUNCTIONS: tuple[Any, ...] = (
    getattr, _operator.getitem, _operator.floordiv, _operator.mul, _operator.add, _operator.sub, int, half_of, grid_of,
    scaled_grid, halve, full_shape,
)  # fmt: skip
METHODS = ("size", "dim")
# What gives maps without channels, which stand for their size.
EMPTY: tuple[Any, ...] = (take_channels, torch.cat, empty_high)


def works_out_size(module: Graph, node: fx.Node) -> bool:
    """Whether a node works out numbers (or a map of no channels) from maps' sizes, for what programs hold alone."""
    value = value_of(node)
    if isinstance(value, Tensor) and (value.dim() != 4 or value.shape[1]):
        return False
    return _is_known(module, node) and all(
        _asks(module, reader) or works_out_size(module, reader) for reader in node.users
    )


def _asks(module: Graph, reader: fx.Node) -> bool:
    """Whether a node that programs hold asks for a size."""
    return reader.target in (up_to, blend, interleave) or type(module_of(module, reader)) in (LowPool, Leave, Enter)


def _is_known(module: Graph, node: fx.Node) -> bool:
    if node.op == "call_module":
        return type(module_of(module, node)) in (OutSize, Carrier)
    if node.op == "call_method":
        return node.target in METHODS
    return node.op == "call_function" and node.target in (*FUNCTIONS, *EMPTY)


def is_size(module: Graph, argument: Any) -> bool:
    """Whether an argument is made of numbers and of nodes that work them out, for programs alone, from maps."""
    return all(
        works_out_size(module, node)
        and all(is_map(source) or is_size(module, source) for source in nodes_in(node.args))
        for node in nodes_in(argument)
    )


def grid_given(builder: Builder, node: fx.Node, value: int) -> Callable[[Sizes], Shape]:
    """As large as a node, be that a map or one without channels; `value` has as many images."""
    if is_map(node):
        return Like(builder.value(node))
    return Given(value, Worked(grid_of, (expression(builder, node),)))


def expression(builder: Builder, argument: Any) -> Any:
    """The argument with what works it out in the place of nodes."""

    def of(leaf: Any) -> Any:
        if not isinstance(leaf, fx.Node):
            return leaf
        if is_map(leaf):
            return Shaped(builder.value(leaf))
        function: Any = leaf.target
        if leaf.op == "call_module":
            function = get_module(builder.module, str(leaf.target))
        elif leaf.op == "call_method":
            function = getattr(Tensor, str(leaf.target))
        return Worked(function, tuple(expression(builder, part) for part in leaf.args))

    return map_leaves(argument, of)
