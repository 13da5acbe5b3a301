"""A program's steps: what `kernels.cpp` does to which maps, as plain values and as the structures that it reads.

Values are numbered maps (N, C, H, W), channels last in memory.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import cast

import torch
from torch import Tensor
from torch.nn import functional as F

Shape = tuple[int, int, int, int]
Sizes = dict[int, Shape]
AT_ONCE = 4  # convolutions, and plain maps, that one step sums

SMALL_GROUPS = (1, 2, 4)  # channels in the groups that a vector holds whole, and that pay

ACTS = {"": 0, "relu": 1, "relu6": 2, "silu": 3, "hardswish": 4, "sigmoid": 5, "tanh": 6, "hardsigmoid": 7}


class Kind(IntEnum):
    """As in `kernels.cpp`."""

    SUM = 0
    GROUPED = 1
    POOL = 2
    BESIDE = 3
    GREATEST = 4
    MEAN = 5
    TAKE = 6


@dataclass(frozen=True)
class Beside:
    """Values side by side, each with its channels, through a norm (per channel) if there is one, and an activation.

    `gate` is a value (N, C, 1, 1) by which they are multiplied instead.
    """

    parts: tuple[tuple[int, int], ...]
    scale: Tensor | None = None
    shift: Tensor | None = None
    act: str = ""
    gate: int | None = None

    @property
    def plain(self) -> bool:
        """Whether the values stay as they are."""
        return self.scale is None and self.gate is None and not self.act


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

    @property
    def reads(self) -> list[int]:
        """The values that it reads."""
        if self.beside is None:
            return [self.value]
        return [*(value for value, _ in self.beside.parts), *([] if self.beside.gate is None else [self.beside.gate])]

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
    order: tuple[int, ...] = ()  # TAKE: which channels, in which order

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


class CMap(ctypes.Structure):
    """`Map`."""

    _fields_ = [("data", ctypes.c_void_p), *((name, ctypes.c_int64) for name in "nhwc")]


class CPart(ctypes.Structure):
    """`Part`."""

    _fields_ = [("map", ctypes.c_int64), ("channels", ctypes.c_int64)]


class CInput(ctypes.Structure):
    """`Input`."""

    _fields_ = [
        ("map", ctypes.c_int64),
        ("parts", ctypes.c_void_p),
        ("count", ctypes.c_int64),
        ("scale", ctypes.c_void_p),
        ("shift", ctypes.c_void_p),
        ("act", ctypes.c_int64),
        ("gate", ctypes.c_int64),
    ]


class CConv(ctypes.Structure):
    """`Conv`."""

    _fields_ = [
        ("input", CInput),
        ("weight", ctypes.c_void_p),
        ("first", ctypes.c_void_p),
        ("span", ctypes.c_int64),
        *((name, ctypes.c_int64 * 2) for name in ("kernel", "stride", "before", "dilation")),
    ]


class CStep(ctypes.Structure):
    """`Step`."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("kind", "out", "pooled", "act", "convs", "plains", "up", "wide")),
        ("plain", ctypes.c_int64 * AT_ONCE),
        ("weights", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("conv", CConv * AT_ONCE),
    ]


@dataclass
class Made:
    """A step as the kernels read it, the tensors that it points to, and the weights that it shall point to."""

    row: CStep
    kept: list[Tensor]
    weights: Tensor | None


def structure(step: Step, wide: int) -> Made:
    """A step as the kernels read it."""
    kept: list[Tensor] = []

    def place(tensor: Tensor) -> int:
        kept.append(tensor)
        return tensor.data_ptr()

    panel, packed = panel_of(step, wide), list[Tensor]()
    made = CStep(
        kind=step.kind,
        out=step.out,
        pooled=-1 if step.pooled is None else step.pooled,
        act=ACTS[step.act],
        convs=len(step.convs),
        plains=len(step.plains),
        up=-1 if step.up is None else step.up,
        wide=panel,
        plain=(ctypes.c_int64 * AT_ONCE)(*step.plains),
        bias=None if step.bias is None else place(padded(step.bias, wide)),
    )
    for conv, row in zip(step.convs, made.conv, strict=False):
        pair = ctypes.c_int64 * 2
        row.input.map, row.input.gate = conv.value, -1
        if conv.beside is not None:
            _place_beside(row.input, conv.beside, place)
        row.kernel, row.stride = pair(*conv.kernel), pair(*conv.stride)
        row.before, row.dilation = pair(*conv.before), pair(*conv.dilation)
        if conv.weight is None:
            continue
        if step.kind == Kind.GROUPED:
            row.weight, row.span = place(padded(conv.weight.permute(2, 3, 1, 0), wide)), conv.small_group
            continue
        rows, first = pack_weight(conv.weight, conv.groups, panel)
        row.first, row.span = place(first), rows.shape[2]
        packed.append(rows.flatten(1, 2))
    if step.order:
        made.conv[0].first = place(torch.tensor(step.order, dtype=torch.int64))
    if not packed:
        return Made(made, kept, None)
    together, outputs = torch.cat(packed, 1), len(cast(Tensor, step.convs[0].weight))
    return Made(made, kept, narrowed(together, outputs) if panel == wide else together)


