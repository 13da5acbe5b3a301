"""Maps stacked along a new axis in front of the channels, as branches that are summed again."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import fx

from octify.graph import input_nodes
from octify.layout import Layout
from octify.rules.base import Bands, Build, Dense, Map, Op, Rule, Ties, register


class Stack(Rule):
    """`torch.stack`: one more channel axis; a band holds its channels of the first map, then of the second, …"""

    kind = "joins"

    def flow(self, op: Op, ties: Ties) -> Map:
        """Dense parts join as high channels, unless something ties them to low ones."""
        parts: list[Any] = list(op.argument(0, "tensors"))
        first = op.maps[0]
        axis: int = op.concrete(1, "dim", 0) % len(op.shape)
        if any(part.channel != (axis,) for part in op.maps):
            raise Dense("it stacks along another axis than ahead of the channels")
        count = first.shape[axis]
        ids = np.stack([part.ids if isinstance(part, Map) else ties.follow(count) for part in parts])
        spatial = tuple(where + (where >= axis) for where in first.spatial)
        return Map(op.shape, ids, (axis, axis + 1), spatial)

    def emit(self, op: Op, build: Build) -> Bands:
        """Concatenates band by band: a band's channel axes are one."""
        given: Map = op.values[op.node]
        layout = build.layout(given)
        count, axis = given.shape[given.channel[1]], given.channel[0]
        like = Map(_shape(op), given.ids[0], (axis,), tuple(where - 1 for where in given.spatial))
        high: list[fx.Node] = []
        low: list[fx.Node] = []
        for index, node in enumerate(input_nodes(op.node)):
            part: Layout = layout[index * count : (index + 1) * count]
            if part.is_dense:
                high.append(build.dense(node))
                continue
            bands = build.bands(node, like, part)
            high.append(bands.high)
            low.append(bands.low)
        joined: list[Any] = [build.function(torch.cat, tuple(parts), axis) for parts in (high, low)]
        return Bands(joined[0], joined[1], layout, given)


def _shape(op: Op) -> tuple[int, ...]:
    given: Map = op.values[op.node]
    return given.shape[: given.channel[0]] + given.shape[given.channel[1] :]


register(Stack(), functions=(torch.stack,))
