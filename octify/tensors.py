"""Every tensor of a module tree by name, in a form that a file can hold, and back into place."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, cast

import torch
from torch import Tensor, fx, nn

from octify.errors import CheckpointError
from octify.graph import map_leaves

_swap = cast("Callable[[Tensor, Tensor], None]", cast(Any, torch.utils).swap_tensors)
Strides = dict[str, tuple[int, ...]]
CONSTANT = "octify.constant."  # before the names of tensors that no state dict has


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The state dict, and behind it what computes but is in none: non-persistent buffers and plain attributes.

    Raises:
        CheckpointError: a module keeps something else than dense tensors in its state.
    """
    state: dict[str, Any] = model.state_dict()
    found = {f"{'' if path in state else CONSTANT}{path}": tensor.detach() for path, tensor in _slots(model)}
    odd = [name for name in state if name not in found]
    odd += [name for name, tensor in found.items() if tensor.layout != torch.strided or tensor.is_quantized]
    if odd:
        raise CheckpointError(f"{odd[0]} is no dense tensor: a checkpoint holds tensors only")
    return found


def _slots(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The path of every place that holds a tensor, and the tensor; shared ones repeat."""
    for prefix, module in _modules_of(model).items():
        dot, held = f"{prefix}." if prefix else "", cast(Any, module)
        for own in (held._parameters, held._buffers, vars(module)):
            yield from ((dot + name, value) for name, value in own.items() if isinstance(value, Tensor))


def _modules_of(model: nn.Module) -> dict[str, nn.Module]:
    """All modules by their paths; shared ones repeat."""
    return dict(cast("Iterator[tuple[str, nn.Module]]", model.named_modules(remove_duplicate=False)))


def pack(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], Strides, dict[str, str]]:
    """Tensors on the CPU in order, the strides of those that had another order, and who shares memory with whom."""
    packed: dict[str, Tensor] = {}
    strides: Strides = {}
    aliases: dict[str, str] = {}
    first: dict[Any, str] = {}
    for name, tensor in tensors.items():
        key = (
            tensor.untyped_storage().data_ptr(),
            tensor.storage_offset(),
            tensor.shape,
            tensor.stride(),
            tensor.dtype,
        )
        owner = first.setdefault(key, name) if tensor.numel() else name
        if owner != name:
            aliases[name] = owner
            continue
        if _is_reordered(tensor):
            strides[name] = tensor.stride()
        # A clone, because two tensors may overlap in memory without being the same.
        packed[name] = tensor.cpu().clone(memory_format=torch.contiguous_format)
    return packed, strides, aliases


def unpack(
    packed: Mapping[str, Tensor], strides: Mapping[str, tuple[int, ...]], aliases: Mapping[str, str]
) -> dict[str, Tensor]:
    """The inverse of `pack`; who shared memory shares it again.

    All are copies: matrix products can differ in the last bit where memory is not aligned, as in a file's.
    """
    tensors: dict[str, Tensor] = {}
    for name, tensor in packed.items():
        stride = strides.get(name, tensor.stride())
        tensors[name] = torch.empty_strided(tensor.shape, stride, dtype=tensor.dtype).copy_(tensor)
    return tensors | {name: tensors[owner] for name, owner in aliases.items()}


def _is_reordered(tensor: Tensor) -> bool:
    """Whether memory holds the elements without gaps, but in another order (channels-last)."""
    if tensor.stride() == torch.empty(tensor.shape, device="meta").stride():
        return False
    order = sorted(range(tensor.dim()), key=lambda axis: (-tensor.stride(axis), -tensor.shape[axis]))
    return tensor.permute(order).is_contiguous()


def load_tensors(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Puts tensors in their places, with the type and memory format that they have.

    Raises:
        CheckpointError: a name or a shape does not fit the model.
    """
    wanted = shapes_of(model)
    faults = [f"{name} is missing" for name in wanted if name not in tensors]
    faults += [f"{name} has no place" for name in tensors if name not in wanted]
    faults += [
        f"{name} is {tuple(tensors[name].shape)}, expected {tuple(shape)}"
        for name, shape in wanted.items()
        if name in tensors and tensors[name].shape != shape
    ]
    if faults:
        rest = f", and {len(faults) - 3} more" if len(faults) > 3 else ""
        raise CheckpointError(f"{'; '.join(faults[:3])}{rest}")
    modules = _modules_of(model)
    for name, tensor in tensors.items():
        prefix, _, own = name.removeprefix(CONSTANT).rpartition(".")
        _put(modules[prefix], own, tensor)


def shapes_of(model: nn.Module) -> dict[str, torch.Size]:
    """The shape of every tensor by name."""
    return {name: tensor.shape for name, tensor in named_tensors(model).items()}


def rests_on_meta(model: nn.Module) -> bool:
    """Whether a tensor of a module tree, or a device written into a graph of it, is still meta."""
    graphs = [graph for module in model.modules() if isinstance(module, fx.GraphModule) for graph in _graphs(module)]
    devices: list[Any] = []
    for node in (node for graph in graphs for node in graph.nodes):
        map_leaves((node.args, node.kwargs), devices.append)
    meta = torch.device("meta")
    return any(leaf == meta for leaf in devices) or any(tensor.is_meta for _, tensor in _slots(model))


def _graphs(module: fx.GraphModule) -> list[fx.Graph]:
    """A module's graph, and those of both modes where it has one each."""
    modes: dict[bool, fx.Graph] = getattr(module, "mode_graphs", None) or {}
    return [module.graph, *modes.values()]


def _put(owner: nn.Module, name: str, tensor: Tensor) -> None:
    value = getattr(owner, name)
    if isinstance(value, nn.Parameter) and value.is_meta:
        _swap(value, nn.Parameter(tensor, value.requires_grad))  # as below; data cannot leave the meta device
    elif isinstance(value, nn.Parameter):
        value.data = tensor  # the parameter stays the object that others share
    else:
        setattr(owner, name, tensor)
