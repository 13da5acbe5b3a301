"""A model and an example input → what the model computes, with shapes, in train and eval mode."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, cast
from unittest.mock import patch

import torch
from timm.layers._fx import get_notrace_functions, get_notrace_modules
from torch import Tensor, fx, nn
from torch.nn.modules.conv import _ConvNd  # pyright: ignore[reportPrivateUsage]

from octify.errors import TraceError
from octify.graph import get_attribute, map_leaves, map_nodes, meta_copy, record_values, sharing_copy
from octify.modes import join_modes
from octify.ops import same_branch_
from octify.rules.base import rule_of_type


@dataclass
class Trace:
    """What a model computes: a graph over the source's modules with a meta value on every node.

    `how` is "symbolic" (any size), "guarded" (any size at which the model takes the same branches as at the example's),
    "free batch" (the example's size, any batch) or "fixed" (the example's shape).
    Where train and eval mode return different things, the graph's output node holds both, and `two_modes` is set.
    """

    model: nn.Module
    graph: fx.Graph
    inputs: tuple[Any, ...]
    how: str = "symbolic"
    two_modes: bool = False
    notes: list[str] = field(default_factory=list[str])

    @property
    def nodes(self) -> list[fx.Node]:
        """The nodes in the order of execution."""
        return list(self.graph.nodes)

    def module_of(self, node: fx.Node) -> nn.Module | None:
        """The module that a node calls, if it calls one."""
        return self.model.get_submodule(str(node.target)) if node.op == "call_module" else None


SIZED = ("symbolic", "guarded")  # the ways that leave sizes open
WAYS = (*SIZED, "free batch", "fixed")


def trace_model(model: nn.Module, example: tuple[Any, ...], ways: tuple[str, ...] = WAYS) -> Trace:
    """Traces a model without touching it: symbolically if possible, else with the example's sizes baked in.

    `example` holds the inputs (tensors on any device; only their shapes and types matter), `ways` which are tried.

    Raises:
        TraceError: no way of tracing works; the message says what each one met.
    """
    failures: list[str] = []
    tracers: dict[str, type[SymbolicTracer]] = dict(
        zip(WAYS, (SymbolicTracer, GuardedTracer, FreeBatchTracer, FixedTracer), strict=True)
    )
    for how in ways:
        try:
            return _trace_both_modes(model, example, how, tracers[how])
        except Exception as error:  # a model's forward may raise anything under a tracer
            failures.append(f"{how}: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")
    reasons = "\n  ".join(failures)
    raise TraceError(f"{type(model).__name__} cannot be traced as a whole.\n  {reasons}")


def _trace_both_modes(model: nn.Module, example: tuple[Any, ...], how: str, tracer: type[SymbolicTracer]) -> Trace:
    ghosts = cast("tuple[Any, ...]", map_leaves(example, _meta))
    root = sharing_copy(model)
    train, evaluate = (_trace_mode(model, root, ghosts, tracer, training) for training in (True, False))
    graph, two_modes = join_modes(train, evaluate, root)
    graph._tracer_cls = SymbolicTracer  # pyright: ignore[reportPrivateUsage] - pickling retraces with octify's leaves
    notes = {
        "symbolic": [],
        "guarded": [f"traced along the branches that the model takes at {_shapes(example)}: others raise an error"],
        "free batch": [f"traced with concrete sizes: the converted model runs at {_shapes(example)} only (any batch)"],
        "fixed": [f"traced with concrete shapes: the converted model runs at {_shapes(example)} with this batch only"],
    }
    record_values(meta_copy(root).eval(), graph, ghosts)
    return Trace(root, graph, ghosts, how, two_modes, notes[how])


def _trace_mode(
    model: nn.Module, root: nn.Module, ghosts: tuple[Any, ...], tracer: type[SymbolicTracer], training: bool
) -> fx.Graph:
    """Traces a fresh shell (some modules cache what they see) and moves constants made in `forward` to `root`."""
    shell = sharing_copy(model).train(training)
    skeleton = meta_copy(shell).eval() if issubclass(tracer, FixedTracer) else None
    graph = tracer(skeleton, ghosts).trace(shell, _defaults(model, len(ghosts)))
    _drop_unused_inputs(graph)
    for node in graph.nodes:
        if node.op != "get_attr" or hasattr(model, str(node.target).split(".", maxsplit=1)[0]):
            continue
        constant = getattr(shell, str(node.target))
        known = getattr(root, str(node.target), None)
        if isinstance(known, Tensor) and not _same_constant(known, constant):
            node.target = f"{node.target}_eval"
        setattr(root, str(node.target), constant)
    return graph


def _same_constant(first: Tensor, second: Tensor) -> bool:
    """Whether train and eval mode make the same constant; on meta there are no values to compare."""
    if first.is_meta or second.is_meta:
        return first.shape == second.shape and first.dtype == second.dtype
    return torch.equal(first, second)


def _shapes(example: tuple[Any, ...]) -> str:
    return ", ".join("x".join(map(str, value.shape)) for value in example if isinstance(value, Tensor))


def _defaults(model: nn.Module, given: int) -> dict[str, Any] | None:
    parameters = list(inspect.signature(model.forward).parameters.values())
    named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    defaults = {p.name: p.default for p in named[given:] if p.default is not p.empty}
    return defaults or None


def _drop_unused_inputs(graph: fx.Graph) -> None:
    """Removes the placeholders of arguments left at their defaults, and what fx asserts about them."""
    for node in list(graph.nodes):
        if node.op == "call_function" and node.target is torch._assert and not node.users:  # pyright: ignore
            condition = node.args[0]
            graph.erase_node(node)
            if isinstance(condition, fx.Node) and not condition.users:
                graph.erase_node(condition)
    for node in list(graph.nodes):
        if node.op == "placeholder" and not node.users and node.args:
            graph.erase_node(node)


def holds_convolution(module: nn.Module) -> bool:
    """Whether there is a convolution anywhere inside a module, the module itself not counted."""
    return any(isinstance(child, _ConvNd) for child in module.modules() if child is not module)


class SymbolicTracer(fx.Tracer):
    """torch.fx's tracer with octify's leaves: modules with a rule, PyTorch's own, and timm's without convolutions."""

    def __init__(self, skeleton: nn.Module | None = None, example: tuple[Any, ...] = ()) -> None:
        functions = cast(Iterable[Callable[..., Any]], get_notrace_functions())
        super().__init__(autowrap_functions=tuple(functions), param_shapes_constant=True)
        self.skeleton = skeleton
        self.example = example

    def iter(self, obj: fx.Proxy) -> Any:
        """A list that the model is given is as long as the example's."""
        places = [node for node in self.graph.nodes if node.op == "placeholder"]
        given = self.example[places.index(obj.node)] if obj.node in places[: len(self.example)] else None
        if isinstance(given, (list, tuple)):
            items: Any = obj
            return iter([items[index] for index in range(len(cast("list[Any]", given)))])
        return cast(Any, super()).iter(obj)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """A leaf is kept as one call."""
        if rule_of_type(type(m)) is not None:
            return True
        if type(m) in get_notrace_modules():
            return not holds_convolution(m)
        return super().is_leaf_module(m, module_qualified_name) and not holds_convolution(m)


class ShapedProxy(fx.Proxy):
    """A proxy that carries a meta value, so that sizes are real numbers."""

    @property
    def value(self) -> Any:
        """The meta value."""
        return self.node.meta["value"]

    @property
    def shape(self) -> Any:
        """The real shape; with a free batch its first entry is a proxy."""
        return cast(FixedTracer, self.tracer).shape_of(self)

    @property
    def ndim(self) -> int:
        """The number of axes."""
        return self.value.ndim

    @property
    def dtype(self) -> torch.dtype:
        """The type of the elements."""
        return self.value.dtype

    @property
    def device(self) -> torch.device:
        """Where the model is (its values are on meta, constants that it makes are not)."""
        root = cast(FixedTracer, self.tracer).root
        return next((tensor.device for tensor in root.parameters()), torch.device("cpu"))

    def dim(self) -> int:
        """The number of axes."""
        return self.value.ndim

    def size(self, dim: int | None = None) -> Any:
        """The real size of one axis or of all."""
        return self.shape if dim is None else self.shape[dim]

    def numel(self) -> int:
        """The number of elements."""
        return self.value.numel()

    def is_floating_point(self) -> bool:
        """Whether the elements are floating-point numbers."""
        return self.value.is_floating_point()

    def __len__(self) -> int:
        return len(self.value)

    def __iter__(self) -> Any:
        return iter([cast(Any, self)[index] for index in range(len(self.value))])

    def __bool__(self) -> bool:
        if isinstance(self.value, Tensor):
            raise TraceError("the model's control flow depends on a tensor's values")
        cast(FixedTracer, self.tracer).guard(self)
        return bool(self.value)

    def __ceil__(self) -> Any:
        return self.tracer.create_proxy("call_function", math.ceil, (self,), {})

    def __floor__(self) -> Any:
        return self.tracer.create_proxy("call_function", math.floor, (self,), {})


class FixedTracer(SymbolicTracer):
    """The second choice: proxies carry meta tensors, so shapes are numbers and the example's size is baked in."""

    free_batch = False

    def shape_of(self, proxy: ShapedProxy) -> Any:
        """The shape that the model sees."""
        return tuple(proxy.value.shape)

    def guard(self, proxy: ShapedProxy) -> None:
        """Called when a branch is taken by a number computed from sizes."""

    def proxy(self, node: fx.Node) -> ShapedProxy:
        """Wraps a node."""
        return ShapedProxy(node, self)

    def create_proxy(self, kind: str, target: Any, args: Any, kwargs: Any, *rest: Any, **more: Any) -> Any:
        """Adds a node and computes its meta value; what is no tensor is given back as it is."""
        proxy = super().create_proxy(kind, target, args, kwargs, *rest, **more)
        value = self._value(kind, target, proxy.node)
        proxy.node.meta["value"] = value
        if self._of_batch(proxy.node) and not _holds_tensor(value):
            proxy.node.meta["batch"] = True
            return proxy
        if kind in ("placeholder", "output", "get_attr") or _holds_tensor(value):
            return proxy
        self.graph.erase_node(proxy.node)
        return value

    def _of_batch(self, node: fx.Node) -> bool:
        """Whether a number is computed from the symbolic batch."""
        return self.free_batch and any("batch" in source.meta for source in node.all_input_nodes)

    def _known(self, node: fx.Node) -> Any:
        """A node's meta value; fx makes nodes of its own for buffers that stand as arguments."""
        if "value" not in node.meta:
            node.meta["value"] = self._value(node.op, node.target, node)
        return node.meta["value"]

    def _value(self, kind: str, target: Any, node: fx.Node) -> Any:
        if kind == "placeholder":
            index = sum(other.op == "placeholder" for other in self.graph.nodes) - 1
            return self.example[index] if index < len(self.example) else next(iter(node.args), None)
        if kind == "output":
            return None
        if kind == "get_attr":
            with _untraced():
                return _meta(get_attribute(self.root, target))
        args = map_nodes(node.args, self._known)
        kwargs = map_nodes(node.kwargs, self._known)
        with torch.no_grad(), _untraced():
            if kind == "call_module":
                return cast(nn.Module, self.skeleton).get_submodule(target)(*args, **kwargs)  # pyright: ignore
            if kind == "call_method":
                return getattr(args[0], target)(*args[1:], **kwargs)  # pyright: ignore
            return target(*args, **kwargs)


class FreeBatchTracer(FixedTracer):
    """As FixedTracer, but the batch stays a symbol."""

    free_batch = True

    def shape_of(self, proxy: ShapedProxy) -> Any:
        """The shape with a proxy for the batch."""
        with suppress(KeyError):
            return (proxy.node.meta["batch_proxy"], *proxy.value.shape[1:])
        node = self.create_node("call_method", "size", (proxy.node, 0), {})
        node.meta.update(value=proxy.value.shape[0], batch=True)
        batch = self.proxy(node)
        proxy.node.meta["batch_proxy"] = batch
        return (batch, *proxy.value.shape[1:])


class GuardedTracer(FreeBatchTracer):
    """Sizes stay symbols, and the branches that the model takes by them are asserted in the graph."""

    def shape_of(self, proxy: ShapedProxy) -> Any:
        """The shape as proxies of numbers."""
        if "sizes" not in proxy.node.meta:
            proxy.node.meta["sizes"] = tuple(self._size(proxy, axis) for axis in range(proxy.value.dim()))
        return proxy.node.meta["sizes"]

    def _size(self, proxy: ShapedProxy, axis: int) -> ShapedProxy:
        node = self.create_node("call_method", "size", (proxy.node, axis), {})
        node.meta.update(value=proxy.value.shape[axis], batch=True)
        return self.proxy(node)

    def guard(self, proxy: ShapedProxy) -> None:
        """Adds a node that raises where the branch would not be the example's."""
        self.create_node("call_function", same_branch_, (proxy.node, bool(proxy.value)), {})


def _holds_tensor(value: object) -> bool:
    if isinstance(value, (tuple, list)):
        return any(_holds_tensor(item) for item in cast(Iterable[object], value))
    return isinstance(value, Tensor)


def _meta(value: Any) -> Any:
    return value.to("meta") if isinstance(value, Tensor) else value


def _untraced() -> Any:
    """Undoes the tracer's patches of nn.Module while a meta value is computed."""
    return patch.multiple(nn.Module, __call__=_plain_call, __getattr__=_plain_getattr)


_plain_call, _plain_getattr = nn.Module.__call__, nn.Module.__getattr__
