"""All kinds of nodes that programs can hold."""

from __future__ import annotations

from torch import fx

from octify.optimize.native.channels import OPERATIONS as CHANNELS
from octify.optimize.native.convs import OPERATIONS as CONVS
from octify.optimize.native.operations import Graph, Operation
from octify.optimize.native.pools import OPERATIONS as POOLS

OPERATIONS: tuple[Operation, ...] = (*CONVS, *POOLS, *CHANNELS)


def operation_of(module: Graph, node: fx.Node) -> Operation | None:
    """The kind of a node, None of one that no program can hold."""
    return next((found for found in OPERATIONS if found.holds(module, node)), None)
