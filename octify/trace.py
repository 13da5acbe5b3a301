"""A model and an example input → what the model computes, with shapes, in train and eval mode."""

from __future__ import annotations

import inspect
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch.nn.parameter import is_lazy

from octify.errors import ModelError, TraceError
from octify.functional import FunctionCall, take_functions
from octify.graph import map_leaves, meta_copy, named_modules, own_tensors, record_values, sharing_copy, to_meta
from octify.modes import graph_of_mode, join_modes
from octify.ops import same_branch_
from octify.shaped import FixedTracer, FreeBatchTracer, GuardedTracer
from octify.tracer import SymbolicTracer


@dataclass
class Trace:
    """What a model computes: a graph over the source's modules with a meta value on every node.

    `how` is "symbolic" (any size), "guarded" (along the branches that the model takes at the example's size),
    "free batch" (the example's size, any batch) or "fixed" (the example's shape).
    `functions` are the calls of functions that stand in the graph as modules, which the source does not have.
    Where train and eval mode return different things, the graph's output node holds both, and `two_modes` is set.
    """

    model: nn.Module
    graph: fx.Graph
    inputs: tuple[Any, ...]
    how: str = "symbolic"
    two_modes: bool = False
    notes: list[str] = field(default_factory=list[str])
    functions: dict[str, FunctionCall] = field(default_factory=dict[str, FunctionCall])  # by the modules' paths

    @property
    def nodes(self) -> list[fx.Node]:
        """The nodes in the order of execution."""
        return list(self.graph.nodes)

    @property
    def eval_graph(self) -> fx.Graph:
        """What runs in eval mode: the graph, or a copy without what only training runs."""
        return graph_of_mode(self.graph, training=False) if self.two_modes else self.graph

    def module_of(self, node: fx.Node) -> nn.Module | None:
        """The module that a node calls, if it calls one."""
        return self.model.get_submodule(str(node.target)) if node.op == "call_module" else None


SIZED = ("symbolic", "guarded")  # the ways that leave sizes open
WAYS = (*SIZED, "free batch", "fixed")


def trace_model(model: nn.Module, example: tuple[Any, ...], ways: tuple[str, ...] = WAYS) -> Trace:
    """Traces a model without touching it: symbolically if possible, else with the example's sizes baked in.

    `example` holds the inputs (tensors on any device; only their shapes and types matter), `ways` which are tried.

    Raises:
        ModelError: the model holds modules that nothing can trace, or octave ones, or takes fewer inputs.
        TraceError: no way of tracing works; the message says what each one met.
    """
    _refuse_untraceable(model)
    _refuse_more(model, len(example))
    failures: list[str] = []
    tracers: dict[str, type[SymbolicTracer]] = dict(
        zip(WAYS, (SymbolicTracer, GuardedTracer, FreeBatchTracer, FixedTracer), strict=True)
    )
    for how in ways:
        try:
            return _trace_both_modes(model, example, how, tracers[how])
        except Exception as error:  # a model's forward may raise anything under a tracer
            failures.append(f"{how}: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")
    if any("octify_plan" in vars(module) or "octify_passes" in vars(module) for _, module in named_modules(model)):
        raise ModelError(f"{type(model).__name__} is converted already: pass the network that it was made from")
    reasons = "\n  ".join(failures)
    raise TraceError(f"{type(model).__name__} cannot be traced as a whole.\n  {reasons}")


def _refuse_untraceable(model: nn.Module) -> None:
    """Refuses what hides its operations, or has no weights yet."""
    for path, module in named_modules(model):
        name = f'"{path}" ({type(module).__name__})' if path else type(module).__name__
        if isinstance(module, torch.jit.ScriptModule):
            raise ModelError(f"{name} is TorchScript, which cannot be traced: pass the module that it was made from")
        if hasattr(module, "_orig_mod"):
            raise ModelError(f"{name} is compiled: pass the module that it was made from, and compile the result")
        if any(is_lazy(tensor) for tensor in own_tensors(module)):
            raise ModelError(f"{name} has no weights yet: run the model once, so that its lazy layers get them")


