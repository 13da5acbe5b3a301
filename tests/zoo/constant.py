"""What oracle 2 needs of a network: gains that show every branch."""

from __future__ import annotations

import torch
from torch import Tensor, nn


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
