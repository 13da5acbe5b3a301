"""The only wrapper round torch.fx: copies that share tensors, meta values on nodes, and arguments by position."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_aggregate, map_arg

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


def structural_copy(model: nn.Module, replace: Callable[[Tensor], Tensor]) -> nn.Module:
    """Copies the module objects and puts `replace(tensor)` in each tensor's place; costs no tensor memory by itself."""
    memo: dict[int, Any] = {id(tensor): replace(tensor) for tensor in tensors_of(model)}
    return copy.deepcopy(model, memo)


def sharing_copy(model: nn.Module) -> nn.Module:
    """New module objects over the same tensors, so that modes and caches can change without touching the source."""
    return structural_copy(model, lambda tensor: tensor)


def meta_copy(model: nn.Module) -> nn.Module:
    """The same modules with tensors on the meta device: shapes and no memory."""

    def to_meta(tensor: Tensor) -> Tensor:
        ghost = torch.empty_like(tensor, device="meta")
        return nn.Parameter(ghost, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else ghost

    return structural_copy(model, to_meta)


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
        value = super().run_node(n)
        n.meta["value"] = value
        return value


def record_values(root: nn.Module, graph: fx.Graph, inputs: tuple[Any, ...]) -> None:
    """Fills `node.meta["value"]` of every node by running the graph over `root` (on meta) once."""
    with torch.no_grad():
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
