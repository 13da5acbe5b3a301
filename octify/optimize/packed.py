"""Convolutions for eager mode on a CPU: weights in oneDNN's own layout, sum and activation in the same call."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from octify.optimize.forms import activate

# How oneDNN's PyTorch operators call an activation, and their word for its kind. Others follow the convolution.
ATTRS = {
    "relu": ("relu", ""),
    "hardtanh": ("hardtanh", ""),
    "silu": ("swish", ""),
    "hardswish": ("hardswish", ""),
    "sigmoid": ("sigmoid", ""),
    "tanh": ("tanh", ""),
    "hardsigmoid": ("hardsigmoid", ""),
    "leaky_relu": ("leaky_relu", ""),
    "gelu": ("gelu", "none"),
    "gelu_tanh": ("gelu", "tanh"),
}


def can_pack(conv: nn.Module) -> bool:
    """Whether a module is a convolution that oneDNN takes here."""
    if type(conv) not in (nn.Conv2d, nn.Conv3d) or conv.padding_mode != "zeros" or isinstance(conv.padding, str):
        return False
    if conv.weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    if conv.weight.dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return conv.weight.dtype == torch.float32


def lay_last(x: Tensor) -> Tensor:
    """A batch of maps laid out channels last."""
    return x.contiguous(memory_format=torch.channels_last if x.dim() == 4 else torch.channels_last_3d)


class PackedConv(nn.Module):
    """`act(conv(x))`, or with `onto` `act(conv(x) + onto)`; with `overwrite` the result takes the place of `onto`."""

    def __init__(self, conv: nn.Conv2d, act: str = "", overwrite: bool = False) -> None:
        super().__init__()
        self.stride, self.dilation = list(conv.stride), list(conv.dilation)
        self.padding, self.groups = list(cast("tuple[int, ...]", conv.padding)), conv.groups
        self.weight = conv.weight.detach()
        self.size: torch.Size | None = None
        self.bias = None if conv.bias is None else conv.bias.detach()
        self.act, self.overwrite = act, overwrite
        name, *numbers = act.split() or [""]
        self.follows = bool(act) and name not in ATTRS
        attribute, algorithm = ATTRS.get(name, ("none", ""))
        self.unary = (attribute, [] if self.follows else [float(number) for number in numbers], algorithm)
        self.shape = (conv.in_channels, conv.out_channels, conv.kernel_size)

    def pack(self, size: torch.Size) -> None:
        """Lays the weight out for an input of this size; without the size oneDNN can end up with a slow kernel."""
        weight = self.weight.to_dense() if self.weight.is_mkldnn else self.weight
        lay_out: Any = torch.ops.mkldnn._reorder_convolution_weight
        self.weight = lay_out(weight, self.padding, self.stride, self.dilation, self.groups, list(size))
        self.size = size

    def forward(self, x: Tensor, onto: Tensor | None = None) -> Tensor:
        """x (N, C, H, W), channels last."""
        x = lay_last(x)
        if x.shape != self.size:
            self.pack(x.shape)
        geometry = (self.weight, self.bias, self.padding, self.stride, self.dilation, self.groups)
        if onto is None:
            out = torch.ops.mkldnn._convolution_pointwise(x, *geometry, *self.unary)
            return activate(out, self.act) if self.follows else out
        # After a sum, oneDNN's operators know no activation but this one.
        sum_: tuple[Any, ...] = ("add", 1.0, "relu" if self.act == "relu" else None, [], None)
        if self.overwrite:
            out = torch.ops.mkldnn._convolution_pointwise_(onto, x, *geometry, *sum_)
        else:
            onto = lay_last(onto)
            out = torch.ops.mkldnn._convolution_pointwise(x, onto, *geometry, *sum_)
        return out if self.act in ("", "relu") else activate(out, self.act)

    def extra_repr(self) -> str:
        """Geometry, activation and whether it overwrites."""
        return f"{self.shape}, stride={self.stride}, padding={self.padding}, act={self.act!r}, over={self.overwrite}"
