"""Linear layers on channels-last maps: 1x1 convolutions that choose their layout."""

from __future__ import annotations

from typing import Any, cast

from torch import nn

from octify.graph import input_nodes
from octify.layout import Layout
from octify.linear import OctLinear
from octify.rules.base import Bands, Build, Map, Op, Rule, Ties, register


class Linear(Rule):
    """`nn.Linear` over the channels of a map that lie last; on tokens and vectors it is none of this rule's."""

    kind = "chooses"

    def applies(self, op: Op) -> bool:
        """Whether the input is a map with its channels last."""
        source = op.argument(0, "input")
        return isinstance(source, Map) and source.channel == (len(source.shape) - 1,)

    def flow(self, op: Op, ties: Ties) -> Map:
        """Reads any layout; gives new channels."""
        source: Map = op.argument(0, "input")
        ties.read(source.ids)
        count = op.shape[-1]
        if op.too_small(source.size):
            why = f"its map of {'x'.join(map(str, source.size))} is less than twice min_size"
            return source.with_ids(ties.high(count, why), op.shape)
        return source.with_ids(ties.free(count), op.shape)

    def options(self, op: Op, reads: list[Layout], gives: list[Layout]) -> tuple[dict[str, Any], list[str]]:
        """Which paths there are, if not all; folded kernels and the paper's are the same here."""
        paths = op.settings.paths
        return ({"paths": list(paths)} if len(paths) < 4 else {}), []

    def emit(self, op: Op, build: Build) -> Any:
        """One octave linear layer under the source's name."""
        source = build.value(input_nodes(op.node)[0])
        linear = cast(nn.Linear, op.module)
        given: Map = op.values[op.node]
        gives = build.layout(given)
        reads = source.layout if isinstance(source, Bands) else Layout.dense(linear.in_features)
        options, spatial = build.options(), len(given.spatial)

        def make() -> nn.Module:
            return OctLinear.from_linear(linear, reads, gives, spatial=spatial, **options)

        arguments = (source.high, source.low) if isinstance(source, Bands) else (source,)
        node = build.module(make, *arguments)
        return node if gives.is_dense else Bands(*build.pair(node), gives, given)


register(Linear(), modules=(nn.Linear,))
