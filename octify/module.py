"""The converted module: a GraphModule that keeps the source's module tree, attributes and both modes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from importlib import import_module
from operator import attrgetter
from types import FunctionType, MethodType
from typing import Any, Protocol, cast

import torch
from torch import fx, nn
from torch._ops import OpOverloadPacket

from octify.graph import map_leaves
from octify.modes import graph_of_mode
from octify.tracer import SymbolicTracer

_SKIP = {"_parameters", "_buffers", "_modules", "training", "forward", "_code", "_graph", "meta"}


class OctaveModule(fx.GraphModule):
    """A GraphModule over the source's own containers.

    A source that returns something else in train mode (auxiliary heads) has one graph a mode; `train()` and `eval()`
    change between them.
    """

    mode_graphs: dict[bool, fx.Graph] | None

    @classmethod
    def build(cls, root: nn.Module, graph: fx.Graph, *, two_modes: bool = False) -> OctaveModule:
        """Wraps a module tree and a graph over it."""
        graphs = {mode: graph_of_mode(graph, training=mode) for mode in (True, False)} if two_modes else None
        module = cls(root, graphs[root.training] if graphs else graph, class_name=type(root).__name__)
        module._adopt(root)
        object.__setattr__(module, "mode_graphs", graphs)
        return module

    def _adopt(self, root: nn.Module) -> None:
        """Takes over the whole tree: containers keep their classes, unused modules their places."""
        self._modules, self._parameters, self._buffers = root._modules, root._parameters, root._buffers
        self._non_persistent_buffers_set = root._non_persistent_buffers_set
        for name, value in vars(root).items():
            if name not in _SKIP and name not in self.__dict__:
                object.__setattr__(self, name, value)
        object.__setattr__(self, "training", root.training)

    def __getattr__(self, name: str) -> Any:
        """Of a part of a model also the source's methods, such as a head's loss, which the model calls."""
        function = getattr(self.__dict__.get("octify_class"), name, None)
        if isinstance(function, FunctionType) and name not in vars(nn.Module):
            return MethodType(function, self)
        return super().__getattr__(name)

    def train(self, mode: bool = True) -> OctaveModule:
        """Sets the mode, and the graph that belongs to it."""
        super().train(mode)
        self.use_graph_of_mode()
        return self

    def use_graph_of_mode(self) -> None:
        """Runs by the graph of the mode that it is in."""
        graphs = self.__dict__.get("mode_graphs")
        if graphs and self.graph is not graphs[self.training]:
            self.graph = graphs[self.training]

    def recompile(self) -> Any:
        """Makes the graph's code the forward; where that holds for some sizes only, behind a choice of the graph."""
        code = super().recompile()
        if "octify_branches" in self.__dict__:
            cls = cast(Any, type(self))
            cls.forward = _choosing(cls.forward)
        return code

    def run_on(self, module: OctaveModule, own: dict[str, nn.Module]) -> None:
        """Runs on another module's layers and its own few, in that module's mode."""
        for layer in own.values():
            layer.train(module.training)
        self._modules = {**module._modules, **own}
        self._parameters, self._buffers = module._parameters, module._buffers
        object.__setattr__(self, "training", module.training)
        self.use_graph_of_mode()

    def follow_branches(self, branches: FindsGraphs) -> None:
        """Lets inputs that take the source through other branches run by other graphs."""
        object.__setattr__(self, "octify_branches", branches)
        self.recompile()

    def __deepcopy__(self, memo: dict[int, Any]) -> OctaveModule:
        state = copy.deepcopy({name: value for name, value in vars(self).items() if name not in DERIVED}, memo)
        graph, graphs = self._graphs()
        return _restore(state, graph, graphs, type(self).__name__)

    def __reduce__(self) -> tuple[Any, ...]:
        state = {name: value for name, value in vars(self).items() if name not in DERIVED}
        return _restore, (state, *self._graphs(), type(self).__name__)

    def _graphs(self) -> tuple[list[Any], dict[bool, list[Any]] | None]:
        graphs = self.__dict__.get("mode_graphs")
        return graph_to_data(self.graph), graphs and {mode: graph_to_data(graph) for mode, graph in graphs.items()}


