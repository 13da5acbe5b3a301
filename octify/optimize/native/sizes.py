"""How big what a step writes is, for any sizes of what is there before it: functions that can be pickled."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch

from octify.optimize.native.steps import Conv, Shape, Sizes


@dataclass(frozen=True)
class Like:
    """As big as another value."""

    value: int

    def __call__(self, sizes: Sizes) -> Shape:
        """The shape."""
        return sizes[self.value]


@dataclass(frozen=True)
class Halved:
    """Half as big as another size; an odd last position has one of its own, or, without `last`, none."""

    full: Callable[[Sizes], Shape]
    last: bool = True

    def __call__(self, sizes: Sizes) -> Shape:
        """The shape."""
        n, c, h, w = self.full(sizes)
        return n, c, (h + self.last) // 2, (w + self.last) // 2


@dataclass(frozen=True)
class OnGrid:
    """A value's channels in another size."""

    value: int
    grid: Callable[[Sizes], Shape]

    def __call__(self, sizes: Sizes) -> Shape:
        """The shape."""
        n, _, h, w = self.grid(sizes)
        return n, sizes[self.value][1], h, w


@dataclass(frozen=True)
class SideBySide:
    """The channels of several values, one behind the other."""

    parts: tuple[int, ...]

    def __call__(self, sizes: Sizes) -> Shape:
        """The shape."""
        n, _, h, w = sizes[self.parts[0]]
        return n, sum(sizes[part][1] for part in self.parts), h, w


@dataclass(frozen=True)
class Vector:
    """A value's channels, or so many, at one position."""

    value: int
    channels: int | None = None

    def __call__(self, sizes: Sizes) -> Shape:
        """The shape."""
        n, c, _, _ = sizes[self.value]
        return n, c if self.channels is None else self.channels, 1, 1


@dataclass(frozen=True)
class Chosen:
    """So many channels of a value's size."""

    value: int
    channels: int

    def __call__(self, sizes: Sizes) -> Shape:
        """The shape."""
        n, _, h, w = sizes[self.value]
        return n, self.channels, h, w


@dataclass(frozen=True)
class Convolved:
    """What a convolution or a window gives; `after` is what is padded at the bottom and on the right.

    With `last`, a last window may reach beyond that, if it begins before it: PyTorch's ceil mode.
    """

    conv: Conv
    after: tuple[int, int]
    last: bool = False

    def __call__(self, sizes: Sizes) -> Shape:
        """The shape."""
        conv = self.conv
        n, channels, *lengths = sizes[conv.value]
        h, w = (self._length(length, axis) for axis, length in enumerate(lengths))
        return n, channels if conv.weight is None else len(conv.weight), h, w

    def _length(self, length: int, axis: int) -> int:
        conv, stride = self.conv, self.conv.stride[axis]
        left = conv.before[axis]
        room = length + left + self.after[axis] - conv.dilation[axis] * (conv.kernel[axis] - 1) - 1
        found = (room + (stride - 1) * self.last) // stride + 1
        return found - 1 if self.last and (found - 1) * stride >= length + left else found


@dataclass(frozen=True)
class Cropped:
    """What a convolution gives, cut along some dims to the size that the source's geometry has for its high map."""

    inner: Convolved
    high: Callable[[Sizes], Shape]
    halved: tuple[Any, ...]  # the source's axes, which are halved on the low grid
    crop: tuple[int, ...]
    low: tuple[bool, ...]

    def __call__(self, sizes: Sizes) -> Shape:
        """The shape."""
        shape = list(self.inner(sizes))
        for dim in self.crop:
            full = self.halved[dim].out_size(self.high(sizes)[dim])
            shape[dim] = (full + 1) // 2 if self.low[dim] else full
        return cast(Shape, tuple(shape))


@dataclass(frozen=True)
class SameSize:
    """What a convolution gives that pads as TensorFlow does."""

    conv: Conv

    def __call__(self, sizes: Sizes) -> Shape:
        """The shape."""
        conv = self.conv
        n, _, *lengths = sizes[conv.value]
        h, w = (-(-length // stride) for length, stride in zip(lengths, conv.stride, strict=True))
        return n, len(cast("torch.Tensor", conv.weight)), h, w


@dataclass(frozen=True)
class Given:
    """A value's channels in a size that an expression gives: two numbers, or what they are in."""

    value: int
    size: Any

    def __call__(self, sizes: Sizes) -> Shape:
        """The shape."""
        h, w = worked_out(self.size, sizes)
        n, c, _, _ = sizes[self.value]
        return n, c, int(h), int(w)


@dataclass(frozen=True)
class Shaped:
    """In an expression: a value, of which the size is wanted."""

    value: int


@dataclass(frozen=True)
class Worked:
    """In an expression: what a function gives."""

    function: Callable[..., Any]
    arguments: tuple[Any, ...]


def worked_out(expression: Any, sizes: Sizes) -> Any:
    """What an expression gives."""
    if isinstance(expression, Shaped):
        return torch.empty(sizes[expression.value], device="meta")
    if isinstance(expression, Worked):
        return expression.function(*worked_out(expression.arguments, sizes))
    if isinstance(expression, (list, tuple)):
        return tuple(worked_out(part, sizes) for part in cast("tuple[Any, ...]", expression))
    return expression
