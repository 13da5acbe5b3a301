"""What oracle 2 needs of a network: gains that show every branch, and the word of where it depends on position."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from octify.oracles import ReplicatePadding

FLAT = 1e-4


@torch.no_grad()
def spread_gains(model: nn.Module, seed: int = 0) -> nn.Module:
    """Draws parameters and running statistics that are one constant (gains of 0, 1 or 1e-6) anew, so that every
    branch counts and every channel differs.
    """
    generator = torch.Generator().manual_seed(seed)
    for tensor in model.parameters():
        if tensor.dim() <= 1 or tensor.numel() == max(tensor.shape):
            _spread(tensor, generator)
    for name, buffer in model.named_buffers():
        if name.endswith(("running_mean", "running_var")):
            _spread(buffer, generator)
    return model


def _spread(tensor: Tensor, generator: torch.Generator) -> None:
    if not tensor.is_floating_point() or not tensor.numel() or (tensor != tensor.reshape(-1)[0]).any():
        return
    noise = torch.rand(tensor.shape, generator=generator).to(tensor) - 0.5
    near_one = float(tensor.reshape(-1)[0].abs()) > 0.5
    tensor.copy_(tensor * (1 + 0.6 * noise) if near_one else 0.3 * noise)


def first_uneven(model: nn.Module, *inputs: Any) -> str:
    """The first module that turns even maps into an uneven one (an operation that depends on position), or ''."""
    found: list[str] = []
    hooks = [
        module.register_forward_hook(lambda _, args, out, path=path: _look(path, args, out, found))
        for path, module in model.named_modules()
    ]
    try:
        with torch.no_grad(), ReplicatePadding():
            model(*inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return found[0] if found else ""


def _look(path: str, args: Any, out: Any, found: list[str]) -> None:
    if not found and isinstance(out, Tensor) and out.dim() >= 4 and _uneven(out):
        found.append(path or "the whole")


def _uneven(x: Tensor) -> bool:
    """Whether a map differs between positions, channels first or last."""
    scale = float(x.abs().max()) + 1e-12
    first = float((x - x[..., :1, :1]).abs().max())
    last = float((x - x[:, :1, :1]).abs().max())
    return min(first, last) > FLAT * scale
