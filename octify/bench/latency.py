"""What layers take on this machine, from the networks that `--only-faster` measures: a table for the calibration."""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# (array methods that come without complete types)

from __future__ import annotations

import statistics
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import nn

from octify.bench.bundles import BundleTiming, Search, look_of, median_ms
from octify.bench.clock import Progress
from octify.bench.runners import Settings, threads
from octify.calibrate.costs import CostModel
from octify.calibrate.latency import LatencyTable
from octify.calibrate.levers import find_levers
from octify.conversion import Conversion
from octify.convert import Example
from octify.cost import source_cost
from octify.errors import BackendError
from octify.flows import Flows
from octify.recipe import Recipe

TRUST = 0.05  # in the mean over all layers, against what was measured of some


def measure_latency(
    model: nn.Module,
    recipe: Recipe,
    example_inputs: Example = None,
    settings: Settings | None = None,
    rounds: int = 10,
    progress: Progress | None = None,
) -> LatencyTable:
    """The table by which a calibration chooses alphas for a latency: `octify.convert(..., target=, latency=)`.

    Networks with and without each bundle octave, at the recipe's alpha, say what a multiply-add less saves in layers
    that look the same.

    Raises:
        BackendError: the backend is not installed or cannot run the network, or nothing gets faster.
        ConversionError: the recipe converts nothing, or the model does not trace as a whole.
    """
    chosen = (settings or Settings()).checked()
    reading = Conversion.read(model, recipe, example_inputs)
    if not reading.whole:
        raise BackendError(f"{type(model).__name__} does not trace as a whole: its latency is not measured")
    with threads(chosen.threads):
        search = Search(reading, chosen, rounds)
        rows, _, left = search.sift(progress)
        dense = search.runner(None)
        dense_ms, octave_ms = map(median_ms, search.times([dense, left]))
    if not octave_ms < dense_ms or not any(row.octave for row in rows):
        raise BackendError(f"nothing gets faster here: dense {dense_ms:.2f} ms, octave {octave_ms:.2f} ms")
    losers = [name for row in rows if not row.octave for name in row.convolutions]
    layers = _Layers.of(reading.flows)
    pairs, differences = _pairs(rows, losers, dense_ms - octave_ms)
    saves = layers.rates([layers.saved(more) - layers.saved(less) for more, less in pairs], differences)

    def share(recipe: Recipe) -> float:
        with threads(chosen.threads):
            times = search.times([dense, search.runner_of(recipe)])
        return statistics.median(octave / plain for plain, octave in zip(*times, strict=True))

    return LatencyTable(search.with_dense(losers), dense_ms, saves, share)


def _pairs(
    rows: Sequence[BundleTiming], losers: Sequence[str], saved_ms: float
) -> tuple[list[tuple[list[str], list[str]]], list[float]]:
    """Networks, by what is dense in them, of which the first was so many ms faster than the second."""
    dense: list[str] = []
    pairs: list[tuple[list[str], list[str]]] = []
    for row in rows:
        without = [*dense, *row.convolutions]
        pairs.append((dense, without))
        dense = dense if row.octave else without
    everything = [name for row in rows for name in row.convolutions]
    return [*pairs, (list(losers), everything)], [*(row.dense_ms - row.octave_ms for row in rows), saved_ms]


@dataclass(frozen=True)
class _Layers:
    """The layers' multiply-adds under a recipe, and which look the same."""

    flows: Flows
    cost: CostModel
    looks: NDArray[np.int64]

    @classmethod
    def of(cls, flows: Flows) -> _Layers:
        macs = source_cost(flows.trace).gmacs * 1e9
        cost = CostModel(flows, find_levers(flows, {}), macs)
        names = [look_of(flows, path) for path in cost.layers]
        order = {look: index for index, look in enumerate(dict.fromkeys(names))}
        return cls(flows, cost, np.array([order[look] for look in names]))

    def saved(self, dense: Collection[str]) -> NDArray[np.float64]:
        """Multiply-adds less than dense, look by look, of the recipe's network with some convolutions dense."""
        levers = find_levers(self.flows, {})
        left = set(dense)
        counts = [0 if left & set(each.writers) else int(each.alpha * len(each.steps) + 1e-9) for each in levers]
        return np.bincount(self.looks, self.cost.saved(np.array(counts, dtype=np.float64))).astype(np.float64)

    def rates(self, saved: Sequence[NDArray[np.float64]], ms: Sequence[float]) -> dict[str, float]:
        """Least squares for the ms that a multiply-add saves in layers of each look, drawn towards their mean."""
        total = np.maximum(saved[-1], 0)
        mean = ms[-1] / total.sum()
        prior = np.sqrt(TRUST) * np.diag(total)
        left = np.vstack([np.array(saved), prior])
        right = np.concatenate([np.array(ms), prior @ np.full(len(total), mean)])
        found = np.maximum(np.linalg.lstsq(left, right, rcond=None)[0], 0)
        return dict(zip(self.cost.layers, found[self.looks].tolist(), strict=True))
