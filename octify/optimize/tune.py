"""Which of two forms of a convolution is faster here: measured, once, at the example's size."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from octify.graph import get_module, set_module
from octify.optimize.gemm import GemmConv, can_multiply
from octify.optimize.packed import PackedConv

ROUNDS = 7
GAIN = 0.97  # what the other form must win to be taken


def choose_products(module: fx.GraphModule, convs: dict[str, nn.Conv2d], inputs: Sequence[Any]) -> int:
    """Before: PackedConv of one tap.   After: a matrix product where it measures faster; returns how many.

    `convs` are the packed modules' sources by path. Equal shapes are measured once.
    """
    seen: dict[str, tuple[torch.Size, torch.Size | None]] = {}
    hooks = [get_module(module, path).register_forward_pre_hook(_note(seen, path)) for path in convs]
    with torch.inference_mode():
        module(*inputs)
    for hook in hooks:
        hook.remove()
    won: dict[tuple[Any, ...], bool] = {}
    count = 0
    for path, conv in convs.items():
        packed = get_module(module, path)
        if not isinstance(packed, PackedConv) or not can_multiply(conv) or path not in seen:
            continue
        product = GemmConv(conv, packed.act, packed.overwrite)
        key = (seen[path], packed.act, packed.overwrite, conv.bias is None, conv.out_channels)
        if key not in won:
            won[key] = faster(product, packed, _random(*seen[path]))
        if won[key]:
            set_module(module, path, product)
            count += 1
    return count


def _note(seen: dict[str, Any], path: str) -> Callable[..., None]:
    def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        seen[path] = (args[0].shape, args[1].shape if len(args) > 1 else None)

    return hook


def _random(size: torch.Size, onto: torch.Size | None) -> list[Tensor]:
    return [torch.randn(shape).contiguous(memory_format=torch.channels_last) for shape in (size, onto) if shape]


def faster(one: nn.Module, other: nn.Module, inputs: Sequence[Any]) -> bool:
    """Whether `one` is faster than `other` by more than noise, by the least of interleaved runs."""
    best = [float("inf"), float("inf")]
    with torch.inference_mode():
        for round_ in range(ROUNDS + 1):
            for index, form in enumerate((one, other)):
                start = time.perf_counter()
                form(*inputs)
                if round_:
                    best[index] = min(best[index], time.perf_counter() - start)
    return best[0] < GAIN * best[1]
