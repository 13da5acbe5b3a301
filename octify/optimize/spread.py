"""What makes maps larger, as nodes of an optimised graph that any backend can read."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional as F


class Pad(nn.Module):
    """Zeros around a map, or less of it; the amounts as `F.pad` has them: left, right, top, bottom."""

    def __init__(self, amounts: tuple[int, int, int, int]) -> None:
        super().__init__()
        self.amounts = amounts

    def forward(self, x: Tensor) -> Tensor:
        """x (N, C, H, W)."""
        return F.pad(x, self.amounts)


def grid_left(size: Sequence[int], first: tuple[int, int], step: int) -> tuple[int, int]:
    """How many positions there are from the first on, at every `step`-th one.

    >>> grid_left((7, 8), (1, 0), 2)
    (3, 4)
    """
    height, width = ((length - start + step - 1) // step for length, start in zip(size, first, strict=True))
    return height, width


def interleave(parts: Sequence[Tensor], size: Sequence[int], first: tuple[int, int] = (0, 0), step: int = 1) -> Tensor:
    """Four maps (N, C, h, w) in turns: the one at 2a + b has rows a, a + 2, … and columns b, b + 2, … of the result.

    It has the size `grid_left(size, first, step)`; what parts have beyond that is left out.
    """
    n, c = parts[0].shape[:2]
    out = parts[0].new_empty((n, c, *grid_left(size, first, step)))
    for index, part in enumerate(parts):
        rows, columns = divmod(index, 2)
        place = out[:, :, rows::2, columns::2]
        place.copy_(part[:, :, : place.shape[2], : place.shape[3]])
    return out


def blend(x: Tensor, size: Sequence[int], align_corners: bool) -> Tensor:
    """Bilinear resizing to a size."""
    return F.interpolate(x, size=tuple(size), mode="bilinear", align_corners=align_corners)