def _place_beside(row: CInput, beside: Beside, place: Callable[[Tensor], int]) -> None:
    parts = torch.tensor(beside.parts, dtype=torch.int64)
    row.parts, row.count, row.act = place(parts), len(parts), ACTS[beside.act]
    row.gate = -1 if beside.gate is None else beside.gate
    if beside.scale is not None and beside.shift is not None:
        row.scale, row.shift = (place(values.detach().float().contiguous()) for values in (beside.scale, beside.shift))


def panel_of(step: Step, wide: int) -> int:
    """How many outputs a panel of a step has: half as many where that saves products, as with small groups."""
    convs = [conv for conv in step.convs if conv.weight is not None]
    narrow, full = (sum(_products(conv, each) for conv in convs) for each in (wide // 2, wide))
    return wide // 2 if narrow < 0.75 * full else wide


def _products(conv: Conv, wide: int) -> int:
    """For each output pixel."""
    outputs, take, *kernel = cast(Tensor, conv.weight).shape
    starts, span = spans((take * conv.groups, outputs), conv.groups, wide)
    narrow = wide // 2 if 0 < outputs % wide <= wide // 2 else 0  # the last panel's other half is not computed
    return math.prod(kernel) * span * (len(starts) * wide - narrow)


def small_group(weight: Sequence[int], groups: int) -> int:
    """How many channels each group of a convolution has, where vectors of channels hold groups whole; else 0."""
    outputs, take = weight[:2]
    return take if groups > 1 and take * groups == outputs and take in SMALL_GROUPS else 0


def padded(rows: Tensor, wide: int) -> Tensor:
    """Rows of channels up to whole panels."""
    return F.pad(rows.detach().float(), (0, -rows.shape[-1] % wide)).contiguous()


def spans(channels: tuple[int, int], groups: int, wide: int) -> tuple[list[int], int]:
    """The first input channel that each panel of outputs reads, and how many it reads."""
    inputs, outputs = channels
    give, take = outputs // groups, inputs // groups
    starts = range(0, outputs, wide)
    edges = [(start // give * take, ((min(start + wide, outputs) - 1) // give + 1) * take) for start in starts]
    span = max(last - first for first, last in edges)
    return [min(first, inputs - span) for first, _ in edges], span


def waste(channels: tuple[int, int], groups: int, wide: int) -> float:
    """How many products a grouped convolution makes for one that it needs."""
    panels, span = spans(channels, groups, wide)
    return len(panels) * wide * span * groups / (channels[0] * channels[1])


def narrowed(packed: Tensor, outputs: int) -> Tensor:
    """The panels one behind the other; the last one half as wide if its outputs fit into that."""
    half = packed.shape[-1] // 2
    if len(packed) * 2 * half - outputs < half:
        return packed.flatten()
    return torch.cat([packed[:-1].flatten(), packed[-1, ..., :half].flatten()])


def pack_weight(weight: Tensor, groups: int, wide: int) -> tuple[Tensor, Tensor]:
    """(panels, taps, span, wide), zero where a group does not reach, and the first channel of each panel."""
    outputs, take = weight.shape[0], weight.shape[1]
    first, span = spans((take * groups, outputs), groups, wide)
    flat = weight.detach().float().flatten(2).permute(2, 1, 0)  # taps, inputs of a group, outputs
    packed = torch.zeros(len(first), flat.shape[0], span, wide)
    for panel, start in enumerate(first):
        low, high = panel * wide, min((panel + 1) * wide, outputs)
        for group in range(low * groups // outputs, (high - 1) * groups // outputs + 1):
            give = outputs // groups
            begin, end = max(low, group * give), min(high, (group + 1) * give)
            at = group * take - start
            packed[panel, :, at : at + take, begin - low : end - low] = flat[:, :, begin:end]
    return packed, torch.tensor(first, dtype=torch.int64)
