"""What gates are made of: means over whole maps, channels in another order, and a number for each channel of a map."""

from __future__ import annotations

import operator
from typing import Any, cast

import torch
from torch import fx, nn
from torch.nn import functional as F

from octify.graph import get_module, shape_of, value_of
from octify.ops import global_mean, take_channels

MULS: tuple[Any, ...] = (operator.mul, torch.mul)
GRID = ((2, 3), (-2, -1), (3, 2), (-1, -2))  # how the axes of a map are written


def is_mean(module: fx.GraphModule, node: fx.Node) -> bool:
    """Whether a node gives the mean over a map's positions, (N, C, 1, 1)."""
    if not node.args or _grid(node) != (1, 1):
        return False
    if node.op == "call_module":
        return type(get_module(module, str(node.target))) is nn.AdaptiveAvgPool2d
    if node.target is F.adaptive_avg_pool2d:
        return True
    if node.target is not torch.mean and (node.op, node.target) != ("call_method", "mean"):
        return False
    named: dict[str, Any] = dict(zip(("dim", "keepdim"), node.args[1:], strict=False)) | node.kwargs
    return set(named) == {"dim", "keepdim"} and tuple(named["dim"]) in GRID


def is_mean_of_bands(node: fx.Node) -> bool:
    """Whether a node gives the mean over both bands' positions, (N, C, 1, 1)."""
    return node.target is global_mean and _grid(node) == (1, 1) and (node.args[3], node.args[4]) == (1, (2, 3))


def is_choice(node: fx.Node) -> bool:
    """Whether a node takes channels out of a map of one position."""
    return node.target is take_channels and _grid(node) == (1, 1) and cast(int, node.args[2]) == 1


def gate_of(node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """The gate, (N, C, 1, 1) or (1, C, 1, 1), and the map of a product of the two."""
    if node.target not in MULS or len(node.args) != 2 or node.kwargs:
        return None
    pair = node.args
    if not all(isinstance(argument, fx.Node) for argument in pair):
        return None
    gate, x = sorted(cast("tuple[fx.Node, fx.Node]", pair), key=_positions)
    small, shape = (shape_of(value_of(node)) or () for node in (gate, x))
    fits = small[1:] == (*shape[1:2], 1, 1) != shape[1:] and small[:1] in ((1,), shape[:1])
    return (gate, x) if fits else None


def _grid(node: fx.Node) -> tuple[int, ...]:
    return (shape_of(value_of(node)) or ())[2:]


def _positions(node: fx.Node) -> int:
    height, width = (*_grid(node), 0, 0)[:2]
    return height * width
