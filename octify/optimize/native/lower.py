"""Puts programs in the place of what octify's kernels can run.

Before: pool_low, conv hh, conv lh, conv ll, conv hl, join, join.
After:  one call of a `Program`, in which every join is one step (and the low path of a high join another).
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, fx, nn

from octify.graph import get_module, set_module, shape_of, value_of, writes_in_place
from octify.octconv import as_tuple
from octify.optimize.forms import Enter, Leave, LowPool, OutSize, join
from octify.optimize.native.builder import Builder
from octify.optimize.native.gates import gate_of, is_choice, is_mean, is_mean_of_bands
from octify.optimize.native.program import Program
from octify.optimize.native.steps import small_group, waste
from octify.optimize.passes import act_of
from octify.resample import average, pool_low

IN_PLACE: tuple[Any, ...] = tuple(cast(Any, operator).__dict__[name] for name in ("iadd", "isub", "imul", "itruediv"))
WASTE = 8.0  # products made for one that is needed, up to which a grouped convolution is run here
PANEL = 16  # as most machines have it


def lower_native(module: fx.GraphModule) -> int:
    """Puts programs in place, by the nodes' recorded values; returns how many."""
    known = _Natives(module)
    for node in list(module.graph.nodes):
        if known.borders(node) and known.holds(node):
            _read_map(module, node)
    module.graph.eliminate_dead_code(_counts)
    count = 0
    for segment in _segments(module.graph, known):
        if any(known.works(node) for node in segment):
            _replace(module, segment, f"octify_program_{count}")
            count += 1
    module.graph.eliminate_dead_code(_counts)
    module.graph.lint()
    module.recompile()
    return count


def _counts(node: fx.Node) -> bool:
    """Whether a node does something without readers."""
    return node.is_impure() or writes_in_place(node)


def _segments(graph: fx.Graph, known: _Natives) -> list[list[fx.Node]]:
    """Runs of nodes that programs can hold; what lies between two of a run reads none of its values."""
    found: list[list[fx.Node]] = [[]]
    inside: set[fx.Node] = set()
    for node in graph.nodes:
        if known.holds(node):
            found[-1].append(node)
            inside.add(node)
        elif inside.intersection(node.all_input_nodes) or known.mutates(node):
            found.append([])
            inside.clear()
    return [segment for segment in found if segment]


class _Natives:
    """Which nodes of a module the kernels can run."""

    def __init__(self, module: fx.GraphModule) -> None:
        self.module = module

    def holds(self, node: fx.Node) -> bool:
        """Whether a program can hold a node."""
        reads = node.args[:1] if self.borders(node) else node.all_input_nodes
        return _is_map(node) and all(isinstance(x, fx.Node) and _is_map(x) for x in reads) and self._kind(node)

    def works(self, node: fx.Node) -> bool:
        """Whether a node makes a program worth its call."""
        return node.target is join or (node.op == "call_module" and type(self._module(node)) is nn.Conv2d)

    def mutates(self, node: fx.Node) -> bool:
        """Whether a node writes over what it reads, so that its place in the order matters."""
        if node.op == "call_function" and (node.target in IN_PLACE or node.kwargs.get("inplace")):
            return True
        if node.op != "call_module":
            return writes_in_place(node)
        return bool(getattr(self._module(node), "inplace", False))

    def _module(self, node: fx.Node) -> nn.Module:
        return get_module(self.module, str(node.target))

    def borders(self, node: fx.Node) -> bool:
        """Whether a node pads with zeros for convolutions alone, or crops what a convolution gives it alone."""
        found = self._module(node) if node.op == "call_module" else None
        if type(found) is Leave:
            source, size = cast("tuple[fx.Node, fx.Node]", node.args[:2])
            high = size if len(node.args) > 2 else cast(fx.Node, size.args[0])
            return self.is_conv(source) and len(source.users) == 1 and _is_map(high)
        if type(found) is not Enter or found.route.same or found.route.pool or found.route.pick:
            return False
        zeros = all(mode == "constant" for mode, _ in found.route.pads)
        return zeros and all(self.is_conv(reader) for reader in node.users)

    def _kind(self, node: fx.Node) -> bool:
        if is_mean(self.module, node):
            return True
        if node.op == "call_function":
            if node.target in (pool_low, average):
                return node.args[1] in (2, (2, 2))
            if node.target is torch.cat:
                return _concatenates_channels(node)
            if is_mean_of_bands(node) or is_choice(node) or gate_of(node):
                return True
            return (node.target is join and _joins_here(node)) or bool(act_of(self.module, node))
        if node.op == "call_module":
            found = self._module(node)
            norm = type(found) is nn.BatchNorm2d and found.running_var is not None
            window = type(found) is nn.MaxPool2d and not found.return_indices
            low = type(found) is LowPool and (found.halves or found.takes_greatest)
            known = norm or window or low or halves(found)
            return known or self.is_conv(node) or self.borders(node) or bool(act_of(self.module, node))
        return bool(act_of(self.module, node))

    def is_conv(self, node: fx.Node) -> bool:
        """Whether a node is a convolution that the kernels can run."""
        conv = self._module(node) if node.op == "call_module" else None
        if type(conv) is not nn.Conv2d or conv.padding_mode != "zeros" or isinstance(conv.padding, str):
            return False
        if conv.weight.dtype != torch.float32 or conv.weight.device.type != "cpu":
            return False
        if conv.groups == 1 or small_group(conv.weight.shape, conv.groups):
            return True
        return waste((conv.in_channels, conv.out_channels), conv.groups, PANEL) <= WASTE


