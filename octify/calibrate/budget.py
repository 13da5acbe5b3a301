"""How many channels of which bundle go low, so that a cost is met with the smallest loss."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from octify.calibrate.costs import CostModel
from octify.calibrate.levers import Lever
from octify.errors import CalibrationError

MOST = 0.875  # of a lever: all-low layers leave nothing that carries detail
PARTS = 16  # a lever is pulled in about so many pulls


@dataclass(frozen=True)
class Curve:
    """What a lever costs in accuracy: the loss at some numbers of steps (more than none, rising)."""

    steps: tuple[int, ...]
    losses: tuple[float, ...]

    def at(self, count: float) -> float:
        """The loss at a number of steps: between and beyond the measured ones a power of that number."""
        if count <= 0:
            return 0.0
        if len(self.steps) == 1:
            return self.losses[0] * (count / self.steps[0]) ** 2
        last = len(self.steps) - 1
        place = min(max(int(np.searchsorted(self.steps, count)), 1), last)
        (s0, s1), (l0, l1) = self.steps[place - 1 : place + 1], self.losses[place - 1 : place + 1]
        l0, l1 = max(l0, 1e-9), max(l1, 1e-9)
        power = max(math.log(l1 / l0) / math.log(s1 / s0), 1.0 if count < s0 else 0.0)
        return l0 * (count / s0) ** power


def uniform_counts(levers: Sequence[Lever], cost: CostModel, target: float) -> list[int]:
    """One alpha for all levers, as large as the target needs."""
    lengths = np.array([len(lever.steps) for lever in levers], dtype=np.float64)
    low, high = 0.0, 1.0
    for _ in range(30):
        middle = (low + high) / 2
        if float(cost.ratio(np.floor(middle * lengths))) > target:
            low = middle
        else:
            high = middle
    counts = np.floor(high * lengths)
    for single in np.eye(len(levers)):  # where all levers have a step at the same alpha, not all need it
        if (counts >= single).all() and float(cost.ratio(counts - single)) <= target:
            counts = counts - single
    return [int(count) for count in counts]


def refuse_unreachable(levers: Sequence[Lever], cost: CostModel, target: float) -> None:
    """Says before anything is measured what no choice reaches.

    Raises:
        CalibrationError: the target cannot be met.
    """
    least = float(cost.ratio(_most(levers)))
    if least > target:
        raise CalibrationError(
            f"target {target:g} is out of reach: with {MOST:.0%} of every bundle low, {least:.3f} of the {cost.unit} "
            "is left; choose a higher target, or a recipe that splits more layers"
        )


def _most(levers: Sequence[Lever]) -> NDArray[np.float64]:
    return np.array([max(1, int(MOST * len(lever.steps))) for lever in levers], dtype=np.float64)


def allocate(
    levers: Sequence[Lever],
    curves: Sequence[Curve],
    cost: CostModel,
    target: float,
    start: Sequence[int] | None = None,
) -> list[int]:
    """Pulls, again and again, the lever that saves most per loss, until the target is met.

    `start` is where the levers stand at first, instead of at none.

    Raises:
        CalibrationError: the target cannot be met.
    """
    refuse_unreachable(levers, cost, target)
    most = _most(levers)
    pulls = np.maximum(1, np.array([len(lever.steps) for lever in levers]) // PARTS).astype(np.float64)
    counts = np.zeros(len(levers)) if start is None else np.minimum(np.array(start, dtype=np.float64), most)
    while float(cost.ratio(counts)) > target:
        counts = _pull(counts, np.minimum(counts + pulls, most), curves, cost, target)
    return [int(count) for count in _give_back(counts, curves, cost, target)]


def _pull(
    counts: NDArray[np.float64], wanted: NDArray[np.float64], curves: Sequence[Curve], cost: CostModel, target: float
) -> NDArray[np.float64]:
    tried = counts + np.eye(len(counts)) * (wanted - counts)
    now = float(cost.ratio(counts))
    ratios = cost.ratio(tried)
    saved = np.minimum(now - ratios, now - target)  # what goes beyond the target is worth nothing
    lost = np.array([curve.at(w) - curve.at(c) for curve, w, c in zip(curves, wanted, counts, strict=True)])
    worth = np.where(wanted > counts, saved / np.maximum(lost, 1e-12), -np.inf)
    return tried[int(np.argmax(worth))]


def _give_back(
    counts: NDArray[np.float64], curves: Sequence[Curve], cost: CostModel, target: float
) -> NDArray[np.float64]:
    """Takes single steps back, the most harmful first, as long as the target still holds."""
    while True:
        tried = counts - np.eye(len(counts))
        legal = (counts > 0) & (cost.ratio(np.maximum(tried, 0)) <= target)
        if not legal.any():
            return counts
        gained = np.array([curve.at(c) - curve.at(c - 1) for curve, c in zip(curves, counts, strict=True)])
        counts = tried[int(np.argmax(np.where(legal, gained, -np.inf)))]
