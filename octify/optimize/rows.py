"""Maps of one axis as maps of one row, which the kernels for images run.

Before: x (N, C, L) → conv1d → relu → mean.   After: unsqueeze → conv2d of one row → relu → squeeze → mean.
D and U of one row are those of the axis along it, so that octave layers stay what they are.
"""

from __future__ import annotations

import operator
from collections import Counter
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, fx, nn

from octify.graph import get_module, map_nodes, set_module, value_of
from octify.layers import Merge, OctConv1d, OctConv2d, Split
from octify.norms import OctGroupNorm
from octify.optimize.native.channels import MULS
from octify.optimize.passes import ADDS, IDLE, act_of
from octify.pooling import OctPool
from octify.resample import pool_low

SAME_MODULE = (nn.GroupNorm, nn.PReLU, *IDLE)  # do the same with one axis more


def take_rows(module: fx.GraphModule) -> int:
    """Gives maps of one axis a row, from the first convolution to what is not known here; returns how many nodes."""
    rows = _Rows(module)
    for node in list(module.graph.nodes):
        rows.look_at(node)
    return len(rows.taken)


class _Rows:
    """`taken` are the nodes that give maps of one row now."""

    def __init__(self, module: fx.GraphModule) -> None:
        self.module, self.graph = module, module.graph
        self.calls = Counter(str(node.target) for node in module.graph.nodes if node.op == "call_module")
        self.rowed: set[str] = set()  # convolutions that were made one of a row, which may be called again
        self.taken: set[fx.Node] = set()
        self.moved: dict[tuple[fx.Node, str], fx.Node] = {}

    def look_at(self, node: fx.Node) -> None:
        """Takes a node that is known; any other reads maps of one axis as before."""
        known = self._begins(node) or (self._goes_on(node) and not self.taken.isdisjoint(node.all_input_nodes))
        if known:
            self.taken.add(node)
        inputs = {source: self._moved(source, node, known) for source in node.all_input_nodes}
        node.args, node.kwargs = (map_nodes(given, inputs.__getitem__) for given in (node.args, node.kwargs))

    def _moved(self, source: fx.Node, reader: fx.Node, as_row: bool) -> fx.Node:
        """What a reader is given in the place of a map, with or without the row."""
        if (source in self.taken) == as_row:
            return source
        name = "unsqueeze" if as_row else "squeeze"
        if (source, name) not in self.moved:
            with self.graph.inserting_before(reader):
                self.moved[source, name] = self.graph.call_method(name, (source, 2))
        return self.moved[source, name]

    def _begins(self, node: fx.Node) -> bool:
        """Whether a node is a convolution, which becomes one of a row."""
        if node.op != "call_module":
            return False
        conv = get_module(self.module, str(node.target))
        if not all(_is_line(source) for source in node.all_input_nodes):
            return False
        if type(conv) in (nn.Conv1d, OctConv1d):
            set_module(self.module, str(node.target), _conv(conv) if type(conv) is nn.Conv1d else _octave(conv))
            self.rowed.add(str(node.target))
        return str(node.target) in self.rowed

    def _goes_on(self, node: fx.Node) -> bool:
        """Whether a node does the same with rows, or is made to."""
        if node.target is operator.getitem and isinstance(node.args[1], int):
            return isinstance(value_of(cast(fx.Node, node.args[0])), tuple) and _is_line(node)
        if not all(_is_line(source) for source in node.all_input_nodes) or not node.all_input_nodes:
            return False
        if node.op == "call_module":
            return self._takes_module(node)
        if node.target in (*ADDS, *MULS):
            return len(node.args) == 2 and not node.kwargs
        if node.target is torch.cat:
            return (*node.args, *node.kwargs.values())[1:] == (1,)
        if node.target is pool_low and node.args[1:] == (1,):
            node.args = (node.args[0], 2)
            return True
        return bool(act_of(self.module, node)) and _is_line(node)

    def _takes_module(self, node: fx.Node) -> bool:
        path = str(node.target)
        found: Any = get_module(self.module, path)
        if act_of(self.module, node) or type(found) in SAME_MODULE:
            return True
        if self.calls[path] > 1:
            return False
        if type(found) is nn.BatchNorm1d:
            cast(Any, found).__class__ = nn.BatchNorm2d  # the same but for the axes that it looks for
        elif type(found) in (OctGroupNorm, Split, Merge):
            found.spatial = 2
        elif type(found) in (nn.MaxPool1d, nn.AvgPool1d) and not getattr(found, "return_indices", False):
            set_module(self.module, path, _pool(found))
        elif type(found) is OctPool:
            window = found.window
            sizes = [(one, window.axis(value, 0)) for one, value in zip((1, 1, 0, 1), _sizes(window), strict=True)]
            kernel, stride, padding, dilation = sizes
            rowed = replace(window, kernel=kernel, stride=stride, padding=padding, dilation=dilation, dims=2)
            set_module(self.module, path, OctPool(rowed))
        else:
            return False
        return True


