"""Running a graph node by node over all calibration images, so that two networks can be compared on the way."""

from __future__ import annotations

import tempfile
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from octify.graph import map_leaves, nodes_in
from octify.module import OctaveModule, graph_of_mode
from octify.trace import Trace

MEMORY = 3 << 30  # bytes of activations kept in memory per network; what is beyond goes to unnamed temporary files

Chunk = tuple[Tensor, ...]  # the model's inputs for some images


class Walk:
    """A graph run over chunks of images, one node at a time; a value is dropped behind its last reader.

    Every node runs once per chunk, whatever is measured or changed on the way.
    """

    def __init__(self, root: nn.Module, graph: fx.Graph, chunks: Sequence[Chunk], memory: int = MEMORY) -> None:
        self.root, self.chunks, self.memory = root, chunks, memory
        self.nodes = [node for node in graph.nodes if node.op != "output"]
        self.result: Any = next(node for node in reversed(graph.nodes) if node.op == "output").args[0]
        self.values: dict[fx.Node, list[Any]] = {}
        self._run = fx.Interpreter(root, garbage_collect_values=False, graph=graph)
        self._inputs = [node for node in self.nodes if node.op == "placeholder"]
        self._last = _last_readers(self.nodes, nodes_in(self.result))
        self._held = 0

    def step(self, node: fx.Node) -> list[Any]:
        """Runs one node on all chunks."""
        with torch.no_grad():
            values = [self._keep(self._value(node, index)) for index in range(len(self.chunks))]
        self.values[node] = values
        return values

    def free(self, node: fx.Node) -> None:
        """Drops what nobody reads behind this node."""
        for dead in self._last[node]:
            for value in self.values.pop(dead, []):
                self._held -= _bytes(value)

    def arguments(self, node: fx.Node) -> list[tuple[Any, ...]]:
        """A node's positional arguments, chunk by chunk."""
        return [self._lookup(node.args, index) for index in range(len(self.chunks))]

    def outputs(self) -> list[Any]:
        """What the network gives, chunk by chunk, once every node has run."""
        return [self._lookup(self.result, index) for index in range(len(self.chunks))]

    def run(self) -> list[Any]:
        """Runs everything that has not run yet."""
        for node in self.nodes:
            if node not in self.values:
                self.step(node)
                self.free(node)
        return self.outputs()

    def _lookup(self, argument: Any, index: int) -> Any:
        def value(leaf: Any) -> Any:
            return self.values[leaf][index] if isinstance(leaf, fx.Node) else leaf

        return map_leaves(argument, value)

    def _value(self, node: fx.Node, index: int) -> Any:
        if node.op == "placeholder":
            position = self._inputs.index(node)
            given = self.chunks[index]
            return given[position] if position < len(given) else node.args[0] if node.args else None
        args, kwargs = self._lookup(node.args, index), self._lookup(node.kwargs, index)
        return getattr(self._run, node.op)(node.target, args, kwargs)

    def _keep(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            self._held += _bytes(value)
            return _spilled(value) if self._held > self.memory and value.device.type == "cpu" else value
        if type(value) in (tuple, list):
            return type(value)(self._keep(item) for item in value)
        return value


def walk_dense(trace: Trace, chunks: Sequence[Chunk]) -> Walk:
    """A walk over the traced network as it is in eval mode; `trace.model` must be in that mode."""
    graph = graph_of_mode(trace.graph, training=False) if trace.two_modes else trace.graph
    return Walk(trace.model, graph, chunks)


def walk_octave(converted: OctaveModule, chunks: Sequence[Chunk]) -> Walk:
    """A walk over a converted network in eval mode."""
    return Walk(converted, converted.graph, chunks)


def _last_readers(nodes: Sequence[fx.Node], kept: Sequence[fx.Node]) -> dict[fx.Node, list[fx.Node]]:
    """For each node, the values that it is the last one to read."""
    last: dict[fx.Node, fx.Node] = {}
    for node in nodes:
        last[node] = node
        last.update(dict.fromkeys(node.all_input_nodes, node))
    dying: dict[fx.Node, list[fx.Node]] = defaultdict(list)
    for node, reader in last.items():
        if node not in kept:
            dying[reader].append(node)
    return dying


def _bytes(value: Any) -> int:
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    return sum(map(_bytes, value)) if isinstance(value, (tuple, list)) else 0  # pyright: ignore[reportUnknownArgumentType]


def _spilled(value: Tensor) -> Tensor:
    """The same values in a file of their own, which goes when the tensor goes."""
    if not value.numel():
        return value
    with tempfile.NamedTemporaryFile(prefix="octify-") as file:
        stored = torch.from_file(file.name, shared=True, size=value.numel(), dtype=value.dtype)
    return stored.view(value.shape).copy_(value)


def split_chunks(inputs: Sequence[Tensor], size: int) -> list[Chunk]:
    """Inputs cut into chunks of at most `size` images."""
    starts = range(0, len(inputs[0]), size)
    return [tuple(tensor[start : start + size] for tensor in inputs) for start in starts]
