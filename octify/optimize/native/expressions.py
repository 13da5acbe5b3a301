"""Sizes that a graph works out from maps, as something that gives them for any sizes of those maps."""

from __future__ import annotations

import operator
from typing import Any

from torch import Tensor, fx

from octify.graph import get_module, map_leaves, nodes_in, value_of
from octify.ops import full_shape, halve
from octify.optimize.forms import OutSize, grid_of, half_of, scaled_grid
from octify.optimize.native.builder import Builder
from octify.optimize.native.operations import Graph, is_map
from octify.optimize.native.sizes import Shaped, Worked
from octify.resample import up_to

FUNCTIONS: tuple[Any, ...] = (
    getattr, operator.getitem, operator.floordiv, operator.mul, operator.add, operator.sub, int, half_of, grid_of,
    scaled_grid, halve, full_shape,
)  # fmt: skip
METHODS = ("size", "dim")


def works_out_size(module: Graph, node: fx.Node) -> bool:
    """Whether a node works out numbers from maps' sizes for what programs hold, and for nothing else."""
    if isinstance(value_of(node), Tensor) or not _is_known(module, node):
        return False
    return all(reader.target is up_to or works_out_size(module, reader) for reader in node.users)


def _is_known(module: Graph, node: fx.Node) -> bool:
    if node.op == "call_module":
        return type(get_module(module, str(node.target))) is OutSize
    if node.op == "call_method":
        return node.target in METHODS
    return node.op == "call_function" and node.target in FUNCTIONS


def is_size(module: Graph, argument: Any) -> bool:
    """Whether an argument is made of numbers and of nodes that work them out, for programs alone, from maps."""
    return all(
        works_out_size(module, node)
        and all(is_map(source) or is_size(module, source) for source in nodes_in(node.args))
        for node in nodes_in(argument)
    )


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
