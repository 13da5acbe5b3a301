"""A network's latency on one machine, as far as saved multiply-adds tell, in the place of their number."""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# (array methods that come without complete types)

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from octify.calibrate.costs import CostModel, Counts
from octify.calibrate.levers import Lever
from octify.errors import CalibrationError
from octify.flows import Flows
from octify.recipe import Recipe

TRIES = 4
NOISE = 0.01  # by which a measurement may miss the target
SPARE = 0.03  # faster than the target by more, a choice gives accuracy away


@dataclass(frozen=True)
class LatencyTable:
    """What was measured of a network: the dense one's ms, and those that a saved multiply-add saves, by layer.

    `recipe` leaves dense what does not get faster; it is the one to convert by. `share` measures the latency under
    another recipe, against dense.
    """

    recipe: Recipe
    dense_ms: float
    saves: Mapping[str, float]
    share: Callable[[Recipe], float] = field(repr=False)


class LatencyModel(CostModel):
    """The share of the dense network's latency that is left."""

    unit = "latency"

    def __init__(self, flows: Flows, levers: Sequence[Lever], dense_macs: float, table: LatencyTable) -> None:
        super().__init__(flows, levers, dense_macs)
        self.rates = np.array([table.saves.get(path, 0.0) for path in self.layers]) / table.dense_ms

    def ratio(self, counts: Counts) -> NDArray[np.float64]:
        """Latency against dense, for settings (..., levers) in steps."""
        return 1 - (self.saved(counts) * self.rates).sum(-1)


def in_time(
    table: LatencyTable,
    target: float,
    propose: Callable[[float], list[list[int]]],
    recipe_of: Callable[[list[int]], Recipe],
) -> dict[tuple[int, ...], float]:
    """Counts that are measured to meet a target, and the share of the dense latency that each takes.

    `propose` gives counts for a target by the model; what they really take moves the target that it is asked for.

    Raises:
        CalibrationError: none does; the message says how near the nearest comes.
    """
    aim, met, nearest = target, {}, math.inf
    for _ in range(TRIES):
        try:
            proposed = propose(aim)
        except CalibrationError:
            break
        shares = {tuple(counts): table.share(recipe_of(counts)) for counts in proposed}
        nearest = min(nearest, *shares.values())
        met = {counts: share for counts, share in shares.items() if share <= target * (1 + NOISE)} or met
        if met and max(met.values()) > target * (1 - SPARE):
            break
        saved = max(1 - shares[tuple(proposed[0])], (1 - target) / 4)
        aim = 1 - (1 - aim) * (1 - target) / saved
    if not met:
        raise CalibrationError(
            f"{target * table.dense_ms:.2f} ms are out of reach: the nearest takes {nearest * table.dense_ms:.2f} ms, "
            f"dense {table.dense_ms:.2f} ms"
        )
    return met
