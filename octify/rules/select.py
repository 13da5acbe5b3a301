"""Some channels of a split value, in any order: what slices, shuffles and permutations emit."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import fx

from octify.layout import Layout, run_of
from octify.ops import take_channels
from octify.rules.base import Bands, Build, Ids, Map


def select(build: Build, source: Bands, index: Ids, given: Map) -> Any:
    """Some of a value's channels, by position in its flattened order, in any order: bands, or the high band alone."""
    layout = Layout.of(source.layout.bits[int(i)] for i in index)
    where = np.asarray(source.layout.order)[index]
    axis = source.map.channel[0]
    bits = np.asarray(layout.bits, dtype=bool)
    high = _take(build, source.high, where[~bits], source.layout.high, axis)
    if layout.is_dense:
        return high
    low = _take(build, source.low, where[bits] - source.layout.high, source.layout.low, axis)
    return Bands(high, low, layout, given)


def _take(build: Build, band: fx.Node, index: Ids, count: int, axis: int) -> fx.Node:
    if index.tolist() == list(range(count)):
        return band
    return build.function(take_channels, band, run_of(index.tolist()), axis)
