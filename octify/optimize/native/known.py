"""All kinds of nodes that programs can hold."""

from __future__ import annotations

from torch import fx

from octify.optimize.native import channels, convs, pools
from octify.optimize.native.operations import Graph, Operation

OPERATIONS: tuple[Operation, ...] = (*convs.OPERATIONS, *pools.OPERATIONS, *channels.OPERATIONS)


def operation_of(module: Graph, node: fx.Node) -> Operation | None:
    """The kind of a node, None of one that no program can hold."""
    return next((found for found in OPERATIONS if found.holds(module, node)), None)