def _trace_both_modes(model: nn.Module, example: tuple[Any, ...], how: str, tracer: type[SymbolicTracer]) -> Trace:
    ghosts = cast("tuple[Any, ...]", map_leaves(example, to_meta))
    root = sharing_copy(model)
    with _kept_buffers(model) as changed:
        train, evaluate = (_trace_mode(model, root, ghosts, tracer, training) for training in (True, False))
    graph, two_modes = join_modes(train, evaluate, root)
    graph._tracer_cls = SymbolicTracer  # pyright: ignore[reportPrivateUsage] - pickling retraces with octify's leaves
    notes = {
        "symbolic": [],
        "guarded": [f"traced along the branches taken at {_shapes(example)}, once more for sizes that take others"]
        * any(node.target is same_branch_ for node in graph.nodes),
        "free batch": [f"traced with concrete sizes: the converted model runs at {_shapes(example)} only (any batch)"],
        "fixed": [f"traced with concrete shapes: the converted model runs at {_shapes(example)} with this batch only"],
    }
    record_values(meta_copy(root).eval(), graph, ghosts)
    functions = take_functions(graph, root)
    if changed:
        names = ", ".join(changed[:3]) + (f" and {len(changed) - 3} more" if len(changed) > 3 else "")
        notes[how].append(f"the forward writes to buffers by itself ({names}): in training the converted model may not")
    return Trace(root, graph, ghosts, how, two_modes, notes[how], functions)


@contextmanager
def _kept_buffers(model: nn.Module) -> Generator[list[str]]:
    """What a forward writes to the source's buffers while it is traced is undone; gives their names."""
    kept = [(name, buffer, _version(buffer), buffer.clone()) for name, buffer in model.named_buffers()]
    changed: list[str] = []
    try:
        yield changed
    finally:
        for name, buffer, version, before in kept:
            if _was_written(buffer, version, before):
                changed.append(name)
                with torch.inference_mode():  # where tensors of either kind may be written to
                    buffer.copy_(before)


def _was_written(buffer: Tensor, version: int | None, before: Tensor) -> bool:
    if version is not None:
        return buffer._version != version
    return not buffer.is_meta and not torch.equal(buffer, before)


def _version(tensor: Tensor) -> int | None:
    """How often a tensor was written to; those made in inference mode do not count."""
    return None if tensor.is_inference() else tensor._version


def _trace_mode(
    model: nn.Module, root: nn.Module, ghosts: tuple[Any, ...], tracer: type[SymbolicTracer], training: bool
) -> fx.Graph:
    """Traces a fresh shell (some modules cache what they see) and moves constants made in `forward` to `root`."""
    shell = sharing_copy(model).train(training)
    skeleton = meta_copy(shell).eval() if issubclass(tracer, FixedTracer) else None
    graph = tracer(skeleton, ghosts).trace(shell, _defaults(model, len(ghosts)))
    _drop_unused_inputs(graph)
    _keep_assigned(graph, shell)
    for node in graph.nodes:
        if node.op != "get_attr" or hasattr(model, str(node.target).split(".", maxsplit=1)[0]):
            continue
        constant = getattr(shell, str(node.target))
        known = getattr(root, str(node.target), None)
        if isinstance(known, Tensor) and not _same_constant(known, constant):
            node.target = f"{node.target}_eval"
        setattr(root, str(node.target), constant)
    return graph


def _keep_assigned(graph: fx.Graph, shell: nn.Module) -> None:
    """A buffer that the forward gave another value (`self.mean = 0.9 * self.mean + …`) is written to at the end."""
    output = next(node for node in reversed(graph.nodes) if node.op == "output")
    for path, module in named_modules(shell):
        for name, given in list(module._buffers.items()):  # pyright: ignore[reportPrivateUsage]
            if isinstance(given, fx.Proxy) and given.node.graph is graph:
                with graph.inserting_before(output):
                    held = graph.get_attr(f"{path}.{name}".lstrip("."))
                    graph.call_method("copy_", (held, given.node))


def _same_constant(first: Tensor, second: Tensor) -> bool:
    """Whether train and eval mode make the same constant; on meta there are no values to compare."""
    if first.is_meta or second.is_meta:
        return first.shape == second.shape and first.dtype == second.dtype
    return torch.equal(first, second)


def _shapes(example: tuple[Any, ...]) -> str:
    return ", ".join("x".join(map(str, value.shape)) for value in example if isinstance(value, Tensor))


def required_inputs(model: nn.Module) -> int:
    """How many arguments a model's forward cannot do without."""
    parameters = inspect.signature(model.forward).parameters.values()
    return sum(p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) and p.default is p.empty for p in parameters)


def _refuse_more(model: nn.Module, given: int) -> None:
    """Refuses more example inputs than a model's forward takes: a graph would leave them out without a word."""
    kinds = [parameter.kind for parameter in inspect.signature(model.forward).parameters.values()]
    taken = sum(kind in (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD) for kind in kinds)
    if given > taken and inspect.Parameter.VAR_POSITIONAL not in kinds:
        raise ModelError(f"{type(model).__name__} takes {taken} input(s): example_inputs holds {given}")


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
