"""Modules whose weights are computed whenever they run: weight norm, spectral norm, pruning, parametrizations."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import nn
from torch.nn.utils import parametrize, prune
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from octify.graph import sharing_copy

HOOKS = (WeightNorm, SpectralNorm, prune.BasePruningMethod)  # the older kind: each computes one tensor


def plain_type(module: nn.Module) -> type[nn.Module]:
    """A module's type as it was before parametrizations were registered."""
    return cast("type[nn.Module]", parametrize.type_before_parametrizations(module))


def computed_by(module: nn.Module) -> list[str]:
    """What computes a module's tensors, by its kinds' names; nothing of a plain module."""
    names = [type(hook).__name__ for hook in cast(Any, module)._forward_pre_hooks.values() if isinstance(hook, HOOKS)]
    if parametrize.is_parametrized(module):
        lists = cast("dict[str, Any]", module.parametrizations)
        names += [type(kind).__name__.lstrip("_") for kinds in lists.values() for kind in kinds]
    return names


def settled(module: nn.Module) -> nn.Module:
    """A plain copy whose tensors are what is computed for them now; the module itself where it is plain."""
    if not computed_by(module):
        return module
    found = sharing_copy(module).eval()  # in train mode spectral norm iterates
    hooks: dict[int, Any] = cast(Any, found)._forward_pre_hooks
    own: dict[str, Any] = cast(Any, found)._parameters
    for key, hook in list(hooks.items()):
        if isinstance(hook, HOOKS):
            for name, parameter in list(own.items()):  # taking pruning away writes into them
                own[name] = nn.Parameter(parameter.detach().clone(), parameter.requires_grad)
            cast(Any, hook).remove(found)
            del hooks[key]
    found = _without_parametrizations(found) if parametrize.is_parametrized(found) else found
    return found.train(module.training)


def _without_parametrizations(module: nn.Module) -> nn.Module:
    """A module of the plain type; PyTorch's own way to remove them changes the class, which all copies share."""
    kind = plain_type(module)
    found = kind.__new__(kind)
    found.__dict__.update(vars(module))
    lists = cast("dict[str, Any]", module.parametrizations)
    children: dict[str, Any] = cast(Any, module)._modules
    object.__setattr__(
        found, "_modules", {name: child for name, child in children.items() if name != "parametrizations"}
    )
    object.__setattr__(found, "_parameters", dict(cast(Any, module)._parameters))
    for name, kinds in lists.items():
        learns = any(parameter.requires_grad for parameter in kinds.parameters())
        with torch.no_grad():
            found.register_parameter(name, nn.Parameter(getattr(module, name).clone(), learns))
    return found
