"""Ridge regression on Gram matrices: sums over rows in float64, and solutions whose strength held-out rows choose."""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# (tensor and array methods that come without complete types)

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

ROUNDING = 1e-12  # of the targets' energy
BLOCKS, NARROWEST = 6, 128  # a Gram matrix is computed in so many blocks, of at least so many unknowns
STRENGTHS = (1e-3, 1e-2, 1e-1, 1.0)  # of the ridge, as shares of the Gram matrix's mean diagonal


@dataclass
class Sums:
    """What least squares needs of its rows: xx (G, U, U), xy (G, U, O), yy (G, O), all float64."""

    xx: Tensor
    xy: Tensor
    yy: Tensor

    @classmethod
    def zeros(cls, groups: int, unknowns: int, outputs: int, device: torch.device) -> Sums:
        """Sums of no rows."""
        sizes = ((groups, unknowns, unknowns), (groups, unknowns, outputs), (groups, outputs))
        return cls(*(torch.zeros(size, dtype=torch.float64, device=device) for size in sizes))

    def add(self, x: Tensor, y: Tensor) -> None:
        """Adds rows x (R, G, U) and y (R, G, O)."""
        x, y = x.double().transpose(0, 1), y.double().transpose(0, 1)
        # A Gram matrix is symmetric: only what lies right of each block's diagonal is computed.
        unknowns = x.shape[2]
        width = max(NARROWEST, -(-unknowns // BLOCKS))
        for start in range(0, unknowns, width):
            stop = start + width
            rows = x[:, :, start:stop].mT @ x[:, :, start:]
            self.xx[:, start:stop, start:] += rows
            self.xx[:, stop:, start:stop] += rows[:, :, width:].mT
        self.xy += x.mT @ y
        self.yy += y.square().sum(1)

    def __add__(self, other: Sums) -> Sums:
        return Sums(self.xx + other.xx, self.xy + other.xy, self.yy + other.yy)

    def error(self, weight: Tensor) -> float:
        """The squared error of a weight (G, U, O), over all rows."""
        quadratic = (weight * (self.xx @ weight)).sum() - 2 * (weight * self.xy).sum() + self.yy.sum()
        return max(float(quadratic), 0.0)

    def residual_of(self, weight: Tensor) -> Tensor:
        """The rows' unknowns against what a weight leaves of their targets."""
        return self.xy - self.xx @ weight

    @property
    def energy(self) -> float:
        """The squared sum of the targets."""
        return float(self.yy.sum())


def solve(sums: Sums, prior: Tensor, strength: float, free: int, residual: Tensor | None = None) -> Tensor:
    """The weight of least error plus `strength` times its distance from the prior; the last `free` unknowns are free.

    The distance counts in units of the mean diagonal of each group's Gram matrix. `residual` is `residual_of(prior)`,
    if it is known.
    """
    unknowns = sums.xx.shape[-1] - free
    diagonal = sums.xx.diagonal(dim1=-2, dim2=-1)
    mean = diagonal[:, :unknowns].mean(1).clamp_min(1e-30)
    weights = torch.full_like(diagonal, strength) * mean[:, None]
    if free:
        weights[:, unknowns:] = diagonal[:, unknowns:] * 1e-9
    matrix = sums.xx.clone()
    matrix.diagonal(dim1=-2, dim2=-1).add_(weights)
    residual = sums.residual_of(prior) if residual is None else residual
    factor, info = torch.linalg.cholesky_ex(matrix)
    if bool((info != 0).any()):
        return prior + torch.linalg.lstsq(matrix, residual).solution
    return prior + torch.cholesky_solve(residual, factor)


def choose(fit: Sums, held: Sums, prior: Tensor, free: int, strengths: Sequence[float]) -> tuple[Tensor, float | None]:
    """The solution on all rows at the strength that held-out rows like best; the prior itself (None) if none helps.

    Of a single strength the solution that held-out rows judged is taken as it is: trials are many.
    """
    residual = fit.residual_of(prior)
    weights = {strength: solve(fit, prior, strength, free, residual) for strength in strengths}
    errors = {strength: held.error(weight) for strength, weight in weights.items()}
    best = min(errors, key=lambda strength: errors[strength])
    # What is less than rounding is no gain.
    if not errors[best] < held.error(prior) - ROUNDING * held.energy:
        return prior, None
    return (weights[best] if len(strengths) == 1 else solve(fit + held, prior, best, free)), best
