"""How far each octave layer is from the dense one, where it counts: behind the sum and the activation that follow it.

A fitted layer leaves the dense layer's output on purpose: it makes up for what a shortcut lacks, and its low band aims
at the mean behind the activation. What either comes to is seen where both have been applied.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, fx, nn

from octify.calibrate.bands import band_pairs, relative_error
from octify.calibrate.fit import pair_layers
from octify.calibrate.walk import Chunk, Walk, walk_dense
from octify.calibrate.ways import find_way
from octify.graph import sharing_copy
from octify.layers import OctConv
from octify.module import OctaveModule
from octify.trace import Trace, trace_model


@dataclass(frozen=True)
class LayerError:
    """A layer's squared errors against the dense network, as shares of its variance; None where there is no such band.

    They are measured behind the sum and the activation that the layer's output meets, if it meets them alone.
    """

    layer: str
    high: float | None
    low: float | None


@dataclass(frozen=True)
class _Place:
    """Where a layer is compared: a node of the dense network, and one of the octave network for each of its bands."""

    layer: OctConv
    dense: fx.Node
    bands: Mapping[str, fx.Node]


def layer_errors(source: nn.Module, octave: OctaveModule, chunks: Sequence[Chunk]) -> list[LayerError]:
    """The mean over chunks of images, in the order of execution; both networks must be in eval mode.

    Raises:
        TraceError: the source cannot be traced.
    """
    trace = trace_model(source, chunks[0])
    still = Trace(sharing_copy(trace.model).eval(), trace.graph, trace.inputs, trace.how, trace.two_modes, trace.notes)
    walk = walk_dense(still, [])
    places = _find_places(walk, octave)
    sums: dict[tuple[str, str], float] = {}
    for chunk in chunks:
        dense = _Seen(walk.root, walk.graph, {place.dense for place in places.values()}).see(chunk)
        given = _Seen(octave, octave.graph, {node for place in places.values() for node in place.bands.values()})
        found = given.see(chunk)
        for name, place in places.items():
            bands = [found[place.bands[band]] for band in place.bands]
            output = bands[0] if len(bands) == 1 else tuple(bands)
            pairs = band_pairs(place.layer.out_layout, output, dense[place.dense], place.layer.spatial)
            for band, mine, wanted in pairs:
                sums[name, band] = sums.get((name, band), 0.0) + float(relative_error(mine, wanted)) / len(chunks)
    return [LayerError(name, sums.get((name, "high")), sums.get((name, "low"))) for name in places]


def _find_places(source: Walk, octave: OctaveModule) -> dict[str, _Place]:
    """By a layer's path: where its first call is compared."""
    found: dict[str, _Place] = {}
    for node, dense in pair_layers(source.nodes, octave).items():
        layer = octave.get_submodule(str(node.target))
        if isinstance(layer, OctConv) and str(node.target) not in found:
            found[str(node.target)] = _place(source, octave, layer, dense, node)
    return found


def _place(source: Walk, octave: OctaveModule, layer: OctConv, dense: fx.Node, node: fx.Node) -> _Place:
    bands = {"high": node}
    if not layer.out_layout.is_dense:
        bands = {("high", "low")[cast(int, item.args[1])]: item for item in node.users}
    ends = {band: find_way(octave, value) for band, value in bands.items()}
    way = find_way(source.root, dense)
    alike = all(
        (end.other is None, end.activation is None) == (way.other is None, way.activation is None)
        for end in ends.values()
    )
    if alike and way.keeps_axes:
        return _Place(layer, way.end, {band: end.end for band, end in ends.items()})
    return _Place(layer, dense, bands)


class _Seen(fx.Interpreter):
    """Runs a network and keeps copies of some nodes' values."""

    def __init__(self, root: nn.Module, graph: fx.Graph, nodes: set[fx.Node]) -> None:
        super().__init__(root, graph=graph)
        self._nodes = nodes
        self._seen: dict[fx.Node, Tensor] = {}

    def see(self, chunk: Chunk) -> dict[fx.Node, Tensor]:
        """The values for some images."""
        self._seen = {}
        with torch.no_grad():
            self.run(*(value.clone() for value in chunk))
        return self._seen

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n in self._nodes:
            self._seen[n] = value.clone()  # whoever reads it may write into it
        return value