class FindsGraphs(Protocol):
    """What knows the graphs of a source whose control flow depends on its input's size."""

    def graph_for(self, module: OctaveModule, inputs: tuple[Any, ...]) -> OctaveModule | None:
        """The module whose forward takes inputs of this size; None is `module` itself."""
        ...


def _choosing(forward: Callable[..., Any]) -> Callable[..., Any]:
    """A forward that leaves inputs of other sizes to the graph that they take."""

    @wraps(forward)
    def chosen(self: OctaveModule, *args: Any, **kwargs: Any) -> Any:
        if kwargs or torch.compiler.is_compiling():  # a compiled or exported graph is the example's
            return forward(self, *args, **kwargs)
        other = cast(FindsGraphs, self.octify_branches).graph_for(self, args)
        return forward(self, *args) if other is None else other.forward(*args)

    return chosen


DERIVED = {"_graph", "_code", "mode_graphs", "_lineno_map", "_prologue_start"}


def _restore(
    state: dict[str, Any], graph: list[Any], graphs: dict[bool, list[Any]] | None, class_name: str
) -> OctaveModule:
    """The inverse of taking an OctaveModule apart into its state and graphs."""
    root = nn.Module()
    root.__dict__.update(state)
    modes = {mode: graph_from_data(data) for mode, data in graphs.items()} if graphs else None
    current: fx.Graph = modes[root.training] if modes else graph_from_data(graph)
    module = OctaveModule(root, current, class_name=class_name)
    module.__dict__.update(state)
    object.__setattr__(module, "mode_graphs", modes)
    if "octify_branches" in state:
        module.recompile()
    return module


@dataclass(frozen=True)
class _Ref:
    """A node inside an argument, by name."""

    name: str


@dataclass(frozen=True)
class _Known:
    """A function by its public name: `F.max_pool2d` and its kin are local to what made them, and do not pickle."""

    module: str
    name: str


def _storable(target: Any) -> Any:
    if isinstance(target, OpOverloadPacket):  # an operation of a library's own, such as torch.ops.torchvision.nms
        return _Known("torch", f"ops.{cast(Any, target)._qualified_op_name.replace('::', '.')}")
    if "<locals>" not in getattr(target, "__qualname__", ""):
        return target
    known = _Known(target.__module__, target.__name__)
    return known if getattr(import_module(known.module), known.name, None) is target else target


def graph_to_data(graph: fx.Graph) -> list[Any]:
    """A graph as plain tuples, which pickle; the functions in it go by name."""

    def plain(argument: Any) -> Any:
        return map_leaves(argument, lambda leaf: _Ref(leaf.name) if isinstance(leaf, fx.Node) else leaf)

    return [
        (node.name, node.op, _storable(node.target), _thaw(plain(node.args)), _thaw(plain(node.kwargs)))
        for node in graph.nodes
    ]


def graph_from_data(data: list[Any]) -> fx.Graph:
    """The inverse of `graph_to_data`."""
    graph = fx.Graph(tracer_cls=SymbolicTracer)
    nodes: dict[str, fx.Node] = {}

    def linked(argument: Any) -> Any:
        return map_leaves(argument, lambda leaf: nodes[leaf.name] if isinstance(leaf, _Ref) else leaf)

    for name, op, target, args, kwargs in data:
        target = attrgetter(target.name)(import_module(target.module)) if isinstance(target, _Known) else target
        nodes[name] = graph.create_node(op, target, linked(args), linked(kwargs), name)
    return graph


def _thaw(argument: Any) -> Any:
    """fx's immutable collections as plain ones."""
    if isinstance(argument, dict):
        return {key: _thaw(value) for key, value in cast("dict[Any, Any]", argument).items()}
    if isinstance(argument, list):
        return [_thaw(item) for item in cast("list[Any]", argument)]
    if type(argument) is tuple:
        return tuple(_thaw(item) for item in cast("tuple[Any, ...]", argument))
    return argument
