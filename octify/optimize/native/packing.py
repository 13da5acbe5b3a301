"""Weights as the kernels read them: panels of output channels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

SMALL_GROUPS = (1, 2, 4)  # channels in the groups that a vector holds whole, and that pay


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
