"""The octave layers: `Split`, `Merge` and the convolutions; all usable by hand."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from octify.layout import Layout
from octify.octconv import OctConv, OctConv1d, OctConv2d, OctConv3d, fits_paper
from octify.resample import pool_low, up_to
from octify.transposed import OctConvTranspose, OctConvTranspose1d, OctConvTranspose2d, OctConvTranspose3d

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = [
    "Split",
    "Merge",
    "OctConv",
    "OctConv1d",
    "OctConv2d",
    "OctConv3d",
    "OctConvTranspose",
    "OctConvTranspose1d",
    "OctConvTranspose2d",
    "OctConvTranspose3d",
    "fits_paper",
    "pool_low",
    "up_to",
]

# From here on, one gather is cheaper than joining slices.
MAX_RUNS = 16


def runs_of(order: Sequence[int]) -> tuple[tuple[int, int], ...]:
    """`(start, length)` of the stretches that run on.

    >>> runs_of([4, 5, 6, 0, 2, 3])
    ((4, 3), (0, 1), (2, 2))
    """
    grouped = itertools.groupby(enumerate(order), lambda pair: pair[1] - pair[0])
    stretches = [[channel for _, channel in group] for _, group in grouped]
    return tuple((stretch[0], len(stretch)) for stretch in stretches)


class Channels(nn.Module):
    """Channels in a fixed order, out of one tensor or several that follow each other: by slices where few do."""

    index: Tensor | None

    def __init__(self, order: Sequence[int], counts: Sequence[int]) -> None:
        super().__init__()
        self.order = tuple(order)
        starts = tuple(itertools.accumulate(counts, initial=0))
        self.slices = tuple(
            (source, start - first, length)
            for start, length in _cut(runs_of(order), starts)
            for source, (first, behind) in enumerate(itertools.pairwise(starts))
            if first <= start < behind
        )
        index = torch.tensor(self.order) if len(self.slices) > MAX_RUNS else None
        self.register_buffer("index", index, persistent=False)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Self:
        moved = cast(Any, super())._apply(fn, recurse)
        # A buffer that no state dict holds is lost on the way from the meta device: made again instead.
        if self.index is not None and not self.index.is_meta:
            self.index = torch.tensor(self.order, device=self.index.device)
        return moved

    def forward(self, *sources: Tensor) -> Tensor:
        if self.index is not None:
            joined = sources[0] if len(sources) == 1 else torch.cat(sources, 1)
            return joined.index_select(1, self.index)
        parts = [sources[source].narrow(1, start, length) for source, start, length in self.slices]
        return parts[0] if len(parts) == 1 else torch.cat(parts, 1)

    def extra_repr(self) -> str:
        """How many channels, and in how many pieces."""
        return f"{len(self.order)} channels in {len(self.slices)} slices"


def _cut(runs: Sequence[tuple[int, int]], borders: Sequence[int]) -> list[tuple[int, int]]:
    """Runs cut where a border falls inside."""
    pieces: list[tuple[int, int]] = []
    for start, length in runs:
        inside = [border for border in borders if start < border < start + length]
        ends = [*inside, start + length]
        pieces += [(first, end - first) for first, end in zip([start, *inside], ends, strict=True)]
    return pieces


class Split(nn.Module):
    """Dense to bands: (N, C, H, W) to the high channels and D of the low ones; `spatial` axes are halved.

    >>> high, low = Split(Layout.parse("48h16l"))(torch.zeros(1, 64, 15, 15))
    >>> tuple(high.shape), tuple(low.shape)
    ((1, 48, 15, 15), (1, 16, 8, 8))
    """

    def __init__(self, layout: Layout, spatial: int = 2) -> None:
        super().__init__()
        self.layout, self.spatial = layout, spatial
        self.high = Channels(layout.high_index, [layout.channels])
        self.low = Channels(layout.low_index, [layout.channels])

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Dense to bands."""
        low = pool_low(self.low(x), self.spatial)
        high = self.high(x) if self.layout.high else x.narrow(1, 0, 0)
        return high, low

    def extra_repr(self) -> str:
        """Layout and halved axes."""
        return f"{self.layout}, spatial={self.spatial}"


class Merge(nn.Module):
    """Bands to dense: U of the low band, to the high band's size, and the channels in the source's order.

    >>> merge = Merge(Layout.parse("48h16l"))
    >>> tuple(merge(torch.zeros(1, 48, 15, 15), torch.zeros(1, 16, 8, 8)).shape)
    (1, 64, 15, 15)
    """

    def __init__(self, layout: Layout, spatial: int = 2) -> None:
        super().__init__()
        self.layout, self.spatial = layout, spatial
        self.order = Channels(layout.order, [layout.high, layout.low])

    def forward(self, high: Tensor | tuple[Tensor, Tensor], low: Tensor | None = None) -> Tensor:
        """Bands to dense."""
        if not isinstance(high, Tensor):
            high, low = high
        raised = up_to(cast(Tensor, low), high.shape[-self.spatial :])
        return self.order(high, raised) if self.layout.high else raised

    def extra_repr(self) -> str:
        """Layout and halved axes."""
        return f"{self.layout}, spatial={self.spatial}"
