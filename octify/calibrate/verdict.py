"""How much of a network a converted one keeps, on images: decisions, probabilities, and every layer's bands."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from octify.calibrate.data import float_tensors

MOST_CLASSES = 30_000


def agreement(dense: Sequence[Any], octave: Sequence[Any]) -> float | None:
    """The share of equal decisions, the largest class of each row of logits or pixel; None if there is none."""
    decided = [(d.argmax(1) == o.argmax(1)).double() for d, o in pairs_of(dense, octave) if is_decision(d)]
    return float(torch.cat([same.flatten() for same in decided]).mean()) if decided else None


def pairs_of(dense: Sequence[Any], octave: Sequence[Any]) -> list[tuple[Tensor, Tensor]]:
    """The first floating-point tensor of each chunk's outputs, dense and octave."""
    firsts = [(float_tensors(d)[:1], float_tensors(o)[:1]) for d, o in zip(dense, octave, strict=True)]
    return [(d[0], o[0]) for d, o in firsts if d and o]


def is_decision(output: Tensor) -> bool:
    """Whether the largest entry along axis 1 is a class: rows of logits, or maps of them."""
    return output.dim() in (2, 4) and 1 < output.shape[1] <= MOST_CLASSES