def halves(module: nn.Module) -> bool:
    """Whether a module averages 2 by 2 positions side by side."""
    if type(module) is not nn.AvgPool2d or module.divisor_override is not None:
        return False
    geometry = (module.kernel_size, module.stride, module.padding)
    return [as_tuple(value, 2) for value in geometry] == [(2, 2), (2, 2), (0, 0)]


def _is_map(node: fx.Node) -> bool:
    value = value_of(node)
    if not isinstance(value, Tensor) or value.dtype != torch.float32:
        return False
    shape = shape_of(value) or ()
    return len(shape) == 4 and shape[1] > 0


def _concatenates_channels(node: fx.Node) -> bool:
    parts, *rest = cast("tuple[Any, ...]", node.args)
    return (rest or [node.kwargs.get("dim", 0)])[0] == 1 and isinstance(parts, (list, tuple))


def _joins_here(node: fx.Node) -> bool:
    """Whether all terms of a sum have its size (or, upsampled, half of it)."""
    shape = shape_of(value_of(node)) or ()
    highs, lows, spatial = cast("tuple[list[fx.Node], list[fx.Node], int]", node.args[:3])
    small = (*shape[:2], *((size + 1) // 2 for size in shape[2:]))
    fits = all(shape_of(value_of(term)) == shape for term in highs)
    return spatial == 2 and fits and all(shape_of(value_of(term)) == small for term in lows)


def _read_map(module: fx.GraphModule, node: fx.Node) -> None:
    """A crop reads the high map itself in the place of the size that was worked out from it."""
    size = cast(fx.Node, node.args[1])
    if isinstance(get_module(module, str(node.target)), Enter):
        node.args = node.args[:1]
        return
    axes = cast(OutSize, get_module(module, str(size.target)))
    node.args = (node.args[0], size.args[0], axes.halved)


def _replace(module: fx.GraphModule, segment: Sequence[fx.Node], name: str) -> None:
    """One call for a segment's nodes."""
    mine = set(segment)
    inputs = list(dict.fromkeys(x for node in segment for x in node.all_input_nodes if x not in mine and _is_map(x)))
    outputs = [node for node in segment if any(reader not in mine for reader in node.users)]
    builder = Builder(module, inputs)
    for node in segment:
        builder.add(node)
    values = [builder.value(node) for node in outputs]
    given = list(dict.fromkeys(values))
    set_module(module, name, Program(builder.steps, len(inputs), given))
    graph = module.graph
    with graph.inserting_before(segment[-1].next):
        call = graph.call_module(name, tuple(inputs))
        results = [call]
        if len(given) > 1:
            results = [graph.call_function(operator.getitem, (call, index)) for index in range(len(given))]
    for node, value in zip(outputs, values, strict=True):
        result = results[given.index(value)]
        result.meta = dict(node.meta)
        node.replace_all_uses_with(result, delete_user_cb=lambda reader: reader not in mine)
    for node in reversed(segment):
        graph.erase_node(node)
