"""A layer's bands beside what they should be."""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor

from octify.bands import take
from octify.layout import Layout
from octify.resample import pool_low


def band_pairs(layout: Layout, output: Any, target: Tensor, spatial: int) -> list[tuple[str, Tensor, Tensor]]:
    """(band, given, wanted) for each band that a layer gives; `target` is the dense layer's output."""
    if layout.is_dense:
        return [("high", cast(Tensor, output), target)]
    high, low = cast("tuple[Tensor, Tensor]", output)
    pairs = [("low", low, pool_low(take(target, 1, layout.low_index), spatial))]
    return [("high", high, take(target, 1, layout.high_index)), *pairs] if layout.high else pairs


def relative_error(given: Tensor, wanted: Tensor) -> Tensor:
    """The squared error as a share of the targets' variance over images."""
    spread = (wanted - wanted.mean(0)).square().mean().clamp_min(1e-12)
    return (given - wanted).square().mean() / spread
