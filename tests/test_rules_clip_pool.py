"""Pooling a clip over time as well as over both bands."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import octify
from octify.layers import Merge
from octify.recipe import Recipe

POOLS: list[Callable[[Tensor], Tensor]] = [
    lambda x: x.mean((2, 3, 4)),
    lambda x: x.mean((-2, -1)),
    lambda x: torch.amax(x, (2, 3, 4), True),
    lambda x: F.adaptive_avg_pool3d(x, 1),
    lambda x: F.adaptive_max_pool3d(x, (1, 1, 1)),
]


class Clip(nn.Module):
    """Two convolutions, and a pooling that reads what the second one gives."""

    def __init__(self, pool: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.stem, self.conv, self.pool = nn.Conv3d(3, 8, 1), nn.Conv3d(8, 8, 1), pool

    def forward(self, x: Tensor) -> Tensor:
        return self.pool(self.conv(self.stem(x)))


@pytest.mark.parametrize("pool", POOLS)
def test_both_bands_are_pooled_over_time_without_a_merge(pool: Callable[[Tensor], Tensor]) -> None:
    torch.manual_seed(0)
    model = Clip(pool).eval()
    octave = octify.convert(model, recipe=Recipe.uniform(0.5), example_inputs=(1, 3, 4, 17, 17))
    assert not any(isinstance(module, Merge) for module in octave.modules())
    frames = torch.randn(1, 3, 4, 1, 1).expand(1, 3, 4, 17, 17)  # each constant, each another
    torch.testing.assert_close(octave(frames), model(frames), rtol=1e-5, atol=1e-6)
