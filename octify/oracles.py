"""Exact oracles: inputs on which a converted network must give what its source gives, whatever the recipe.

1. Nothing low: identical bit for bit.
2. A constant image, with every zero padding replaced by replication: all maps are constant, so pooling and upsampling
   lose nothing. Finds wrong channels; blind to resampling.
3. Maps constant on 2 by 2 blocks: a folded convolution's low output is exactly the pooled output of the source.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from octify.graph import named_modules, sharing_copy
from octify.layers import Merge, OctConv, Split, pool_low, up_to

TOLERANCE = 1e-5


class ReplicatePadding(TorchFunctionMode):
    """While active, what would pad with zeros repeats the border instead, in any module or function.

    >>> with ReplicatePadding():
    ...     nn.functional.conv1d(torch.ones(1, 1, 3), torch.ones(1, 1, 3), padding=1).tolist()
    [[[3.0, 3.0, 3.0]]]
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Runs the function, or its stand-in."""
        name = getattr(func, "__name__", "")
        return _STAND_INS.get(name, _as_it_is)(func, *args, **(kwargs or {}))


def _as_it_is(func: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return func(*args, **kwargs)


def _convolution(
    func: Callable[..., Any],
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Tensor:
    rank = weight.dim() - 2
    steps = _numbers(dilation, rank)
    if padding == "same":
        totals = [step * (size - 1) for step, size in zip(steps, weight.shape[2:], strict=True)]
        sides = [(total // 2, total - total // 2) for total in totals]
    else:
        sides = [(side, side) for side in _numbers(0 if padding == "valid" else padding, rank)]
    padded = _replicate(input, [side for pair in reversed(sides) for side in pair])
    return func(padded, weight, bias, stride, 0, dilation, groups)


def _pad(
    func: Callable[..., Any],
    input: Tensor,
    pad: Sequence[int],
    mode: str = "constant",
    value: float | None = None,
) -> Tensor:
    axes = input.dim() - 2
    if mode != "constant" or value or len(pad) > 2 * axes:
        return func(input, pad, mode, value)
    return _replicate(input, [*pad, *[0] * (2 * axes - len(pad))])  # replication wants all axes


def _average(
    func: Callable[..., Any],
    input: Tensor,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    *rest: Any,
    **more: Any,
) -> Tensor:
    return func(input, kernel_size, stride, padding, ceil_mode, False, *rest, **more)


_STAND_INS: dict[str, Callable[..., Any]] = {
    **dict.fromkeys(("conv1d", "conv2d", "conv3d"), _convolution),
    **dict.fromkeys(("avg_pool1d", "avg_pool2d", "avg_pool3d"), _average),
    "pad": _pad,
}


def _numbers(value: Any, count: int) -> tuple[int, ...]:
    given = (value,) if isinstance(value, int) else tuple(value)
    return given * count if len(given) == 1 else given


def _replicate(x: Tensor, pads: Sequence[int]) -> Tensor:
    """On any axes, also those that `F.pad` does not replicate; negative amounts cut."""
    for index in range(len(pads) // 2):
        before, after, axis = pads[2 * index], pads[2 * index + 1], x.dim() - 1 - index
        if before or after:
            places = torch.arange(-before, x.shape[axis] + after, device=x.device).clamp(0, x.shape[axis] - 1)
            x = x.index_select(axis, places)
    return x


def constant_image(shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
    """An image (N, C, …) with one value a channel and image."""
    values = torch.rand(tuple(shape[:2]), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    full = (2 * values - 0.8).reshape(*shape[:2], *(1 for _ in shape[2:])).expand(*shape)
    return full.contiguous().to(dtype)


def block_image(shape: Sequence[int], spatial: int = 2, dtype: torch.dtype = torch.float32) -> Tensor:
    """An image constant on 2 by 2 blocks (of the last `spatial` axes), random otherwise."""
    sizes = [(size + 1) // 2 if axis >= len(shape) - spatial else size for axis, size in enumerate(shape)]
    low = torch.randn(sizes, generator=torch.Generator().manual_seed(0), dtype=dtype)
    return up_to(low, shape[len(shape) - spatial :])


def relative_error(expected: Any, found: Any) -> float:
    """The largest difference between two outputs, relative to the largest expected value; inf if their forms differ."""
    wanted, given = tensors_in(expected), tensors_in(found)
    if [value.shape for value in wanted] != [value.shape for value in given]:
        return float("inf")
    worst = 0.0
    for a, b in zip(wanted, given, strict=True):
        scale = a.abs().max().double().item() if a.numel() else 0.0
        gap = (a.double() - b.double()).abs().max().item() if a.numel() else 0.0
        error = gap / scale if scale else gap
        worst = max(worst, error if error == error else float("inf"))  # a NaN is never right
    return worst


def tensors_in(output: Any) -> list[Tensor]:
    """The tensors of an output in order, whatever it is made of."""
    leaves: list[Any] = pytree.tree_leaves(output)
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]


def same_bits(expected: Any, found: Any) -> bool:
    """Whether two outputs hold the same tensors bit for bit; a NaN equals a NaN."""
    wanted, given = tensors_in(expected), tensors_in(found)
    return len(wanted) == len(given) and all(
        a.shape == b.shape and a.dtype == b.dtype and torch.allclose(a, b, 0, 0, equal_nan=True)
        for a, b in zip(wanted, given, strict=True)
    )


@torch.no_grad()
def constant_error(source: nn.Module, converted: nn.Module, inputs: Iterable[Tensor]) -> float:
    """Oracle 2: how far two networks differ on constant images, in eval mode."""
    images = [constant_image(value.shape, value.dtype) for value in inputs]
    with ReplicatePadding():
        return relative_error(sharing_copy(source).eval()(*images), sharing_copy(converted).eval()(*images))


FLAT = 1e-4


def first_uneven(model: nn.Module, *inputs: Any) -> str:
    """The first module that turns even maps into an uneven one (an operation that depends on position), or ''."""
    found: list[str] = []

    def hook(path: str) -> Any:
        def look(_: nn.Module, args: Any, out: Any) -> None:
            if not found and isinstance(out, Tensor) and out.dim() >= 4 and _uneven(out):
                found.append(path or "the whole")

        return look

    with torch.no_grad(), ReplicatePadding(), ExitStack() as stack:
        for path, module in named_modules(model):
            stack.callback(module.register_forward_hook(hook(path)).remove)
        model(*inputs)
    return found[0] if found else ""


def _uneven(x: Tensor) -> bool:
    """Whether a map differs between positions, channels first or last."""
    scale = float(x.abs().max()) + 1e-12
    first = float((x - x[..., :1, :1]).abs().max())
    last = float((x - x[:, :1, :1]).abs().max())
    return min(first, last) > FLAT * scale


@torch.no_grad()
def block_error(conv: nn.Module, octave: OctConv, size: int = 8) -> float:
    """Oracle 3 for one convolution and its octave form, for maps of even `size`.

    The low output must be the pooled output of the source; a 1x1 convolution of stride 1 must be right in both bands.
    Needs folded kernels, or a 1x1 of stride 1.
    """
    spatial, layout = octave.spatial, octave.in_layout
    weight = next(octave.parameters())
    image = block_image((2, layout.channels, *(size,) * octave.dim), spatial, weight.dtype)
    expected = conv(image)
    bands: Any = (image, None)
    if layout.low:
        bands = (image[:, list(layout.high_index)], pool_low(image[:, list(layout.low_index)], spatial))
    given: Any = octave(*bands)
    gives = octave.out_layout
    pointwise = set(octave.kernel_size) == {1} and set(octave.stride) == {1}
    if pointwise:
        return relative_error(expected, Merge(gives, spatial)(*given) if gives.low else given)
    if not gives.low:
        return 0.0
    # The last low position of an odd axis stands for one output, but is computed for two.
    whole = tuple(slice(length // 2) for length in expected.shape[-spatial:])
    wanted = pool_low(expected[:, list(gives.low_index)], spatial)
    return relative_error(wanted[(..., *whole)], given[1][(..., *whole)])


@torch.no_grad()
def adapter_error(adapter: Split | Merge, size: int = 8) -> float:
    """Oracle 3 for an adapter: a split and a merge give a map of 2 by 2 blocks back."""
    layout, spatial = adapter.layout, adapter.spatial
    image = block_image((2, layout.channels, *(size,) * spatial), spatial)
    split = adapter if isinstance(adapter, Split) else Split(layout, spatial)
    merge = adapter if isinstance(adapter, Merge) else Merge(layout, spatial)
    high, low = split(image)
    return relative_error(image, merge(high, low))
