"""What an operation on bands has to equal: the source's operation between a merge and a split."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from octify import convert, plan_of
from octify.layers import Merge, Split
from octify.layout import Layout


def random_layout(channels: int, low: int, seed: int = 0) -> Layout:
    """A layout with so many low channels in random places."""
    bits = [index < low for index in range(channels)]
    random.Random(seed).shuffle(bits)
    return Layout.of(bits)


def random_bands(layout: Layout, size: Sequence[int], batch: int = 2, spatial: int = 2) -> tuple[Tensor, Tensor]:
    """Random bands in double precision with an offset a channel."""
    still, halved = size[: len(size) - spatial], size[len(size) - spatial :]
    high = torch.randn(batch, layout.high, *size, dtype=torch.float64)
    low = torch.randn(batch, layout.low, *still, *((length + 1) // 2 for length in halved), dtype=torch.float64)
    offsets = torch.randn(1, layout.high + layout.low, *(1,) * len(size), dtype=torch.float64)
    return high + offsets[:, : layout.high], 2 * low + offsets[:, layout.high :]


def by_definition(
    op: Callable[[Tensor], Tensor],
    high: Tensor,
    low: Tensor,
    layout: Layout,
    out: Layout | None = None,
    spatial: int = 2,
) -> tuple[Tensor, ...]:
    """D of what an operation makes of U, for bands with channels at axis 1; one tensor if the result is dense."""
    dense = high if layout.is_dense else Merge(layout, spatial)(high, low)
    gives = out or layout
    return (op(dense),) if gives.is_dense else Split(gives, spatial)(op(dense))


def scramble(module: nn.Module) -> nn.Module:
    """Draws every parameter and running variance anew, away from ones and zeros; double precision, eval mode."""
    for parameter in module.parameters():
        nn.init.uniform_(parameter, 0.5, 1.5)
    for name, buffer in module.named_buffers():
        if name.endswith("running_var"):
            buffer.uniform_(0.5, 1.5)
    return module.double().eval()


def constant_image_error(model: nn.Module, size: Sequence[int] = (3, 32, 32), **options: Any) -> float:
    """Oracle 2: the relative error on a constant image, with replicate padding in place of zeros."""
    model = model.double().eval()
    for module in model.modules():
        if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)) and module.padding_mode == "zeros":
            module.padding_mode = "replicate"
            module._reversed_padding_repeated_twice = [  # pyright: ignore
                amount for amount in reversed(module.padding) for _ in range(2)
            ]
    converted = convert(model, example_inputs=(1, *size), **options)
    image = torch.rand(2, size[0], *(1,) * (len(size) - 1), dtype=torch.float64).expand(2, *size).contiguous()
    with torch.no_grad():
        wanted, given = model(image), converted(image)
    return float((wanted - given).abs().max() / wanted.abs().max().clamp_min(1e-12))


def trains(model: nn.Module, size: Sequence[int] = (3, 32, 32), **options: Any) -> nn.Module:
    """Converts, runs forward and backward in train mode, and asserts that every parameter has a finite gradient."""
    converted = convert(model.float().train(), example_inputs=(2, *size), **options).train()
    converted(torch.randn(2, *size)).square().mean().backward()
    gradients = {name: parameter.grad for name, parameter in converted.named_parameters()}
    assert not [name for name, grad in gradients.items() if grad is None or not grad.isfinite().all()]
    return converted


def forms(converted: nn.Module) -> dict[str, str]:
    """The plan's form of every operation, by target."""
    return {op.target: op.form for op in plan_of(converted).ops}
