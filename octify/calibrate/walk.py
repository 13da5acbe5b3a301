"""Running a graph over all calibration images, a stretch of it at a time, so that two networks go side by side."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any, TypeVar, cast, overload

import torch
from torch import Tensor, fx, nn

from octify.calibrate.store import Shelf, Store
from octify.graph import map_leaves, nodes_in
from octify.module import OctaveModule
from octify.trace import Trace

Chunk = tuple[Tensor, ...]  # the model's inputs for some images
Value = TypeVar("Value")


class Values(Sequence[Value]):
    """Something of every chunk, made anew (or read from the file) each time that it is asked for."""

    def __init__(self, count: int, value: Callable[[int], Value]) -> None:
        self._count, self._value = count, value

    @overload
    def __getitem__(self, index: int) -> Value: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Value]: ...
    def __getitem__(self, index: int | slice) -> Value | Sequence[Value]:
        chosen = range(self._count)[index]
        return self._value(chosen) if isinstance(chosen, int) else Values(len(chosen), lambda i: self._value(chosen[i]))

    def __len__(self) -> int:
        return self._count


class Walk:
    """A graph run over chunks of images, chunk by chunk through a stretch of nodes.

    Every node runs once per chunk, whatever is measured or changed where a stretch ends. What later nodes read is kept.
    """

    def __init__(self, root: nn.Module, graph: fx.Graph, chunks: Sequence[Chunk], store: Store | None = None) -> None:
        self.root, self.graph, self.chunks = root, graph, chunks
        self.nodes = [node for node in graph.nodes if node.op != "output"]
        self.result: Any = next(node for node in reversed(graph.nodes) if node.op == "output").args[0]
        self._index = {node: index for index, node in enumerate(self.nodes)}
        self._last = _last_readers(self.nodes, nodes_in(self.result))
        self._run = fx.Interpreter(root, garbage_collect_values=False, graph=graph)
        self._inputs = [node for node in self.nodes if node.op == "placeholder"]
        store = store or Store()
        self._shelves: list[Shelf[fx.Node]] = [Shelf(store) for _ in chunks]
        self._kept: list[fx.Node] = []
        self._done = 0

    def run_before(self, node: fx.Node) -> None:
        """Runs all that comes before a node."""
        self._run_until(self._index[node], None)

    def run_through(self, node: fx.Node) -> None:
        """Runs all up to a node, and the node, whose value is kept until the next stretch even if nobody reads it."""
        self._run_until(self._index[node] + 1, node)

    @property
    def values(self) -> dict[fx.Node, Sequence[Any]]:
        """What is kept of nodes that have run, chunk by chunk."""
        return {node: self._each(lambda shelf, node=node: shelf.look(node)) for node in self._kept}

    def arguments(self, node: fx.Node) -> Sequence[tuple[Any, ...]]:
        """A node's positional arguments, chunk by chunk."""
        return self._each(lambda shelf: self._lookup(node.args, shelf.look))

    def put(self, node: fx.Node, values: Sequence[Any]) -> None:
        """Goes on with copies of other values in the place of a kept node's."""
        for shelf, value in zip(self._shelves, values, strict=True):
            shelf.change(lambda kept, value=value: {**kept, node: value.clone()})

    def fork(self, root: nn.Module, graph: fx.Graph, store: Store) -> Walk:
        """A walk over another network from where this one stands; so far both must be the same."""
        other = Walk(root, graph, self.chunks, store)
        named = {node.name: node for node in other.nodes}
        twin = {node: named.get(node.name) for node in self.nodes[: self._done]}
        done = 1 + max((other._index[found] for found in twin.values() if found is not None), default=-1)
        own = [node for node in other.nodes[:done] if node.op != "get_attr"]  # a function reads what a module has
        if None in twin.values() or not set(own) <= set(twin.values()):
            raise AssertionError("the networks differ before they fork")
        other._done, other._kept = done, [cast(fx.Node, twin[node]) for node in self._kept]
        for mine, theirs in zip(self._shelves, other._shelves, strict=True):
            theirs.change(
                lambda _, mine=mine: {cast(fx.Node, twin[node]): value for node, value in mine.copied().items()}
            )
        return other

    def _each(self, value: Callable[[Shelf[fx.Node]], Any]) -> Sequence[Any]:
        return Values(len(self._shelves), lambda index: value(self._shelves[index]))

    def run(self) -> list[Any]:
        """Runs the rest: what the network gives, chunk by chunk."""
        self._run_until(len(self.nodes), None)
        return list(self._each(lambda shelf: self._lookup(self.result, shelf.look)))

    def _run_until(self, stop: int, wanted: fx.Node | None) -> None:
        if stop < self._done:
            raise AssertionError(f"{self.nodes[stop]} does not come in the order of execution")
        stretch, self._done = self.nodes[self._done : stop], stop
        ends: dict[int, list[fx.Node]] = defaultdict(list)
        self._kept = kept = list[fx.Node]()
        for node in self.nodes[:stop]:
            lives = node is wanted or self._last[node] >= stop
            if lives and node.op != "get_attr":
                kept.append(node)
            elif not lives:
                ends[self._last[node]].append(node)

        def work(index: int, values: dict[fx.Node, Any]) -> dict[fx.Node, Any]:
            for node in stretch:
                values[node] = self._value(node, index, values.__getitem__)
                for dead in ends[self._index[node]]:
                    values.pop(dead, None)
            return {node: values[node] for node in kept}

        with torch.no_grad():
            for index, shelf in enumerate(self._shelves):
                shelf.change(lambda values, index=index: work(index, values))

    def _value(self, node: fx.Node, index: int, read: Callable[[fx.Node], Any]) -> Any:
        if node.op == "placeholder":
            position = self._inputs.index(node)
            given = self.chunks[index]
            # A copy, because the network may write into it.
            return given[position].clone() if position < len(given) else node.args[0] if node.args else None
        args, kwargs = self._lookup(node.args, read), self._lookup(node.kwargs, read)
        return getattr(self._run, node.op)(node.target, args, kwargs)

    def _lookup(self, argument: Any, read: Callable[[fx.Node], Any]) -> Any:
        def value(leaf: Any) -> Any:
            if not isinstance(leaf, fx.Node):
                return leaf
            return self._run.get_attr(leaf.target, (), {}) if leaf.op == "get_attr" else read(leaf)  # pyright: ignore

        return map_leaves(argument, value)


def walk_dense(trace: Trace, chunks: Sequence[Chunk]) -> Walk:
    """A walk over the traced network as it is in eval mode; `trace.model` must be in that mode."""
    return Walk(trace.model, trace.eval_graph, chunks)


def walk_octave(converted: OctaveModule, chunks: Sequence[Chunk]) -> Walk:
    """A walk over a converted network in eval mode."""
    return Walk(converted, converted.graph, chunks)


def _last_readers(nodes: Sequence[fx.Node], kept: Sequence[fx.Node]) -> dict[fx.Node, int]:
    """The index of the last node that reads each one's value; beyond all of them for what is kept."""
    last: dict[fx.Node, int] = {}
    for index, node in enumerate(nodes):
        last[node] = index
        last.update(dict.fromkeys(node.all_input_nodes, index))
    return {**last, **dict.fromkeys(kept, len(nodes))}


def split_chunks(inputs: Sequence[Tensor], size: int) -> list[Chunk]:
    """Inputs cut into chunks of at most `size` images."""
    starts = range(0, len(inputs[0]), size)
    return [tuple(tensor[start : start + size] for tensor in inputs) for start in starts]
