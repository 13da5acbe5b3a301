"""A program's steps: what `kernels.cpp` does to which maps.

Values are numbered maps (N, C, H, W), channels last in memory.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import IntEnum

from torch import Tensor

from octify.optimize.native.packing import small_group

Shape = tuple[int, int, int, int]
Sizes = dict[int, Shape]
AT_ONCE = 4  # convolutions, and plain maps, that one step sums

SAME = (-1, -1)  # padded as TensorFlow does, by the size


class Kind(IntEnum):
    """As in `kernels.cpp`."""

    SUM = 0
    GROUPED = 1
    POOL = 2
    BESIDE = 3
    GREATEST = 4
    MEAN = 5
    TAKE = 6
    AVERAGE = 7
    RESIZE = 8
    MOMENTS = 9
    VIEW = 10
    GROUPS = 11
    BLEND = 12
    INTERLEAVE = 13


class Edge(IntEnum):
    """What lies beyond a map's borders: nothing, its edge again, or that only where windows do not fit."""

    NOTHING = 0
    REPEATED = 1
    REPEATED_UNLESS_FITTING = 2


@dataclass(frozen=True)
class Beside:
    """Values side by side, each with its channels, through a norm (per channel) if there is one, and an activation.

    `gate` is a value by which one is multiplied instead, of as many images, channels and positions, or one; of twice as
    many channels, the second half is added then. `moments` (N, 3, H, W) centre and scale each position of one first.
    """

    parts: tuple[tuple[int, int], ...]
    scale: Tensor | None = None
    shift: Tensor | None = None
    act: str = ""
    gate: int | None = None
    moments: int | None = None

    @property
    def plain(self) -> bool:
        """Whether the values stay as they are."""
        return self.scale is None and self.gate is None and self.moments is None and not self.act

    @property
    def reads(self) -> list[int]:
        """The values that are read."""
        more = [value for value in (self.gate, self.moments) if value is not None]
        return [*(value for value, _ in self.parts), *more]


@dataclass
class Conv:
    """A convolution of a value, weight (O, I / groups, h, w), or a window of it; `before`: padding on top and left.

    With `beside`, of that instead: `value` is its first part, which has its size.
    """

    value: int
    kernel: tuple[int, int]
    stride: tuple[int, int]
    before: tuple[int, int]
    dilation: tuple[int, int]
    groups: int = 1
    weight: Tensor | None = None
    beside: Beside | None = None
    edge: Edge = Edge.NOTHING
    area: int = 0  # of a window that is averaged: over how many, or 0 for as many as lie within the borders

    @property
    def reads(self) -> list[int]:
        """The values that it reads."""
        return [self.value] if self.beside is None else self.beside.reads

    @property
    def small_group(self) -> int:
        """As the function says of its weight."""
        return 0 if self.weight is None else small_group(self.weight.shape, self.groups)


@dataclass
class Step:
    """One step; `size` gives the output's shape from those of the values before it."""

    kind: Kind
    out: int
    size: Callable[[Sizes], Shape]
    convs: list[Conv] = field(default_factory=list[Conv])
    plains: list[int] = field(default_factory=list[int])
    up: int | None = None
    pooled: int | None = None
    act: str = ""
    bias: Tensor | None = None
    # TAKE: which channels, in which order; VIEW: the first; GROUPS: each one's group; BLEND: whether corners are met
    order: tuple[int, ...] = ()
    eps: float = 0.0  # MOMENTS, GROUPS

    @property
    def widest(self) -> int:
        """How many numbers a row of a kernel reads at most."""
        rows = [conv.weight[0, :, 0].numel() * conv.groups for conv in self.convs if conv.weight is not None]
        return max(rows, default=0)

    @property
    def reads(self) -> list[int]:
        """The values that the step reads."""
        convs = [value for conv in self.convs for value in conv.reads]
        return [*convs, *self.plains, *([] if self.up is None else [self.up])]

    @property
    def writes(self) -> list[int]:
        """The values that the step writes."""
        return [self.out] if self.pooled is None else [self.out, self.pooled]
