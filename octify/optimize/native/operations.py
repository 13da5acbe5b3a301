"""What programs can hold: for each kind of node, whether it can, and how it becomes steps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeGuard

import torch
from torch import Tensor, fx

from octify.graph import get_module, shape_of, value_of
from octify.optimize.native.builder import Builder

Graph = fx.GraphModule


@dataclass(frozen=True)
class Operation:
    """A kind of node."""

    name: str
    holds: Callable[[Graph, fx.Node], bool]
    add: Callable[[Builder, fx.Node], None]


def module_of(module: Graph, node: fx.Node) -> Any:
    """The module that a node calls, None of another kind of node."""
    return get_module(module, str(node.target)) if node.op == "call_module" else None


def is_map(node: object) -> TypeGuard[fx.Node]:
    """Whether a node is a float32 map (N, C, H, W) with channels."""
    value = value_of(node) if isinstance(node, fx.Node) else None
    if not isinstance(value, Tensor) or value.dtype != torch.float32:
        return False
    shape = shape_of(value) or ()
    return len(shape) == 4 and shape[1] > 0


def grid_of(node: fx.Node) -> tuple[int, ...]:
    """A map's height and width at the example's size."""
    return (shape_of(value_of(node)) or ())[2:]
