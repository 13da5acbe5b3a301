"""Multiply-adds of a network as a function of how far each lever is pulled, for many settings at once."""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# (tensor and array methods that come without complete types)

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray
from torch import fx

from octify.calibrate.levers import Lever
from octify.flows import Flows
from octify.graph import nodes_in, shape_of, value_of
from octify.kernels import half
from octify.octconv import as_tuple, conv_axes
from octify.routes import Route, fold_high, fold_low
from octify.rules.base import Map, maps_in

Counts = NDArray[np.float64]


class CostModel:
    """The share of the dense network's multiply-adds that is left, from the layers' geometry at the example's size.

    Exact where each step of a lever holds equally many channels of every layer, as it nearly always does.
    """

    unit = "multiply-adds"

    def __init__(self, flows: Flows, levers: Sequence[Lever], dense_macs: float) -> None:
        self.dense_macs = dense_macs
        owner = {root: index for index, lever in enumerate(levers) for step in lever.steps for root in step}
        lengths = np.array([len(lever.steps) for lever in levers], dtype=np.float64)
        runs = {node.name for node in flows.trace.eval_graph.nodes}
        nodes = [node for node in flows.ops if _chooses(flows, node) and node.name in runs]
        rows = [_row(flows, node, owner, lengths) for node in nodes]
        self.layers = [str(node.target) for node in nodes]  # paths, where modules are called
        count = len(levers)
        self.reads = np.array([row[0] for row in rows]).reshape(-1, count)  # low inputs a step
        self.gives = np.array([row[1] for row in rows]).reshape(-1, count)
        self.sizes = np.array([row[2] for row in rows], dtype=np.float64).reshape(-1, 2)  # channels in, out
        self.paths = np.array([row[3] for row in rows], dtype=np.float64).reshape(-1, 4)  # multiply-adds a pair
        self.depthwise = np.array([row[4] for row in rows], dtype=bool)

    def ratio(self, counts: Counts) -> NDArray[np.float64]:
        """Multiply-adds against dense, for settings (..., levers) in steps."""
        return 1 - self.saved(counts).sum(-1) / self.dense_macs

    def saved(self, counts: Counts) -> NDArray[np.float64]:
        """Multiply-adds less than dense, layer by layer, (..., layers)."""
        low_in, low_out = counts @ self.reads.T, counts @ self.gives.T
        high_in, high_out = self.sizes[:, 0] - low_in, self.sizes[:, 1] - low_out
        hh, hl, lh, ll = self.paths.T
        crossed = high_in * (high_out * hh + low_out * hl) + low_in * (high_out * lh + low_out * ll)
        alone = high_out * hh + low_out * ll
        before = np.where(self.depthwise, self.sizes[:, 1] * hh, self.sizes[:, 0] * self.sizes[:, 1] * hh)
        return before - np.where(self.depthwise, alone, crossed)


def _chooses(flows: Flows, node: fx.Node) -> bool:
    rule = flows.rules.get(node)
    return rule is not None and rule.kind == "chooses" and node not in flows.dense


def _row(
    flows: Flows, node: fx.Node, owner: dict[int, int], lengths: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64], tuple[int, int], tuple[float, ...], bool]:
    module: Any = flows.trace.module_of(node)
    reads = maps_in([flows.values[source] for source in nodes_in(node.args)])
    gives = cast(Map, flows.values[node])
    groups = int(getattr(module, "groups", 1))
    sizes = _channels(module, reads, gives)
    per_step = [_low_per_step(flows, found, owner, lengths) for found in (reads[0] if reads else None, gives)]
    depthwise = groups == sizes[0] > 1
    pairs = tuple(
        taps / (1 if depthwise else groups) for taps in _path_macs(module, node, reads[0] if reads else None, gives)
    )
    return per_step[0], per_step[1], sizes, pairs, depthwise


def _channels(module: Any, reads: Sequence[Map], gives: Map) -> tuple[int, int]:
    found = getattr(module, "in_channels", None) or getattr(module, "in_features", None)
    return int(found or (reads[0].ids.size if reads else 1)), int(gives.ids.size)


def _low_per_step(
    flows: Flows, found: Map | None, owner: dict[int, int], lengths: NDArray[np.float64]
) -> NDArray[np.float64]:
    total = np.zeros(len(lengths))
    if found is not None:
        for channel in found.ids.ravel().tolist():
            root = flows.classes.find(channel)
            if root in owner:
                total[owner[root]] += 1
    return total / lengths


def _path_macs(module: Any, node: fx.Node, reads: Map | None, gives: Map) -> tuple[float, float, float, float]:
    """Multiply-adds for one pair of channels on the paths hh, hl, lh, ll."""
    shape = shape_of(value_of(node)) or ()
    high = math.prod(shape[axis] for axis in range(1, len(shape)) if axis not in gives.channel)
    low = high * math.prod(half(shape[axis]) / shape[axis] for axis in gives.spatial)
    kernel: tuple[int, ...] = tuple(getattr(module, "kernel_size", ()))
    taps = math.prod(kernel)
    if not kernel or getattr(module, "transposed", False):
        stride = math.prod(getattr(module, "stride", ())) if kernel else 1
        return (high * taps / stride, low * taps / stride, low * taps / stride, low * taps / stride)
    axes = conv_axes(
        kernel, as_tuple(module.stride, len(kernel)), module.padding, as_tuple(module.dilation, len(kernel))
    )
    moved = min(2, len(axes))
    routes = fold_low(axes, moved, module.padding_mode), fold_high(axes, moved, module.padding_mode)
    sizes = None if reads is None else [half(n) if i in reads.spatial else n for i, n in enumerate(reads.shape)][2:]
    expected = low, low if any(routes[1].low) else high
    to_low, to_high = (_macs(route, sizes, grid) for route, grid in zip(routes, expected, strict=True))
    return (high * taps, to_low, to_high, to_low)


def _macs(route: Route, sizes: Sequence[int] | None, expected: float) -> float:
    """Multiply-adds of a route on a low map; its convolution's grid can be larger than what is kept of it."""
    taps = math.prod(route.kernel)
    if sizes is None or route.same or route.pick or isinstance(route.padding, str):
        return taps * expected
    axes = len(sizes)
    lengths = [-(-size // pool) for size, pool in zip(sizes, route.pool or (1,) * axes, strict=True)]
    for _, amounts in route.pads:
        lengths = [n + sum(amounts[2 * (axes - 1 - i) : 2 * (axes - i)]) for i, n in enumerate(lengths)]
    rows = zip(lengths, route.padding, route.kernel, route.dilation, route.stride, strict=True)
    return taps * math.prod((n + 2 * pad - d * (k - 1) - 1) // s + 1 for n, pad, k, d, s in rows)
