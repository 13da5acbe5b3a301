"""A trace and its plan → a new GraphModule with octave weights in place. It never chooses."""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from octify.flows import Flows
from octify.functional import drop_stand_ins
from octify.graph import (
    get_module,
    map_nodes,
    named_modules,
    own_tensors,
    set_module,
    shares_memory,
    structural_copy,
    writes_in_place,
)
from octify.layers import Merge, Split
from octify.layout import Layout
from octify.module import OctaveModule
from octify.operators import find_operator
from octify.plan import Plan, PlanOp
from octify.rules.base import Bands, Map
from octify.tracer import SymbolicTracer


def rewrite_graph(flows: Flows, plan: Plan) -> OctaveModule:
    """Builds the converted module; the source's tensors are copied, never shared."""
    return _Rewriter(flows, plan).run()


class _Rewriter:
    """Walks the source graph once and implements `Build` for the rules."""

    def __init__(self, flows: Flows, plan: Plan) -> None:
        self.flows = flows
        self.trace = flows.trace
        self.values = flows.values
        self.plan = plan
        self.graph = fx.Graph(tracer_cls=SymbolicTracer)
        self.env: dict[fx.Node, Any] = {}
        self.merged: dict[fx.Node, fx.Node] = {}
        self.split: dict[tuple[fx.Node, Layout], Bands] = {}
        self.replaced: dict[str, nn.Module] = {}
        self.copied: list[fx.Node] = []  # dense calls of modules
        self.adapters: dict[tuple[str, Layout, int], str] = {}
        self.node: fx.Node | None = None
        self.op: PlanOp | None = None

    def run(self) -> OctaveModule:
        """The converted module."""
        for node in self.trace.nodes:
            self.node = node
            self.op = self.plan.get(node.name)
            self.env[node] = self._emit(node)
        self._part_calls()
        root = self._root()
        return OctaveModule.build(root, self.graph, two_modes=self.trace.two_modes)

    def _part_calls(self) -> None:
        """Gives dense calls of a module whose other calls are on bands (a pooling used twice) a module of their own."""
        for node in self.copied:
            home = str(node.target)
            source, mine = get_module(self.trace.model, home), self.replaced.get(home)
            parts = any(path.startswith(f"{home}.") for path in self.replaced)
            if parts or (mine is not None and type(mine) is not type(source)):
                node.target = f"octify_{node.name}"
                self.replaced[node.target] = copy.deepcopy(source)

    def _emit(self, node: fx.Node) -> Any:
        if self.op is None or self.op.form == "dense":
            return self._copy(node)
        if node in self.flows.taken:
            return self._operate(node, self.op)
        rule = self.flows.rules[node]
        assert rule is not None, f"the plan gives {node} the form {self.op.form}, but no rule is registered for it"
        emitted = rule.emit(self.flows.ops[node], self)
        return self._own(node, emitted) if isinstance(emitted, Bands) and rule.passes_on else emitted

    def _own(self, node: fx.Node, emitted: Bands) -> Bands:
        """Bands that may be written to: where the source makes a copy, none that is still another value's."""
        if shares_memory(node) or not any(self._writes(reader) for reader in node.users):
            return emitted
        high, low = (
            band if band.target is torch.cat else self.graph.call_function(torch.clone, (band,))
            for band in (emitted.high, emitted.low)
        )
        return replace(emitted, high=high, low=low)

    def _writes(self, reader: fx.Node) -> bool:
        """Whether a reader changes what it reads."""
        module = self.trace.module_of(reader)
        return writes_in_place(reader) or bool(reader.kwargs.get("inplace") or getattr(module, "inplace", False))

    def _operate(self, node: fx.Node, op: PlanOp) -> fx.Node:
        """A layer of an operator on dense maps, in the place of the source's."""
        operator, module = find_operator(op.form), self.flows.ops[node].module
        assert module is not None
        args, kwargs = self.rest(node.args), self.rest(node.kwargs)
        return self.module(lambda: operator.make(module, **op.options), *args, **kwargs)

    def _copy(self, node: fx.Node) -> fx.Node:
        if str(node.target) in self.trace.functions:
            call = self.trace.functions[str(node.target)]
            return call.emit(self.graph, self.rest(node.args[0]), node.name, self.dense)
        copied = self.graph.node_copy(node, self.dense)
        if node.op == "call_module":
            self.copied.append(copied)
        copied.meta = {key: value for key, value in node.meta.items() if key in ("stack_trace", "mode")}
        return copied

    # What the rules call.

    def value(self, node: fx.Node) -> Any:
        """What was emitted for a source node, split if the plan says so."""
        emitted = self.env[node]
        found = self.values[node]
        if isinstance(emitted, fx.Node) and isinstance(found, Map):
            layout = self.layout_of(node)
            return emitted if layout.is_dense else self.bands(node, found, layout)
        return emitted

    def layout_of(self, node: fx.Node) -> Layout:
        """The planned layout of a node's single map."""
        op = self.plan.get(node.name)
        return Layout.parse(op.gives[0]) if op and op.gives else Layout.dense(self.values[node].ids.size)

    def layout(self, found: Map) -> Layout:
        """The planned layout of a map that the operation at hand gives."""
        assert self.op is not None and self.node is not None
        given = self.values[self.node]
        index = 0 if isinstance(given, Map) else next(i for i, piece in enumerate(given) if piece is found)
        return Layout.parse(self.op.gives[index])

    def bands(self, node: fx.Node, like: Map, layout: Layout) -> Bands:
        """An input as bands, through a split if it is dense."""
        emitted = self.env[node]
        if isinstance(emitted, Bands):
            return emitted
        if (node, layout) not in self.split:
            self.split[node, layout] = self._split(emitted, like, layout)
        return self.split[node, layout]

    def _split(self, source: fx.Node, like: Map, layout: Layout) -> Bands:
        if len(like.channel) > 1:
            source = self.graph.call_method("flatten", (source, like.channel[0], like.channel[-1]))
        first, last = _axis_orders(like)
        if first:
            source = self.graph.call_method("permute", (source, *first))
        pair = self.pair(self._adapter("split", layout, len(like.spatial), source))
        if last:
            pair = tuple(self.graph.call_method("permute", (band, *last)) for band in pair)
        return Bands(pair[0], pair[1], layout, like)

    def dense(self, node: fx.Node) -> fx.Node:
        """An input as one tensor, through a merge if it is split."""
        emitted = self.env[node]
        if not isinstance(emitted, Bands):
            return emitted
        if node not in self.merged:
            self.merged[node] = self._merge(emitted)
        return self.merged[node]

    def _merge(self, source: Bands) -> fx.Node:
        first, last = _axis_orders(source.map)
        bands = [source.high, source.low]
        if first:
            bands = [self.graph.call_method("permute", (band, *first)) for band in bands]
        node = self._adapter("merge", source.layout, len(source.map.spatial), *bands)
        if last:
            node = self.graph.call_method("permute", (node, *last))
        if len(source.map.channel) > 1:
            node = self.graph.call_method("unflatten", (node, source.map.channel[0], source.map.ids.shape))
        return node

    def _adapter(self, kind: str, layout: Layout, spatial: int, *args: fx.Node) -> fx.Node:
        name = self.adapters.setdefault((kind, layout, spatial), f"octify_{kind}_{len(self.adapters)}")
        self.replaced.setdefault(name, (Split if kind == "split" else Merge)(layout, spatial))
        return self.graph.call_module(name, args)

    def function(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
        """Adds a call of a function."""
        return self.graph.call_function(function, args, kwargs)

    def method(self, name: str, *args: Any, **kwargs: Any) -> fx.Node:
        """Adds a call of a method."""
        return self.graph.call_method(name, args, kwargs)

    def module(self, make: Callable[[], nn.Module], *args: Any, part: str = "", **kwargs: Any) -> fx.Node:
        """Adds a call of the module that takes the source's place; functions get a place of their own."""
        assert self.node is not None
        home = str(self.node.target) if self.node.op == "call_module" else f"octify_{self.node.name}"
        target = f"{home}.{part}" if part else home
        if target not in self.replaced:
            self.replaced[target] = make()
        return self.graph.call_module(target, args, kwargs)

    def source_module(self) -> nn.Module:
        """A copy of the source's module."""
        assert self.node is not None
        return copy.deepcopy(get_module(self.trace.model, str(self.node.target)))

    def pair(self, node: fx.Node) -> tuple[fx.Node, fx.Node]:
        """The two results of a node."""
        first, second = (self.graph.call_function(operator.getitem, (node, index)) for index in (0, 1))
        return first, second

    def rest(self, argument: Any) -> Any:
        """An argument with emitted nodes in the places of source nodes."""
        return map_nodes(argument, self.dense)

    def options(self) -> dict[str, Any]:
        """What the plan says about how to emit."""
        assert self.op is not None
        return dict(self.op.options)

    # The module tree.

    def _root(self) -> nn.Module:
        """The source's containers with copies of what stays and the new modules in place."""
        model: nn.Module = self.trace.model
        homes = {path.removesuffix(".high").removesuffix(".low") for path in self.replaced}
        gone = {id(tensor) for path in homes if _has_module(model, path) for tensor in _own_tensors(model, path)}
        others = [module for path, module in named_modules(model) if not _within(path, homes)]
        kept = {id(tensor) for module in others for tensor in own_tensors(module)}
        # What belongs to replaced modules alone is not copied: it is dropped right below.
        root = structural_copy(model, lambda tensor: tensor if id(tensor) in gone - kept else clone_tensor(tensor))
        for path in homes - set(self.replaced):
            set_module(root, path, nn.Module().train(model.training))
        for path, module in self.replaced.items():
            set_module(root, path, module)
        drop_stand_ins(root, self.trace.functions, homes)
        return root


def _within(path: str, homes: set[str]) -> bool:
    """Whether a module is one of some modules or inside one."""
    parts = path.split(".")
    return any(".".join(parts[:depth]) in homes for depth in range(1, len(parts) + 1))


def _has_module(model: nn.Module, path: str) -> bool:
    try:
        get_module(model, path)
    except AttributeError:
        return False
    return True


def _own_tensors(model: nn.Module, path: str) -> list[Tensor]:
    module = get_module(model, path)
    return [*module.parameters(), *module.buffers()]


def clone_tensor(tensor: Tensor) -> Tensor:
    """A copy with memory of its own, a parameter if it was one."""
    cloned = tensor.detach().clone()
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(cloned, tensor.requires_grad)
    return cloned


def _axis_orders(like: Map) -> tuple[list[int], list[int]]:
    """Permutations of a map's axes (its channel axes taken as one) to channels first and back; empty if it is so."""
    extra = len(like.channel) - 1
    rank = len(like.shape) - extra
    channel = like.channel[0]
    spatial = [axis - extra if axis > channel else axis for axis in like.spatial]
    order = [0, channel, *(axis for axis in range(1, rank) if axis != channel and axis not in spatial), *spatial]
    if order == list(range(rank)):
        return [], []
    return order, [order.index(axis) for axis in range(rank)]
