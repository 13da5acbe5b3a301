"""What becomes of a layer's output, as far as it can be undone: scaled channels, an addition, then an activation."""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# (tensor and array methods that come without complete types)

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import timm.layers
import torch
from timm.layers.drop import DropPath
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torchvision.ops import FrozenBatchNorm2d, Permute, StochasticDepth

from octify.graph import map_nodes, nodes_in
from octify.rules.join import ACTIVATION_FUNCTIONS, ACTIVATION_MODULES, SharedDrop

tl = cast(Any, timm.layers)

Step = Callable[[Tensor], Tensor]

NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
NORMS_WITH_ACTIVATION = (tl.BatchNormAct2d, tl.SyncBatchNormAct)
STILL = (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, DropPath, StochasticDepth)
SCALES = (tl.LayerScale, tl.LayerScale2d, FrozenBatchNorm2d)
SUMS = (operator.add, operator.iadd, torch.add)
PRODUCTS = (operator.mul, operator.imul, torch.mul)
ACTIVATION_METHODS = ("relu", "relu_", "sigmoid", "sigmoid_", "tanh", "tanh_", "hardsigmoid")


@dataclass(frozen=True)
class Way:
    """What a value meets in eval mode: `steps` that scale channels or move their axis, a summand, an activation.

    `end` is the last node of it; `keeps_axes` says that channels are there where they were.
    """

    end: fx.Node
    steps: tuple[Step, ...] = ()
    other: fx.Node | None = None
    activation: Step | None = None
    keeps_axes: bool = True

    def follow(self, x: Tensor) -> Tensor:
        """The value as it meets the other summand, or the activation."""
        for step in self.steps:
            x = step(x)
        return x


def find_way(root: nn.Module, node: fx.Node) -> Way:
    """The way of a value, up to where more than one operation reads it, or one that mixes channels or positions."""
    steps: list[Step] = []
    other: fx.Node | None = None
    keeps = True
    while len(node.users) == 1:
        reader = next(iter(node.users))
        kind = type(root.get_submodule(str(reader.target))) if reader.op == "call_module" else None
        if _is_activation(reader, kind):
            return Way(reader, tuple(steps), other, _on_copy(_call(root, reader, node)), keeps)
        if other is not None:
            break
        if kind in NORMS_WITH_ACTIVATION and _has_statistics(root, reader):
            norm = cast(Any, root.get_submodule(str(reader.target)))
            steps.append(_norm_alone(norm))
            if not isinstance(norm.act, nn.Identity):
                return Way(reader, tuple(steps), None, _on_copy(norm.act), keeps)
        elif kind is SharedDrop:
            picks = [item for item in reader.users if item.args[1] == reader.args.index(node)]
            if len(picks) != 1:
                break
            reader = picks[0]
        elif (found := _summand(reader, node)) is not None:
            other = found
        elif _scales(root, reader, kind, node):
            steps.append(_call(root, reader, node))
            keeps = keeps and kind is not Permute and reader.target != "permute"
        else:
            break
        node = reader
    return Way(node, tuple(steps), other, None, keeps)


def _is_activation(reader: fx.Node, kind: type | None) -> bool:
    if kind is not None:
        return kind in ACTIVATION_MODULES and kind not in STILL
    alone = len(nodes_in((reader.args, reader.kwargs))) == 1
    functions = ACTIVATION_FUNCTIONS if reader.op == "call_function" else ACTIVATION_METHODS
    return alone and reader.op in ("call_function", "call_method") and reader.target in functions


def _summand(reader: fx.Node, node: fx.Node) -> fx.Node | None:
    """The other one of two that are added."""
    if reader.op != "call_function" or reader.target not in SUMS or len(reader.args) != 2 or reader.kwargs:
        return None
    first, second = reader.args
    other = second if first is node else first
    return other if isinstance(other, fx.Node) and other is not node else None


def _scales(root: nn.Module, reader: fx.Node, kind: type | None, node: fx.Node) -> bool:
    """Whether an operation does no more than scale and shift channels, or move their axis."""
    if kind is Permute:
        return _moves_channels(cast(Any, root.get_submodule(str(reader.target))).dims)
    if kind is not None:
        return kind in (*STILL, *SCALES) or (kind in NORMS and _has_statistics(root, reader))
    if reader.op == "call_method" and reader.target == "permute":
        return _moves_channels(reader.args[1:])
    if reader.op == "call_method":
        return reader.target == "contiguous"
    if reader.op != "call_function" or reader.target not in PRODUCTS or reader.kwargs:
        return False
    factors = [arg for arg in reader.args if arg is not node]
    return len(factors) == 1 and all(_is_constant(factor) for factor in nodes_in(factors))


def _moves_channels(order: Sequence[Any]) -> bool:
    """Whether a permutation brings the channels from last to first or back, and leaves the other axes in order."""
    axes = list(range(len(order)))
    return list(order) in ([0, *axes[2:], 1], [0, axes[-1], *axes[1:-1]])


def _has_statistics(root: nn.Module, reader: fx.Node) -> bool:
    return cast(Any, root.get_submodule(str(reader.target))).running_mean is not None


def _is_constant(node: fx.Node) -> bool:
    """Whether a value comes of parameters alone."""
    inputs = nodes_in((node.args, node.kwargs))
    return node.op == "get_attr" or (node.op == "call_function" and bool(inputs) and all(map(_is_constant, inputs)))


def _on_copy(step: Step) -> Step:
    """A step that may work in place, on a copy."""
    return lambda x: step(x.clone())


def _norm_alone(norm: Any) -> Step:
    """A batch norm in eval mode without the activation that it brings."""
    return lambda x: F.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias, False, 0.0, norm.eps)


def _call(root: nn.Module, node: fx.Node, given: fx.Node) -> Step:
    """What a node does to one of its inputs; the others come of parameters alone."""
    run = fx.Interpreter(root, garbage_collect_values=False, graph=node.graph)

    def value(leaf: fx.Node, x: Tensor) -> Any:
        if leaf is given:
            return x
        args, kwargs = map_nodes((leaf.args, leaf.kwargs), lambda inner: value(inner, x))
        return getattr(run, leaf.op)(leaf.target, args, kwargs)

    def step(x: Tensor) -> Tensor:
        args, kwargs = map_nodes((node.args, node.kwargs), lambda leaf: value(leaf, x))
        return getattr(run, node.op)(node.target, args, kwargs)

    return step
