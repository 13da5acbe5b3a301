"""Which functions, methods and modules are done number by number, and drops that both bands share."""

from __future__ import annotations

import operator
from typing import Any

import timm.layers.activations as tl
import torch
from timm.layers.drop import DropPath
from torch import nn
from torch.nn import functional as F
from torchvision.ops import StochasticDepth

from octify.graph import input_nodes
from octify.modes import ModeCall
from octify.rules.base import Bands, Build, Map, Op, Rule, Ties, register
from octify.rules.elementwise import Elementwise, OfTwo


class InBothModes(Elementwise):
    """A function that is told whether the network is training: `F.dropout(x, training=self.training)`."""

    def applies(self, op: Op) -> bool:
        """Whether the function is elementwise."""
        return op.module is not None and op.module.function in ACTIVATION_FUNCTIONS


class SharedDrop(nn.Module):
    """Drops whole samples of a residual branch, the same ones in both bands."""

    def __init__(self, drop: nn.Module) -> None:
        super().__init__()
        self.drop = drop

    def forward(self, high: torch.Tensor, low: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Both bands times one mask drawn by the source's module."""
        if not self.training:
            return high, low
        mask = self.drop(high.new_ones((high.shape[0],) + (1,) * (high.dim() - 1)))
        return high * mask, low * mask


class DropSamples(Rule):
    """Stochastic depth."""

    def flow(self, op: Op, ties: Ties) -> Map:
        """Keeps its input's channels."""
        return _only_map(op)

    def emit(self, op: Op, build: Build) -> Bands:
        """One mask for both bands."""
        source: Bands = build.value(input_nodes(op.node)[0])
        node = build.module(lambda: SharedDrop(build.source_module()), source.high, source.low)
        return Bands(*build.pair(node), source.layout, source.map)


def _only_map(op: Op) -> Map:
    (found,) = op.maps
    return found


# Typed loosely: the standard library's own annotations of these are partly unknown.
_operator: Any = operator

ACTIVATION_MODULES = (
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.CELU, nn.SELU, nn.GELU, nn.SiLU, nn.Mish, nn.Hardswish, nn.Hardsigmoid,
    nn.Hardtanh, nn.Sigmoid, nn.Tanh, nn.Softplus, nn.Softsign, nn.Softshrink, nn.Hardshrink, nn.Tanhshrink,
    nn.LogSigmoid, nn.Threshold, nn.RReLU, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout,
    nn.FeatureAlphaDropout, nn.Identity, tl.Sigmoid, tl.Tanh, tl.Swish, tl.Mish, tl.HardSwish, tl.HardSigmoid,
    tl.HardMish, tl.GELU, tl.GELUTanh, tl.QuickGELU,
)  # fmt: skip

ACTIVATION_FUNCTIONS: tuple[Any, ...] = (
    F.relu, F.relu6, F.leaky_relu, F.elu, F.celu, F.selu, F.gelu, F.silu, F.mish, F.hardswish, F.hardsigmoid,
    F.hardtanh, F.sigmoid, F.tanh, F.softplus, F.softsign, F.softshrink, F.hardshrink, F.tanhshrink, F.logsigmoid,
    F.threshold, F.dropout, F.dropout2d, F.dropout3d, F.alpha_dropout, F.relu_, F.leaky_relu_, F.elu_,
    torch.relu, torch.relu_, torch.sigmoid, torch.tanh, torch.exp, torch.abs, torch.sqrt, torch.rsqrt,
    torch.square, torch.clamp, torch.pow, torch.clone, torch.neg, torch.sign, torch.reciprocal, torch.log,
    torch.sin, torch.cos, torch.log1p, _operator.neg, _operator.pow, abs,
)  # fmt: skip

JOIN_FUNCTIONS: tuple[Any, ...] = (
    _operator.add, _operator.sub, _operator.mul, _operator.truediv, _operator.iadd, _operator.isub, _operator.imul,
    _operator.itruediv, torch.add, torch.sub, torch.subtract, torch.mul, torch.multiply, torch.div, torch.divide,
    torch.true_divide, torch.maximum, torch.minimum, torch.lerp, torch.addcmul, torch.where, _operator.gt, _operator.ge,
    _operator.lt, _operator.le,
)  # fmt: skip

METHODS = (
    "relu", "relu_", "sigmoid", "sigmoid_", "tanh", "tanh_", "exp", "abs", "sqrt", "rsqrt", "square", "clamp",
    "clamp_", "clamp_min", "clamp_max", "pow", "clone", "neg", "contiguous", "detach", "float", "half", "bfloat16",
    "double", "to", "type_as", "type", "add", "add_", "sub", "sub_", "mul", "mul_", "div", "div_", "maximum",
    "minimum", "expand_as", "hardsigmoid", "lerp", "reciprocal", "log", "requires_grad_", "where", "masked_fill", "sin",
    "cos", "log1p", "abs_", "neg_", "clip",
)  # fmt: skip

register(Elementwise(), modules=dict.fromkeys(ACTIVATION_MODULES))
register(Elementwise(), functions=dict.fromkeys((*ACTIVATION_FUNCTIONS, *JOIN_FUNCTIONS)), methods=METHODS)
register(DropSamples(), modules=(DropPath, StochasticDepth))
register(InBothModes(), modules=(ModeCall,))
register(OfTwo(), functions=(torch.min,), methods=("min",))