def _is_line(node: fx.Node) -> bool:
    """Whether a node gives a map of one axis (N, C, L), or a pair of them."""
    value = value_of(node)
    parts = cast("tuple[Any, ...]", value if isinstance(value, tuple) else (value,))
    return all(isinstance(part, Tensor) and part.dim() == 3 and part.is_floating_point() for part in parts)


def _sizes(window: Any) -> tuple[Any, ...]:
    return window.kernel, window.stride, window.padding, window.dilation


def _number(value: Any) -> int:
    return int(value[0]) if isinstance(value, (tuple, list)) else int(value)  # pyright: ignore[reportUnknownArgumentType]


def _pool(pool: Any) -> nn.Module:
    kernel, stride, padding = (
        (one, _number(n)) for one, n in ((1, pool.kernel_size), (1, pool.stride), (0, pool.padding))
    )
    if isinstance(pool, nn.MaxPool1d):
        return nn.MaxPool2d(kernel, stride, padding, (1, _number(pool.dilation)), ceil_mode=pool.ceil_mode)
    return nn.AvgPool2d(kernel, stride, padding, pool.ceil_mode, pool.count_include_pad)


def _conv(conv: Any) -> nn.Module:
    padding = conv.padding if isinstance(conv.padding, str) else (0, *conv.padding)
    geometry = ((1, *conv.kernel_size), (1, *conv.stride), padding, (1, *conv.dilation), conv.groups)
    bias = conv.bias is not None
    made: Any = nn.Conv2d(conv.in_channels, conv.out_channels, *geometry, bias, conv.padding_mode, device="meta")
    made.weight, made.bias = _with_row(conv.weight), conv.bias
    return made.eval()


def _octave(conv: Any) -> OctConv2d:
    made: Any = OctConv2d.__new__(OctConv2d)
    nn.Module.__init__(made)
    padding = conv.padding if isinstance(conv.padding, str) else (0, *conv.padding)
    made._shape((1, *conv.kernel_size), (1, *conv.stride), padding, (1, *conv.dilation), conv.padding_mode)
    made._configure(conv.in_layout, conv.out_layout, conv.groups, conv.paths)
    made._plan(conv.kernels, conv.downsample)
    # A row is as long on either grid: as the axis along it, so that maps that are added lie on one.
    made.routes = {path: replace(route, low=route.low[1:] * 2) for path, route in made.routes.items()}
    made._lift = "lh" in made.paths and any(made.routes["lh"].low)
    for name, value in conv._parameters.items():
        made.register_parameter(name, _with_row(value) if value is not None and name.startswith("weight") else value)
    return made.eval()


def _with_row(weight: Tensor) -> nn.Parameter:
    return nn.Parameter(weight.detach().unsqueeze(2), requires_grad=False)
