"""Models that do not trace as a whole (detectors): their largest traceable submodules are converted, borders dense."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd  # pyright: ignore[reportPrivateUsage]
from torch.utils import _pytree as pytree

from octify.check import check_graph
from octify.errors import ModelError, TraceError
from octify.flows import Flows, asks_for_change
from octify.graph import map_leaves, named_modules, random_like, set_module, sharing_copy, structural_copy
from octify.plan import Plan, make_plan
from octify.recipe import Recipe
from octify.rewrite import clone_tensor, rewrite_graph
from octify.trace import trace_model
from octify.tracer import holds_convolution

Parts = Sequence[tuple[str, Flows]]


def find_parts(model: nn.Module, example: tuple[Any, ...], recipe: Recipe, failure: TraceError) -> Parts:
    """The largest submodules with convolutions that trace symbolically, with what flows in each.

    The model runs once, in eval mode on random numbers, to see what its submodules are given.

    Raises:
        ModelError: the model does not run on the example.
        TraceError: no submodule traces.
    """
    if any(tensor.is_meta for tensor in model.parameters()):
        raise TraceError(f"{failure}\n  parts: the model is on the meta device, and finding its parts takes a run")
    calls = first_calls(sharing_copy(model).eval(), example)
    found = list(_walk(model, "", calls, recipe))
    parts = [(path, flows.again(recipe)) for path, flows in found if make_plan(flows).converted]
    if not parts and not any(asks_for_change(said) for _, flows in found for said in flows.settings.values()):
        parts = found  # nothing is asked for: every part as it is
    if not parts:
        raise TraceError(f"{failure}\n  parts: no submodule with convolutions can be traced either")
    return parts


def plan_parts(model: nn.Module, parts: Parts) -> Plan:
    """One plan over all parts; operations are named `part:node`, targets by their full path."""
    notes = ["converted part by part, the borders stay dense: " + ", ".join(path for path, _ in parts)]
    ops = tuple(
        replace(op, name=f"{path}:{op.name}", target=_full_path(op.type, path, op.target))
        for path, flows in parts
        for op in make_plan(flows).ops
    )
    return Plan(type(model).__name__, "parts", ops, tuple(notes))


def part_of(plan: Plan, path: str) -> Plan:
    """The plan of one part, as `make_plan` gives it."""
    ops = tuple(
        replace(op, name=op.name.removeprefix(f"{path}:"), target=op.target.removeprefix(f"{path}."))
        for op in plan.ops
        if op.name.startswith(f"{path}:")
    )
    return Plan(plan.model, "symbolic", ops)


def rewrite_parts(model: nn.Module, parts: Parts, plan: Plan) -> nn.Module:
    """A copy of the model with its parts converted."""
    inside = {id(tensor) for path, _ in parts for tensor in _tensors(model.get_submodule(path))}
    root = structural_copy(model, lambda tensor: tensor if id(tensor) in inside else clone_tensor(tensor))
    for path, flows in parts:
        decided = part_of(plan, path)
        converted = rewrite_graph(flows, decided)
        check_graph(converted, flows, decided)
        object.__setattr__(converted, "octify_class", type(model.get_submodule(path)))
        set_module(root, path, converted)
    return root


def _full_path(kind: str, path: str, target: str) -> str:
    return target if kind in ("function", "method") else f"{path}.{target}"


def _tensors(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]


def convolutions(model: nn.Module) -> list[str]:
    """The paths of all convolutions."""
    return [path for path, module in named_modules(model) if isinstance(module, _ConvNd)]


def within(path: str, homes: Sequence[str]) -> bool:
    """Whether a module is one of some modules or inside one."""
    return any(path == home or path.startswith(f"{home}.") for home in homes)


@dataclass(frozen=True)
class Call:
    """What a submodule is given (tensors on meta, lists of them) and whether a convolution ran before it."""

    example: tuple[Any, ...]
    late: bool


def _walk(module: nn.Module, path: str, calls: dict[str, Call], recipe: Recipe) -> Iterator[tuple[str, Flows]]:
    for name, child in module.named_children():
        where = f"{path}.{name}" if path else name
        if not holds_convolution(child):
            continue
        flows = _flows(child, calls[where], recipe, where) if where in calls else None
        if flows is None:
            yield from _walk(child, where, calls, recipe)
        else:
            yield where, flows


def _flows(module: nn.Module, call: Call, recipe: Recipe, path: str) -> Flows | None:
    try:
        trace = trace_model(module, call.example, ways=("symbolic",))
    except TraceError:
        return None
    return Flows(trace, recipe, prefix=f"{path}.", image=not call.late)


def first_calls(model: nn.Module, example: tuple[Any, ...]) -> dict[str, Call]:
    """What every submodule is given first, by its path, if that is tensors and lists of tensors alone, every time.

    The model runs once, on random numbers in the example's shapes.
    """
    found: dict[str, Call] = {}
    shapes: dict[str, Any] = {}  # how many arguments, how long lists: None where two calls differ
    late = False

    def hook(path: str) -> Any:
        def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            nonlocal late
            known = args and not kwargs and all(_is_tensors(value) for value in args)
            shape = pytree.tree_structure(args) if known else None
            if shape is None or shapes.setdefault(path, shape) != shape:
                shapes[path] = None
                found.pop(path, None)
            elif path not in found:
                found[path] = Call(map_leaves(args, lambda value: value.detach().to("meta")), late)
            late = late or isinstance(module, _ConvNd)

        return record

    device = next((tensor.device for tensor in model.parameters()), torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    real = [random_like(value, generator).to(device) for value in example]
    with torch.no_grad(), ExitStack() as stack:
        for path, module in named_modules(model):
            stack.callback(module.register_forward_pre_hook(hook(path), with_kwargs=True).remove)
        run_on(model, real)
    return found


def _is_tensors(value: object) -> bool:
    if isinstance(value, (list, tuple)):
        return all(isinstance(item, Tensor) for item in cast("list[object]", value))
    return isinstance(value, Tensor)


def run_on(model: nn.Module, example: Sequence[Tensor]) -> None:
    """Runs the model on the tensors, or on the first one's images as a list (detectors).

    Raises:
        ModelError: it does not run on either.
    """
    reasons: list[str] = []
    for arguments in (tuple(example), (list(example[0]),)):
        try:
            model(*arguments)
        except Exception as error:  # a model's forward may raise anything
            reasons.append(f"{type(error).__name__}: {str(error).partition(chr(10))[0]}")
        else:
            return
    shapes = ", ".join("x".join(map(str, value.shape)) for value in example)
    raise ModelError(f"{type(model).__name__} does not run on an input of {shapes}: {reasons[0]}")
