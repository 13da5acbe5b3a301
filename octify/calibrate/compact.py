"""CompConv in the calibration: its units by least squares, and what the batch norm behind it makes of its copies."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from octify.calibrate.walk import Values
from octify.compconv import CompConv
from octify.compweights import fit
from octify.errors import CalibrationError

RIDGE = 0.01
ROWS = 16_384
ROWS_PER_UNKNOWN = 4
LEAST, MOST = 1e-3, 1e3  # how far a norm's scale may move


def fit_compact(
    comp: CompConv, inputs: Sequence[Tensor], targets: Sequence[Tensor], norm: nn.Module | None, ridge: float, seed: int
) -> tuple[float, float]:
    """Fits a CompConv to a dense layer's outputs, chunk by chunk as they come, and the norm behind it to its moments.

    Returns:
        The mean squared errors of its outputs before and after, as shares of the targets'; the copies count in both.

    Raises:
        CalibrationError: activations are not finite.
    """
    pairs: Values[tuple[Tensor, Tensor]] = Values(len(inputs), lambda index: (inputs[index], targets[index]))
    before = _error(comp, pairs)
    unknowns = cast(Tensor, comp.units[0].weight)[0].numel()
    fit(comp, pairs, ridge=ridge, positions=max(ROWS, ROWS_PER_UNKNOWN * unknowns), seed=seed)
    after = _error(comp, pairs)
    if not after < float("inf"):
        raise CalibrationError("its activations on the calibration images are not finite (NaN or infinite)")
    if norm is not None:
        match_moments(comp, pairs, norm)
    return before, after


@torch.no_grad()
def _error(comp: CompConv, pairs: Sequence[tuple[Tensor, Tensor]]) -> float:
    wrong = sum(float((comp(x) - y).double().square().sum()) for x, y in pairs)
    return wrong / max(sum(float(y.double().square().sum()) for _, y in pairs), 1e-30)


@torch.no_grad()
def match_moments(comp: CompConv, pairs: Sequence[tuple[Tensor, Tensor]], norm: nn.Module) -> None:
    """Moves a batch norm's statistics so that behind it each channel has the mean and variance of the dense network's.

    Half of a CompConv's channels are copies, which no weight of its own brings near the channels that they stand for.
    """
    mean, variance = _moments(comp(x) for x, _ in pairs)
    wanted_mean, wanted_variance = _moments(y for _, y in pairs)
    tiny = torch.finfo(torch.float32).tiny
    alive = variance > tiny
    ratio = torch.where(alive, (wanted_variance / variance.clamp_min(tiny)).sqrt(), 1.0).clamp(LEAST, MOST)
    stored, spread = cast(Tensor, norm.running_mean), cast(Tensor, norm.running_var)
    eps = float(cast(float, norm.eps))
    scaled = (spread.double() + eps) / ratio.square() - eps
    stored.copy_(mean - (wanted_mean - stored.double()) / ratio)
    spread.copy_(scaled.clamp_min(0.0))


def _moments(maps: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
    """Mean and variance a channel, in float64."""
    count, totals, squares = 0, torch.zeros(()), torch.zeros(())
    for found in maps:
        rows = found.double().movedim(1, 0).flatten(1)
        count += rows.shape[1]
        totals, squares = totals.to(rows) + rows.sum(1), squares.to(rows) + rows.square().sum(1)
    mean = totals / count
    return mean, (squares / count - mean.square()).clamp_min(0.0)
