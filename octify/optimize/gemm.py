"""1x1 convolutions for eager mode on a CPU as matrix products: less overhead a call than a convolution has."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from octify.optimize.forms import activate


def can_multiply(conv: nn.Conv2d) -> bool:
    """Whether a convolution is a matrix product of its channels-last input."""
    plain = conv.kernel_size == (1, 1) and conv.stride == (1, 1) and conv.padding == (0, 0)
    return plain and conv.groups == 1 and conv.weight.dtype == torch.float32


class GemmConv(nn.Module):
    """As `packed.PackedConv`, for kernels of one tap."""

    def __init__(self, conv: nn.Conv2d, act: str = "", overwrite: bool = False) -> None:
        super().__init__()
        self.weight = conv.weight.detach().flatten(1).t().contiguous()
        self.bias = None if conv.bias is None else conv.bias.detach()
        self.act, self.overwrite = act, overwrite

    def forward(self, x: Tensor, onto: Tensor | None = None) -> Tensor:
        """x (N, C, H, W), channels last."""
        rows = x.permute(0, 2, 3, 1)
        flat = rows.reshape(-1, x.shape[1])
        if onto is None:
            out = torch.mm(flat, self.weight) if self.bias is None else torch.addmm(self.bias, flat, self.weight)
        else:
            base = onto.permute(0, 2, 3, 1).reshape(-1, onto.shape[1])
            out = base.addmm_(flat, self.weight) if self.overwrite else torch.addmm(base, flat, self.weight)
            if self.bias is not None:
                out.add_(self.bias)
        if self.act:
            out = out.relu_() if self.act == "relu" else activate(out, self.act)
        return out.view(*rows.shape[:3], -1).permute(0, 3, 1, 2)

    def extra_repr(self) -> str:
        """Channels, activation and whether it overwrites."""
        return f"{tuple(self.weight.shape)}, act={self.act!r}, over={self.overwrite}"
