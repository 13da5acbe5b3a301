"""What a converted network is expected to keep on new images, told by few images that nothing was fitted to.

Few images make few decisions: of three held back one or none is lost. So what the octave network gets wrong on them is
laid on every image whose margins are known, rank by rank of the dense network's classes, and decisions are counted
there: each error meets each margin.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# (tensor and array methods that come without complete types)

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from octify.calibrate.data import float_tensors, output_loss
from octify.calibrate.verdict import is_decision, pairs_of

POOR_SHARE, POOR_LOSS = 0.9, 0.1
RANKS = 64  # classes that a margin could be lost to: of a thousand nearly all lie far behind
ROWS = 2000  # outputs that are compared


@dataclass(frozen=True)
class Expected:
    """What is expected on new images: the loss, and the share of decisions that is the dense network's.

    `low` and `high` bound the share: two standard errors each way. All three are None where outputs are no decisions.
    """

    loss: float
    judges: int
    share: float | None = None
    low: float | None = None
    high: float | None = None

    def __str__(self) -> str:
        loss = f"loss {self.loss:.4f}"
        if self.share is None or self.low is None or self.high is None:
            return loss
        return f"{self.share:.1%} of decisions kept ({self.low:.0%} to {self.high:.0%}), {loss}"

    @property
    def is_poor(self) -> bool:
        """Whether even the best that may be expected is little."""
        return self.loss > POOR_LOSS if self.high is None else self.high < POOR_SHARE


def expect(known: Sequence[Any], dense: Sequence[Any], octave: Sequence[Any]) -> Expected:
    """What both networks' outputs for the judging images say; `known` is what the dense one gives for more images."""
    loss, judges = output_loss(dense, octave), sum(len(float_tensors(chunk)[0]) for chunk in dense)
    pairs = [(d.double(), o.double()) for d, o in pairs_of(dense, octave) if is_decision(d)]
    if not pairs:
        return Expected(loss, judges)
    wanted, given = (torch.cat(column) for column in zip(*pairs, strict=True))
    if wanted.dim() > 2:  # maps: decisions enough, but those of one image are lost together
        kept = (wanted.argmax(1) == given.argmax(1)).double().flatten(1).mean(1)
        return Expected(loss, judges, *_bounds(float(kept.mean()), float(kept.var(correction=0)) / judges, judges))
    more = [first.double() for first, _ in pairs_of(known, known)]
    known_rows, rows = _thinned(torch.cat([wanted, *more])), _thinned(torch.stack((wanted, given), 1))
    kept = _meetings(known_rows, rows[:, 0], rows[:, 1])
    variance = float(kept.mean(0).var(correction=0)) / judges + float(kept.mean(1).var(correction=0)) / len(kept)
    return Expected(loss, judges, *_bounds(float(kept.mean()), variance, judges))


def _thinned(rows: Tensor) -> Tensor:
    """About as many as tell what all of them do: outputs can have a row a position."""
    return rows[:: -(-len(rows) // ROWS)]


def _meetings(known: Tensor, wanted: Tensor, given: Tensor) -> Tensor:
    """(known, judges): 1.0 where a known image's decision bears a judge's error, rank by rank of its classes."""
    ranks = min(RANKS, wanted.shape[1])
    margins = known.topk(ranks, 1).values
    order = wanted.topk(ranks, 1).indices
    errors = (given - wanted).gather(1, order)
    return ((margins[:, None] + errors[None]).argmax(2) == 0).double()


def _bounds(share: float, variance: float, judges: int) -> tuple[float, float, float]:
    """The share, and two standard errors each way; as if one more judge had lost it and one had kept it."""
    middle, count = (share * judges + 1) / (judges + 2), judges + 2
    error = 2 * math.sqrt(variance + middle * (1 - middle) / count**2)
    return share, max(0.0, share - error), min(1.0, share + error)
