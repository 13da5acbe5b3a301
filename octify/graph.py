"""The only wrapper round torch.fx: copies that share tensors, meta values on nodes, and arguments by position."""

from __future__ import annotations

import copy
import gc
import operator
from collections import OrderedDict
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from typing import Any, cast
from unittest.mock import patch

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_aggregate, map_arg
from torch.utils import _pytree as pytree

_map_aggregate = cast(Callable[[Any, Callable[[Any], Any]], Any], map_aggregate)
_map_arg = cast(Callable[[Any, Callable[[fx.Node], Any]], Any], map_arg)


def tensors_of(model: nn.Module) -> Iterator[Tensor]:
    """Every tensor that a module tree holds: parameters, buffers and plain attributes."""
    for module in model.modules():
        yield from own_tensors(module)
        yield from (value for value in vars(module).values() if isinstance(value, Tensor))


def named_modules(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """All modules with their paths, the root's empty."""
    walk = cast(Callable[[], Iterator[tuple[str, nn.Module]]], model.named_modules)
    return list(walk())


def own_tensors(module: nn.Module) -> Iterator[Tensor]:
    """A module's own parameters and buffers, its children's left out."""
    yield from module.parameters(recurse=False)
    yield from module.buffers(recurse=False)


def has_hooks(module: nn.Module) -> bool:
    """Whether something runs around a module's forward: pruning, weight norm of the older kind, a user's own."""
    held = cast(Any, module)
    return bool(held._forward_hooks or held._forward_pre_hooks)


def structural_copy(model: nn.Module, replace: Callable[[Tensor], Tensor]) -> nn.Module:
    """Copies the module objects and puts `replace(tensor)` in each tensor's place; costs no tensor memory by itself.

    As `copy.deepcopy`, but much faster: a module's tensors, children and plain values are put over directly.
    """
    memo: dict[int, Any] = {}
    for tensor in tensors_of(model):
        if id(tensor) not in memo:
            memo[id(tensor)] = replace(tensor)
    modules = list(model.modules())
    special = {id(inner) for module in modules if hasattr(type(module), "__deepcopy__") for inner in _copied_by(module)}
    plain = [module for module in modules if id(module) not in special]
    for module in plain:
        memo[id(module)] = type(module).__new__(type(module))
    for module in reversed(plain):  # a graph's module looks for what is inside of it
        copied = {name: _copy_value(value, memo) for name, value in vars(module).items()}
        memo[id(module)].__dict__.update(copied)
    return copy.deepcopy(model, memo)


def _copied_by(module: nn.Module) -> Iterator[nn.Module]:
    """What a module with a `__deepcopy__` of its own makes by it: a graph's module nothing but itself."""
    return iter((module,)) if isinstance(module, fx.GraphModule) else module.modules()


_SIMPLE = frozenset({type(None), bool, int, float, str, bytes, torch.dtype, torch.device, torch.Size})
_EMPTY: dict[type, Callable[[], Any]] = {OrderedDict: OrderedDict[Any, Any], set: set[Any]}  # a dozen a module: hooks


def _copy_value(value: Any, memo: dict[int, Any]) -> Any:
    kind = type(cast(object, value))
    if kind in _SIMPLE:
        return value
    if kind in _EMPTY and not value:
        return _EMPTY[kind]()
    if kind is dict:
        entries = cast("dict[Any, Any]", value).items()
        return {key: memo[id(item)] if id(item) in memo else _copy_value(item, memo) for key, item in entries}
    if kind is tuple and all(type(item) in _SIMPLE for item in cast("tuple[Any, ...]", value)):
        return value
    return copy.deepcopy(value, memo)


def sharing_copy(model: nn.Module) -> nn.Module:
    """New module objects over the same tensors, so that modes and caches can change without touching the source."""
    return structural_copy(model, lambda tensor: tensor)


def meta_copy(model: nn.Module) -> nn.Module:
    """The same modules with tensors on the meta device: shapes and no memory. Constants of one number keep it."""

    def ghost_of(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, nn.Parameter) and not tensor.dim():
            return to_meta(tensor.detach().clone())
        ghost = torch.empty_like(tensor, device="meta")
        return nn.Parameter(ghost, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else ghost

    return structural_copy(model, ghost_of)


def slice_channels(module: nn.Module, index: tuple[int, ...], channels: int, attributes: tuple[str, ...]) -> nn.Module:
    """A copy of a per-channel module for some of its channels."""

    def cut(tensor: Tensor) -> Tensor:
        axis = next((axis for axis, size in enumerate(tensor.shape) if size == channels), None)
        with torch.no_grad():
            if axis is None:
                part = tensor.detach().clone()
            else:
                part = tensor.detach().index_select(axis, torch.tensor(index, device=tensor.device))
        return nn.Parameter(part, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else part

    copied = structural_copy(module, cut)
    for name in attributes:
        setattr(copied, name, len(index))
    return copied


@contextmanager
def paused_collection() -> Generator[None]:
    """Without Python's cyclic garbage collection: graphs are many small objects, and it would walk them over and over.

    (Measured: it takes two thirds of the time to trace a ResNet-152.)
    """
    running = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if running:
            gc.enable()


def get_module(root: nn.Module, path: str) -> nn.Module:
    """The submodule at a dotted path."""
    return root.get_submodule(path)


def set_module(root: nn.Module, path: str, module: nn.Module) -> None:
    """Puts a module at a dotted path, replacing what is there and making plain containers on the way."""
    *parents, name = path.split(".")
    owner = root
    for parent in parents:
        child = getattr(owner, parent, None)
        if not isinstance(child, nn.Module):
            child = nn.Module()
            owner.add_module(parent, child)
        owner = child
    if name in owner._modules:  # pyright: ignore[reportPrivateUsage] - keeps the child's place in the order
        setattr(owner, name, module)
    else:
        owner.add_module(name, module)


def get_attribute(root: nn.Module, path: str) -> Any:
    """The attribute (a parameter, buffer or constant) at a dotted path."""
    value: Any = root
    for part in path.split("."):
        value = getattr(value, part)
    return value


class _MetaRecorder(fx.Interpreter):
    """Runs a graph on meta tensors and keeps every node's value in `node.meta["value"]`."""

    def run_node(self, n: fx.Node) -> Any:
        value = to_meta(super().run_node(n))  # what the model makes itself is on the CPU
        n.meta["value"] = value
        return value


def to_meta(value: Any) -> Any:
    """A tensor on the meta device; single numbers, which sizes may be made of, and anything else as it is."""
    return value.to("meta") if isinstance(value, Tensor) and (value.dim() or value.device.type != "cpu") else value


def random_like(value: Tensor, dice: torch.Generator) -> Tensor:
    """Noise of a tensor's shape and type, on the CPU: normal numbers, or zeros and ones where they are whole."""
    if value.is_floating_point() or value.is_complex():
        return torch.randn(value.shape, generator=dice).to(value.dtype)
    return torch.randint(0, 2, value.shape, generator=dice).to(value.dtype)


def _shape_of_batch_norm(x: Tensor, *_: Any, **__: Any) -> Tensor:
    """On meta, PyTorch runs batch norm through a decomposition in Python, which takes most of the time."""
    return torch.empty_like(x)


def record_values(root: nn.Module, graph: fx.Graph, inputs: tuple[Any, ...]) -> None:
    """Fills `node.meta["value"]` of every node by running the graph over `root` (on meta) once."""
    with torch.no_grad(), patch.object(torch, "batch_norm", _shape_of_batch_norm):
        _MetaRecorder(root, garbage_collect_values=False, graph=graph).run(*inputs)


def value_of(node: fx.Node) -> Any:
    """What a node computes at the example's size: meta tensors, numbers, tuples of them."""
    return node.meta.get("value")


def shape_of(value: object) -> tuple[int, ...] | None:
    """The shape of a tensor, None of anything else."""
    return tuple(int(size) for size in value.shape) if isinstance(value, Tensor) else None


def map_nodes(argument: object, change: Callable[[fx.Node], Any]) -> Any:
    """An argument tree with `change(node)` in each node's place; fx's own collections."""
    return _map_arg(argument, change)


def map_leaves(argument: object, change: Callable[[Any], Any]) -> Any:
    """An argument tree with `change(leaf)` in the place of everything that is no collection."""
    return _map_aggregate(argument, change)


def nodes_in(argument: object) -> list[fx.Node]:
    """All nodes of an argument tree, repeats kept (`all_input_nodes` drops them)."""
    found: list[fx.Node] = []

    def see(node: fx.Node) -> fx.Node:
        found.append(node)
        return node

    map_nodes(argument, see)
    return found


def input_nodes(node: fx.Node) -> list[fx.Node]:
    """The nodes that a node reads, by position, repeats kept."""
    return nodes_in((node.args, node.kwargs))


def writes_in_place(node: fx.Node) -> bool:
    """Whether a node changes what it reads, or the state of torch, and so counts without readers."""
    name = str(node.target) if node.op == "call_method" else getattr(node.target, "__name__", "")
    in_place = name.endswith("_") and not name.endswith("__")
    return node.op in ("call_method", "call_function") and (in_place or node.target is operator.setitem)


def shares_memory(node: fx.Node) -> bool:
    """Whether what a node gives lies in memory of what it reads, at the example's size; values must be recorded."""
    given, *read = (_storages(value_of(found)) for found in (node, *node.all_input_nodes))
    return any(given & storages for storages in read)


def _storages(value: object) -> set[int]:
    """What tells the memory of tensors apart, on meta, too."""
    leaves: list[Any] = pytree.tree_leaves(value)
    return {cast(Any, leaf).untyped_storage()._cdata for leaf in leaves if isinstance(leaf, Tensor)}


def chain_of_views(node: fx.Node) -> list[fx.Node]:
    """What a node writes to, if it writes in place, and what that may be a view of."""
    found: list[fx.Node] = []
    source = node.args[0] if node.args else None
    while isinstance(source, fx.Node):
        found.append(source)
        source = source.args[0] if source.op in ("call_method", "call_function") and source.args else None
    return found
