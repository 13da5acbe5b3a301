"""The arithmetic of the fold: which kernel a convolution becomes on a grid of half the size, one axis at a time.

Let U be nearest upsampling by 2 and D average pooling by 2. A low channel `x_l` stands for the map `U x_l`. Along one
axis a convolution of stride s, dilation d and padding p computes `y[o] = Σ_t w[t] x[s·o + d·t - p]`. Put
`x[i] = x_l[⌊i/2⌋]` and average the outputs 2q and 2q+1, and `D y` is again a convolution of stride s, whose taps sit at
`⌊(s·r + d·t - p)/2⌋` for r in {0, 1}; taps that fall on the same offset add up. No torch module lives here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from math import gcd
from typing import Any

import numpy as np
import torch
from torch import Tensor

SHARPEN = 1.25  # measured: from 1.15 to 1.4 trained networks keep about as much


@dataclass(frozen=True)
class Axis:
    """A convolution's geometry along one axis; `dynamic` is TensorFlow's "same", padded by the input's size."""

    kernel: int
    stride: int = 1
    dilation: int = 1
    left: int = 0
    right: int = 0
    dynamic: bool = False

    @classmethod
    def same(cls, kernel: int, stride: int, dilation: int) -> Axis:
        """TensorFlow's "same": the padding here is that of an input whose size is a multiple of the stride."""
        total = max(dilation * (kernel - 1) + 1 - stride, 0)
        return cls(kernel, stride, dilation, total // 2, total - total // 2, dynamic=True)

    @property
    def span(self) -> int:
        """Distance from the first tap to the last."""
        return self.dilation * (self.kernel - 1)

    def out_size(self, size: int) -> int:
        """The output's size for an input of `size`."""
        if self.dynamic:
            return (size + self.stride - 1) // self.stride
        return (size + self.left + self.right - self.span - 1) // self.stride + 1

    def sizes(self) -> range:
        """Input sizes that stand for all: every formula here is linear in the size up to a period of 2·stride."""
        smallest = 1 if self.dynamic else max(1, self.span + 1 - self.left - self.right)
        return range(smallest, smallest + 4 * self.stride)


@dataclass(frozen=True)
class Taps:
    """A kernel along one axis: tap i sits at `first + i * dilation` and weighs `Σ_t matrix[i][t] * w[t]`."""

    first: int
    dilation: int
    stride: int
    matrix: tuple[tuple[float, ...], ...]

    @property
    def last(self) -> int:
        """Offset of the last tap."""
        return self.first + self.span

    @property
    def span(self) -> int:
        """Distance from the first tap to the last."""
        return self.dilation * (len(self.matrix) - 1)


def gather_taps(placed: Sequence[tuple[int, int, float]], kernel: int, stride: int) -> Taps:
    """Adds up `(offset, source tap, weight)` and stores them with the largest dilation that reaches all offsets."""
    offsets = [offset for offset, _, _ in placed]
    first = min(offsets)
    dilation = gcd(*(offset - first for offset in offsets)) or 1
    rows = [[0.0] * kernel for _ in range((max(offsets) - first) // dilation + 1)]
    for offset, tap, weight in placed:
        rows[(offset - first) // dilation][tap] += weight
    return Taps(first, dilation, stride, tuple(tuple(row) for row in rows))


def keep_taps(axis: Axis) -> Taps:
    """The source's own kernel."""
    eye = tuple(tuple(float(row == column) for column in range(axis.kernel)) for row in range(axis.kernel))
    return Taps(-axis.left, axis.dilation, axis.stride, eye)


def fold_taps(axis: Axis) -> Taps:
    """`D ∘ conv ∘ U`: low to low, of the source's stride.

    The same taps serve a transposed convolution, where input 2j+u reaches the low output `s·j + ⌊(s·u + d·t - p)/2⌋`.

    >>> fold_taps(Axis(3, left=1, right=1)).matrix
    ((0.5, 0.0, 0.0), (0.5, 1.0, 0.5), (0.0, 0.0, 0.5))
    """
    placed = [
        ((axis.stride * phase + axis.dilation * tap - axis.left) // 2, tap, 0.5)
        for phase in (0, 1)
        for tap in range(axis.kernel)
    ]
    return gather_taps(placed, axis.kernel, axis.stride)


def halve_taps(axis: Axis) -> Taps:
    """`conv ∘ U` for an even stride: low to high, of half the stride."""
    placed = [((axis.dilation * tap - axis.left) // 2, tap, 1.0) for tap in range(axis.kernel)]
    return gather_taps(placed, axis.kernel, axis.stride // 2)


@lru_cache(maxsize=4096)
def sharpen_taps(axis: Axis, taps: Taps, to_low: bool) -> Taps:
    """The fold's taps, weighted for maps that are not constant on 2 by 2 blocks, as trained networks' are not.

    Each source tap becomes the best linear guess of what it would read from the low elements that the taps see, if
    maps are random walks along the axis (ordinary kriging; images have about their spectrum). What averaging takes
    away lessens the spread that activations were trained on, so what departs from the taps' mean is amplified by
    `SHARPEN`. Every column sums to 1, so constant maps pass as they do through the fold.

    >>> axis = Axis(3, left=1, right=1)
    >>> [[round(weight, 2) for weight in row] for row in sharpen_taps(axis, fold_taps(axis), True).matrix]
    [[0.52, -0.08, -0.19], [0.67, 1.17, 0.67], [-0.19, -0.08, 0.52]]
    """
    count = len(taps.matrix)
    if count == 1:
        return taps
    seen = [_element(taps.first + index * taps.dilation) for index in range(count)]
    phases = (0, 1) if to_low else (0,)
    read = [
        [(axis.stride * phase + axis.dilation * tap - axis.left, 1 / len(phases)) for phase in phases]
        for tap in range(axis.kernel)
    ]
    system = np.ones((count + 1, count + 1))
    system[count, count] = 0.0
    system[:count, :count] = [[_likeness(one, other) for other in seen] for one in seen]
    wanted = np.ones((count + 1, axis.kernel))
    wanted[:count] = [[_likeness(one, other) for other in read] for one in seen]
    guess = np.linalg.solve(system, wanted)[:count]
    sharp = guess.mean(0) + SHARPEN * (guess - guess.mean(0))
    return replace(taps, matrix=tuple(tuple(float(weight) for weight in row) for row in sharp))


def _element(position: int) -> list[tuple[int, float]]:
    """What a low element averages."""
    return [(2 * position, 0.5), (2 * position + 1, 0.5)]


def _likeness(one: Sequence[tuple[int, float]], other: Sequence[tuple[int, float]]) -> float:
    """The generalised covariance of two averages over a random walk."""
    return -sum(a * b * abs(i - j) for i, a in one for j, b in other)


def phase_offsets(axis: Axis) -> tuple[int, int]:
    """Offsets of the two taps that a kernel of one tap folds to; the same offset twice where they add up."""
    return -axis.left // 2, (axis.stride - axis.left) // 2


def half(size: int) -> int:
    """The low grid's size, ⌈size/2⌉."""
    return (size + 1) // 2


@lru_cache(maxsize=4096)
def right_reach(axis: Axis, taps: Taps, to_low: bool) -> int:
    """How far, at most over all sizes, the last output reads beyond the low map's last element (0 or more)."""

    def reach(size: int) -> int:
        out = half(axis.out_size(size)) if to_low else axis.out_size(size)
        return taps.stride * (out - 1) + taps.last - (half(size) - 1)

    return max(0, max(reach(size) for size in axis.sizes()))


@lru_cache(maxsize=4096)
def fits_always(axis: Axis, taps: Taps, to_low: bool, right: int) -> bool:
    """Whether padding the low map by `-first` and `right` gives the wanted size for every input size."""

    def fits(size: int) -> bool:
        out = half(axis.out_size(size)) if to_low else axis.out_size(size)
        return (half(size) - taps.first + right - taps.span - 1) // taps.stride + 1 == out

    return all(fits(size) for size in axis.sizes())


def fold_weight(weight: Tensor, taps: Sequence[Taps]) -> Tensor:
    """The weight (…, k1, …, kn) on another grid, one `Taps` per kernel axis; a new tensor of the weight's dtype."""
    kernel = [len(tap.matrix) for tap in taps]
    numbers: dict[str, Any] = {"dtype": torch.float64, "device": "cpu"}  # whatever the default device is
    matrix = torch.ones(1, 1, **numbers)
    for tap in taps:
        matrix = torch.kron(matrix, torch.tensor(tap.matrix, **numbers))
    if matrix.shape[0] == matrix.shape[1] and torch.equal(matrix, torch.eye(len(matrix), **numbers)):
        return weight.clone(memory_format=torch.contiguous_format)
    # Half precision has too few digits to add up in.
    exact = torch.promote_types(weight.dtype, torch.float32)
    flat = weight.to(exact).flatten(-len(kernel))
    folded = flat @ matrix.to(weight.device, exact).T
    return folded.to(weight.dtype).reshape(*weight.shape[: -len(kernel)], *kernel)
