"""Probes: octave networks in which levers are pulled that do not meet, so that one run says what each of them costs.

Each layer that a lever touches is fitted to what it is given, and behind each that gives a whole map the dense
network's values go on: what a layer leaves wrong is then its lever's doing alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from octify.calibrate.apart import OUTPUTS, Apart
from octify.calibrate.data import float_tensors
from octify.calibrate.felt import Felt
from octify.calibrate.fit import fit_layer, is_octave, pair_layers
from octify.calibrate.levers import Lever, low_classes, recipe_with
from octify.calibrate.store import Store
from octify.calibrate.targets import extra_of
from octify.calibrate.walk import Chunk, Walk
from octify.flows import Flows
from octify.octbase import OctBase
from octify.plan import make_plan
from octify.rewrite import rewrite_graph


@dataclass(frozen=True)
class Stop:
    """A layer that a pulled lever touches, beside the dense network's; `whole` if it gives a dense map."""

    source: fx.Node
    node: fx.Node
    fits: bool
    whole: bool


class Probe:
    """A network with some levers pulled: by their index, how many steps."""

    def __init__(self, flows: Flows, levers: Sequence[Lever], pulled: Mapping[int, int], source: Walk) -> None:
        self.pulled = dict(pulled)
        low = low_classes([levers[index] for index in pulled], list(pulled.values()))
        chosen = flows.again(recipe_with(flows, low))
        self.converted = rewrite_graph(chosen, make_plan(chosen)).eval()
        self.stops, self._open = self._find_stops(source)

    def _find_stops(self, source: Walk) -> tuple[list[Stop], bool]:
        """The stops in the order of execution, and whether a change reaches the outputs past all of them."""
        partner = pair_layers(source.nodes, self.converted)
        found: list[Stop] = []
        changed: set[fx.Node] = set()
        for node in self.converted.graph.nodes:
            altered = any(reads in changed for reads in node.all_input_nodes)
            if not altered and not is_octave(self.converted, node):
                continue
            module = self.converted.get_submodule(str(node.target)) if node in partner else None
            octave = isinstance(module, OctBase)
            whole = module is not None and (not octave or module.out_layout.is_dense)
            if module is not None:
                first = all(stop.node.target != node.target for stop in found)
                found.append(Stop(partner[node], node, octave and first, whole))
            if not whole:
                changed.add(node)
        return found, any(node.op == "output" for node in changed)

    def fit(self, stop: Stop, source: Walk, walk: Walk, strengths: Sequence[float], rows: float) -> None:
        """Fits one layer to what it is given, and gives what is behind it the dense network's values."""
        source.run_through(stop.source)
        walk.run_before(stop.node)
        outputs = source.values[stop.source]
        if stop.fits:
            inputs, extra = walk.arguments(stop.node), extra_of(source, walk, (stop.source, stop.node), outputs)
            dice = torch.Generator().manual_seed(0)
            # A norm behind a whole map goes on with the dense network's values: it must stay as it is.
            fit_layer(self.converted, stop.node, inputs, outputs, extra, strengths, dice, rows, alone=stop.whole)
        if stop.whole:
            walk.run_through(stop.node)
            walk.put(stop.node, outputs)

    def judge(self, chunk: Chunk, felt: Felt, apart: Apart) -> dict[int, Tensor]:
        """(directions, images) a lever: how far the outputs move by what its layers leave wrong."""
        found = {index: torch.zeros((), dtype=torch.float64) for index in self.pulled}
        walk = Walk(self.converted, self.converted.graph, [chunk])
        changes: list[tuple[str, Tensor]] = []
        for stop in self.stops:
            if stop.whole:
                walk.run_through(stop.node)
                changes.append((stop.source.name, felt.change(stop.source, walk.values[stop.node][0])))
                walk.put(stop.node, [felt.values[stop.source]])
        if self._open:
            changes.append((OUTPUTS, felt.output_change(float_tensors(walk.run()))))
        for name, change in changes:
            mine = apart.meets[name].intersection(self.pulled)
            for index in mine:  # where several meet, each answers for an equal part of the squares
                found[index] = found[index] + change / len(mine) ** 0.5
        return found


def fit_probes(source: Walk, probes: Sequence[Probe], strengths: Sequence[float], rows: float) -> list[Any]:
    """Fits the layers of all probes beside one run of the dense network: what that gives."""
    store = Store()
    walks = [Walk(probe.converted, probe.converted.graph, source.chunks, store) for probe in probes]
    place = {node: index for index, node in enumerate(source.nodes)}
    work = [(place[stop.source], number, stop) for number, probe in enumerate(probes) for stop in probe.stops]
    for _, number, stop in sorted(work, key=lambda item: item[:2]):
        probes[number].fit(stop, source, walks[number], strengths, rows)
    return source.run()
