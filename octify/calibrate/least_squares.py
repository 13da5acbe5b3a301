"""One least-squares problem: rows from calibration images, the ridge that held-out images choose, the weights placed.

What has more unknowns than a Gram matrix may hold is solved block by block, each block to what the others leave.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# (tensor and array methods that come without complete types)

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from octify.calibrate.problems import Problem
from octify.calibrate.solve import Sums, choose
from octify.errors import CalibrationError

ROWS = 16_384  # rows a problem at least samples, if there are so many
ROWS_PER_UNKNOWN = 8
NUMBERS = 1 << 25  # that a problem's rows hold over all groups: depthwise layers have many groups of few unknowns
MOST_NUMBERS = 6_144**2  # of a Gram matrix: 300 MB
HELD_OUT = 5  # every fifth image chooses the ridge


@dataclass(frozen=True)
class Fitted:
    """How well one band of one layer gives what it is fitted to: mean squared errors as shares of the target's.

    In front of a sum that is also what the other summand lacks, most of which may be out of the layer's reach.
    """

    layer: str
    band: str
    before: float
    after: float
    strength: float | None
    note: str = ""


@dataclass(frozen=True)
class _Data:
    """A layer's inputs and what it shall give, chunk by chunk; the same positions are sampled in every pass."""

    problem: Problem
    inputs: Sequence[tuple[Any, ...]]
    targets: Sequence[Tensor]
    rows: float  # of those that a fit samples
    images: int
    extra: Callable[[int], Tensor | None] | None  # what is added to a chunk's targets
    free: int  # 1 if a column of ones stands behind the unknowns
    seed: int

    def sums(self, weight: Tensor, columns: Tensor) -> tuple[Sums, Sums, float]:
        """Sums for the unknowns `columns`, the rest as `weight` has them, and the targets' energy.

        The first are over images that fit, the second over those held out.
        """
        dice = torch.Generator().manual_seed(self.seed)
        count = math.ceil(self.rows * rows_for(weight.shape[0], len(columns)) / self.images)
        both = [Sums.zeros(weight.shape[0], len(columns), weight.shape[2], weight.device) for _ in range(2)]
        others = weight.clone()
        others[:, columns] = 0
        whole = len(columns) == weight.shape[1]
        seen, energy = 0, 0.0
        for index, (given, target) in enumerate(zip(self.inputs, self.targets, strict=True)):
            more = self.extra(index) if self.extra is not None else None
            sampled = self.problem.rows(given, target, count, dice, more)
            x, y = sampled.x, sampled.y
            energy += float(y.double().square().sum())
            if self.free:
                x = torch.cat([x, x.new_ones(*x.shape[:3], 1)], 3)
            if not whole:
                y = y - torch.einsum("npgu,guo->npgo", x, others.to(x))
                x = x[..., columns]
            held = torch.arange(seen, seen + len(target)) % HELD_OUT == HELD_OUT - 1
            seen += len(target)
            for part, chosen in zip(both, (~held, held), strict=True):
                part.add(x[chosen].flatten(0, 1), y[chosen].flatten(0, 1))
        return both[0], both[1], energy


def rows_for(groups: int, unknowns: int) -> int:
    """How many rows a problem samples: enough for its unknowns, and not more numbers than help."""
    return max(ROWS_PER_UNKNOWN * unknowns, min(ROWS, NUMBERS // (groups * unknowns)))


def fit_problem(
    problem: Problem,
    norm: nn.Module | None,
    name: str,
    inputs: Sequence[tuple[Any, ...]],
    targets: Sequence[Tensor],
    strengths: Sequence[float],
    dice: torch.Generator,
    rows: float = 1.0,
    extra: Callable[[int], Tensor | None] | None = None,
) -> Fitted:
    """Fits one band of a layer in place; `norm` is a batch norm behind it that can take a bias into its means.

    `rows` is the share of the usual number of rows that is sampled; `extra` is what the band shall give beside the
    dense layer's output `targets`, chunk by chunk.

    Raises:
        CalibrationError: the layer's activations are not finite.
    """
    prior = problem.weight()
    free = int(problem.bias is not None or norm is not None)
    if free:
        bias = torch.zeros(prior.shape[0], prior.shape[2]) if problem.bias is None else problem.bias.detach()
        prior = torch.cat([prior, bias.double().reshape(prior.shape[0], 1, -1).to(prior)], 1)
    seed = int(torch.randint(2**31, (1,), generator=dice))
    data = _Data(problem, inputs, targets, rows, sum(len(target) for target in targets), extra, free, seed)
    weight, strength = prior.clone(), None
    errors: list[float] = []
    energy = 0.0
    for columns in blocks_of(prior.shape[0], prior.shape[1], free):
        fit, held, energy = data.sums(weight, columns)
        total = fit + held
        if not bool(total.xx.isfinite().all() and total.yy.isfinite().all()):
            raise CalibrationError(
                f"{name}: its activations on the calibration images are not finite (NaN or infinite)"
            )
        now = weight[:, columns]
        errors.append(total.error(now))
        weight[:, columns], strength = choose(fit, held, now, free, strengths)
        errors.append(total.error(weight[:, columns]))
    _place(problem, norm, weight, free)
    energy = max(energy, 1e-30)
    return Fitted(name, problem.band, errors[0] / energy, errors[-1] / energy, strength)


def blocks_of(groups: int, unknowns: int, free: int) -> list[Tensor]:
    """Which unknowns are solved together: all of them if their Gram matrices stay within bounds; the bias in each."""
    widest = max(1, int((MOST_NUMBERS / groups) ** 0.5) - free)
    count = -(-(unknowns - free) // widest)
    last = torch.arange(unknowns - free, unknowns)
    return [torch.cat([part, last]) for part in torch.arange(unknowns - free).tensor_split(max(1, count))]


def _place(problem: Problem, norm: nn.Module | None, weight: Tensor, free: int) -> None:
    if not free:
        return problem.place(weight)
    problem.place(weight[:, :-1])
    bias = weight[:, -1].reshape(-1)
    with torch.no_grad():
        if problem.bias is not None:
            problem.bias.copy_(bias.to(problem.bias.dtype))
        elif norm is not None:
            mean = cast(Tensor, norm.running_mean)
            mean.sub_(bias.to(mean.dtype))
    return None
