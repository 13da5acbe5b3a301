"""Puts programs in the place of what octify's kernels can run.

Before: pool_low, conv hh, conv lh, conv ll, conv hl, join, join.
After:  one call of a `Program`, in which every join is one step (and the low path of a high join another).
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any, cast

from torch import fx, nn

from octify.graph import get_module, set_module, writes_in_place
from octify.optimize.forms import Leave, OutSize, join
from octify.optimize.native.builder import Builder
from octify.optimize.native.convs import borders
from octify.optimize.native.expressions import is_size
from octify.optimize.native.known import operation_of
from octify.optimize.native.operations import Operation, is_map, module_of
from octify.optimize.native.program import Program
from octify.optimize.native.simplify import simplify

IN_PLACE: tuple[Any, ...] = tuple(cast(Any, operator).__dict__[name] for name in ("iadd", "isub", "imul", "itruediv"))


def lower_native(module: fx.GraphModule) -> int:
    """Puts programs in place, by the nodes' recorded values; returns how many."""
    simplify(module)
    for node in list(module.graph.nodes):
        if borders(module, node) and _holds(module, node):
            _read_map(module, node)
    module.graph.eliminate_dead_code(counts)
    known = {node: found for node in module.graph.nodes if (found := _holds(module, node))}
    count = 0
    for segment in _segments(module, known):
        if any(_works(module, node) for node in segment):
            _replace(module, segment, known, f"octify_program_{count}")
            count += 1
    module.graph.eliminate_dead_code(counts)
    module.graph.lint()
    module.recompile()
    return count


def counts(node: fx.Node) -> bool:
    """Whether a node does something without readers."""
    return node.is_impure() or writes_in_place(node)


def _segments(module: fx.GraphModule, known: dict[fx.Node, Operation]) -> list[list[fx.Node]]:
    """Runs of nodes that programs can hold; what lies between two of a run reads none of its values but for sizes."""
    found: list[list[fx.Node]] = [[]]
    inside: set[fx.Node] = set()
    for node in module.graph.nodes:
        if node in known:
            found[-1].append(node)
            inside.add(node)
        elif inside.intersection(node.all_input_nodes) and is_size(module, node):
            inside.add(node)
        elif inside.intersection(node.all_input_nodes) or _mutates(module, node):
            found.append([])
            inside.clear()
    return [segment for segment in found if segment]


def _holds(module: fx.GraphModule, node: fx.Node) -> Operation | None:
    """How a program holds a node, None if it cannot."""
    if not is_map(node):
        return None
    reads = cast("list[fx.Node]", node.args[:1]) if borders(module, node) else node.all_input_nodes
    if not all(is_map(x) or is_size(module, x) for x in reads):
        return None
    return operation_of(module, node)


def _works(module: fx.GraphModule, node: fx.Node) -> bool:
    """Whether a node makes a program worth its call."""
    return node.target is join or type(module_of(module, node)) is nn.Conv2d


def _mutates(module: fx.GraphModule, node: fx.Node) -> bool:
    """Whether a node writes over what it reads, so that its place in the order matters."""
    if node.op == "call_function" and (node.target in IN_PLACE or node.kwargs.get("inplace")):
        return True
    if node.op != "call_module":
        return writes_in_place(node)
    return bool(getattr(get_module(module, str(node.target)), "inplace", False))


def _read_map(module: fx.GraphModule, node: fx.Node) -> None:
    """A crop reads the high map itself in the place of the size that was worked out from it."""
    if not isinstance(get_module(module, str(node.target)), Leave):
        node.args = node.args[:1]
        return
    size = cast(fx.Node, node.args[1])
    axes = cast(OutSize, get_module(module, str(size.target)))
    node.args = (node.args[0], size.args[0], axes.halved)


def _replace(module: fx.GraphModule, segment: Sequence[fx.Node], known: dict[fx.Node, Operation], name: str) -> None:
    """One call for a segment's nodes."""
    sizes = _sizes_between(module, segment)
    later = [node for node, others in sizes.items() if others]
    mine = {*segment, *sizes}.difference(later)
    inputs = list(dict.fromkeys(x for node in segment for x in _maps_behind(node) if x not in mine))
    outputs = [node for node in segment if any(reader not in mine for reader in node.users)]
    builder = Builder(module, inputs)
    for node in segment:
        known[node].add(builder, node)
    values = [builder.whole(node) for node in outputs]
    given = list(dict.fromkeys(values))
    set_module(module, name, Program(builder.steps, len(inputs), given))
    graph = module.graph
    last = segment[-1]
    with graph.inserting_before(last.next):
        results = [graph.call_module(name, tuple(inputs))]
        if len(given) > 1:
            results = [graph.call_function(operator.getitem, (results[0], index)) for index in range(len(given))]
    for node, value in zip(outputs, values, strict=True):
        result = results[given.index(value)]
        result.meta = dict(node.meta)
        node.replace_all_uses_with(result, delete_user_cb=lambda reader: reader not in mine)
    place = results[-1]
    for node in later:
        place.append(node)
        place = node
    for node in [node for node in reversed(graph.nodes) if node in mine]:
        graph.erase_node(node)


def _maps_behind(node: fx.Node) -> list[fx.Node]:
    """The maps that a node reads, or that the sizes which it reads are worked out from."""
    return [found for x in node.all_input_nodes for found in ([x] if is_map(x) else _maps_behind(x))]


def _sizes_between(module: fx.GraphModule, segment: Sequence[fx.Node]) -> dict[fx.Node, bool]:
    """The nodes between a segment's that work out sizes from its maps, and whether anything behind it reads them."""
    found: dict[fx.Node, bool] = {}
    inside, node = set(segment), segment[0]
    while node is not segment[-1]:
        reads = inside.union(found).intersection(node.all_input_nodes)
        if node not in inside and reads and is_size(module, node):
            found[node] = True
        node = node.next
    for node in reversed(found):
        found[node] = any(reader not in inside and found.get(reader, True) for reader in node.users)
    return found
