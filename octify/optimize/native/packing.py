"""Weights as the kernels read them: panels of output channels."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

SMALL_GROUPS = (1, 2, 4)  # channels in the groups that a vector holds whole, and that pay
NARROW = 1.3  # what a product costs in a panel of one vector, against one of two
FINISH = 32  # as many products as it costs to finish a sum


@dataclass(frozen=True)
class Panel:
    """Output channels that are computed at once, from the first on; `width` is how many fit in."""

    first: int
    outputs: int
    width: int


@dataclass(frozen=True)
class Kernel:
    """A convolution's channels, as a weight (O, I / groups, h, w) has them."""

    outputs: int
    take: int
    taps: int
    groups: int

    @classmethod
    def of(cls, weight: Sequence[int], groups: int) -> Kernel:
        """From a weight's shape."""
        return cls(weight[0], weight[1], math.prod(weight[2:]), groups)

    def reads(self, panels: Iterable[Panel]) -> tuple[list[int], int]:
        """The first input channel that each panel reads, and how many it reads."""
        give = self.outputs // self.groups
        edges = [
            (panel.first // give * self.take, ((panel.first + panel.outputs - 1) // give + 1) * self.take)
            for panel in panels
        ]
        span = max(last - first for first, last in edges)
        return [min(first, self.take * self.groups - span) for first, _ in edges], span


def cut(outputs: int, groups: int, wide: int) -> list[Panel]:
    """Panels that no border between groups runs through; of a group's last channels a narrow one if they fit."""
    give = outputs // groups
    starts = [(group, first) for group in range(groups) for first in range(0, give, wide)]
    counts = [min(wide, give - first) for _, first in starts]
    return [
        Panel(group * give + first, count, wide // 2 if count <= wide // 2 else wide)
        for (group, first), count in zip(starts, counts, strict=True)
    ]


def panels_of(kernels: Sequence[Kernel], wide: int) -> list[Panel]:
    """The panels that cost least: of two vectors or one, across groups or within them."""
    outputs = kernels[0].outputs
    ways = [cut(outputs, groups, wide) for groups in sorted({1, *(kernel.groups for kernel in kernels)})]
    ways.append([Panel(first, min(wide // 2, outputs - first), wide // 2) for first in range(0, outputs, wide // 2)])

    def cost(panels: Sequence[Panel]) -> float:
        products = sum(_products(kernel, panels, wide) for kernel in kernels)
        return products + FINISH * sum(panel.width for panel in panels)

    return min(ways, key=cost)


def _products(kernel: Kernel, panels: Sequence[Panel], wide: int) -> float:
    """How many a pixel has, at a wide panel's speed."""
    _, span = kernel.reads(panels)
    return kernel.taps * span * sum(panel.width * (1 if panel.width == wide else NARROW) for panel in panels)


def waste(kernel: Kernel, wide: int) -> float:
    """How many products a grouped convolution makes for one that it needs."""
    return _products(kernel, panels_of([kernel], wide), wide) / (kernel.taps * kernel.take * kernel.outputs)


def small_group(weight: Sequence[int], groups: int) -> int:
    """How many channels each group of a convolution has, where vectors of channels hold groups whole; else 0."""
    outputs, take = weight[:2]
    return take if groups > 1 and take * groups == outputs and take in SMALL_GROUPS else 0


def padded(rows: Tensor, wide: int, more: int = 0) -> Tensor:
    """Rows of channels up to whole panels, and so many more."""
    return F.pad(rows.detach().float(), (0, -rows.shape[-1] % wide + more)).contiguous()


def pack_weight(weight: Tensor, groups: int, panels: Sequence[Panel]) -> tuple[list[Tensor], list[int]]:
    """Each panel's weights (taps, span, width), zero where a group does not reach, and its first channel."""
    kernel = Kernel.of(weight.shape, groups)
    starts, span = kernel.reads(panels)
    flat = weight.detach().float().flatten(2).permute(2, 1, 0)  # taps, inputs of a group, outputs
    give, packed = kernel.outputs // groups, list[Tensor]()
    for panel, start in zip(panels, starts, strict=True):
        rows, last = torch.zeros(kernel.taps, span, panel.width), panel.first + panel.outputs
        for group in range(panel.first // give, (last - 1) // give + 1):
            begin, end = max(panel.first, group * give), min(last, (group + 1) * give)
            at = group * kernel.take - start
            rows[:, at : at + kernel.take, begin - panel.first : end - panel.first] = flat[:, :, begin:end]
        packed.append(rows)
    return packed, starts
