"""Oracle 2's world: zero padding becomes replicate padding, so that a constant image stays constant in every map."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

CONVOLUTIONS = {torch.conv1d: 1, torch.conv2d: 2, torch.conv3d: 3}
AVERAGES = {F.avg_pool1d: 1, F.avg_pool2d: 2, F.avg_pool3d: 3}
FLAT = 1e-4


def replicate(x: Tensor, axis: int, before: int, after: int) -> Tensor:
    """Padding by the border's values; negative amounts cut."""
    index = torch.arange(-before, x.shape[axis] + after, device=x.device).clamp(0, x.shape[axis] - 1)
    return x.index_select(axis, index)


class ReplicatePadding(TorchFunctionMode):
    """Convolutions, average pools and `F.pad` take the border's values in place of zeros."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        options = dict(kwargs or {})
        if func in CONVOLUTIONS:
            return self._convolution(func, args, options)
        if func in AVERAGES:
            return self._average(func, args, options)
        if func is F.pad:
            return self._pad(func, args, options)
        return func(*args, **options)

    def _convolution(self, func: Any, args: tuple[Any, ...], options: dict[str, Any]) -> Any:
        dims = CONVOLUTIONS[func]
        names = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
        given = {**dict(zip(names, args, strict=False)), **options}
        pads = given.pop("padding", 0)
        x, kernel = given["input"], given["weight"].shape[2:]
        step = given.get("dilation", 1)
        step = [step] * dims if isinstance(step, int) else list(step) * (dims if len(step) == 1 else 1)
        for index in range(dims):
            before, after = _amounts(pads, index, step[index] * (kernel[index] - 1))
            if before or after:
                x = replicate(x, x.dim() - dims + index, before, after)
        return func(**{**given, "input": x})

    def _average(self, func: Any, args: tuple[Any, ...], options: dict[str, Any]) -> Any:
        names = ("input", "kernel_size", "stride", "padding", "ceil_mode", "count_include_pad", "divisor_override")
        given = {**dict(zip(names, args, strict=False)), **options}
        if not given.get("count_include_pad", True):
            return func(*args, **options)
        pads, x, dims = given.pop("padding", 0), given["input"], AVERAGES[func]
        for index in range(dims):
            before, after = _amounts(pads, index, 0)
            x = replicate(x, x.dim() - dims + index, before, after) if before else x
        return func(**{**given, "input": x})

    def _pad(self, func: Any, args: tuple[Any, ...], options: dict[str, Any]) -> Any:
        given = {**dict(zip(("input", "pad", "mode", "value"), args, strict=False)), **options}
        x, pads = given["input"], given["pad"]
        if given.get("mode", "constant") != "constant" or given.get("value") or len(pads) // 2 > x.dim() - 2:
            return func(*args, **options)
        for index in range(len(pads) // 2):
            if pads[2 * index] or pads[2 * index + 1]:
                x = replicate(x, x.dim() - 1 - index, pads[2 * index], pads[2 * index + 1])
        return x


def _amounts(pads: Any, index: int, reach: int) -> tuple[int, int]:
    if pads == "same":
        return reach // 2, reach - reach // 2
    if isinstance(pads, str):
        return 0, 0
    amount = pads if isinstance(pads, int) else pads[index if len(pads) > 1 else 0]
    return amount, amount


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
