"""The fold's arithmetic against the thing itself: `D ∘ conv ∘ U`, computed with torch's own operations in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from octify import kernels
from octify.kernels import Axis, fold_taps, halve_taps, sharpen_taps
from octify.layers import (
    OctConv1d,
    OctConv2d,
    OctConv3d,
    OctConvTranspose1d,
    OctConvTranspose2d,
    OctConvTranspose3d,
    pool_low,
    up_to,
)
from octify.layout import Layout

LOW, HIGH = Layout.last(4, 4), Layout.dense(4)
CONVS: dict[int, tuple[Any, Any, int]] = {
    1: (nn.Conv1d, OctConv1d, 1),
    2: (nn.Conv2d, OctConv2d, 2),
    3: (nn.Conv3d, OctConv3d, 2),
}
RAISED: dict[int, tuple[Any, Any, int]] = {
    1: (nn.ConvTranspose1d, OctConvTranspose1d, 1),
    2: (nn.ConvTranspose2d, OctConvTranspose2d, 2),
    3: (nn.ConvTranspose3d, OctConvTranspose3d, 2),
}


def close(found: Tensor, wanted: Tensor) -> None:
    assert found.shape == wanted.shape
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)


def carrier(like: Tensor) -> Tensor:
    return like[:, :0]


def all_low(dim: int, size: tuple[int, ...], spatial: int) -> tuple[Tensor, Tensor]:
    """A low map of random numbers and its U at `size`."""
    high = torch.randn(2, 4, *size, dtype=torch.float64)
    low = pool_low(high, spatial)
    assert low.dim() == dim + 2
    return low, up_to(low, size[-spatial:])


def first(x: Tensor, length: int, spatial: int) -> Tensor:
    """The first rows and columns."""
    for dim in range(-spatial, 0):
        x = x.narrow(dim, 0, max(min(x.shape[dim], length), 0))
    return x


@st.composite
def geometries(draw: st.DrawFn) -> dict[str, Any]:
    return {
        "kernel_size": draw(st.integers(1, 7)),
        "stride": draw(st.integers(1, 4)),
        "padding": draw(st.integers(0, 6)),
        "dilation": draw(st.integers(1, 3)),
        "bias": draw(st.booleans()),
        "groups": draw(st.sampled_from([1, 2])),
    }


def span(geometry: dict[str, Any]) -> int:
    return geometry["dilation"] * (geometry["kernel_size"] - 1)


def smallest(geometry: dict[str, Any]) -> int:
    return max(1, span(geometry) + 1 - 2 * geometry["padding"])


@given(geometry=geometries(), dim=st.sampled_from([1, 1, 2, 2, 3]), extra=st.integers(0, 12), seed=st.integers(0, 99))
@settings(max_examples=150)
def test_fold_is_the_convolution_of_the_raised_map(geometry: dict[str, Any], dim: int, extra: int, seed: int) -> None:
    """L→L and L→H at any size: right sizes, and equal but for outputs that read behind the end of an odd map."""
    torch.manual_seed(seed)
    make, octave, spatial = CONVS[dim]
    size = smallest(geometry) + extra
    conv = make(4, 4, **geometry).double()
    low, raised = all_low(dim, (smallest(geometry) + 1,) * (dim - spatial) + (size,) * spatial, spatial)
    dense = conv(raised)
    wanted = pool_low(dense, spatial)
    to_low = octave.from_conv(conv, LOW, LOW)(carrier(raised), low)[1]
    to_high = octave.from_conv(conv, LOW, HIGH)(carrier(raised), low)
    assert to_low.shape == wanted.shape and to_high.shape == dense.shape
    exact = dense.shape[-1]
    if size % 2 and geometry["padding"]:
        # The last low element also stands for the element behind the end, which the source pads.
        exact = min(exact, -(-(size + geometry["padding"] - span(geometry)) // geometry["stride"]))
    close(first(to_low, exact // 2, spatial), first(wanted, exact // 2, spatial))
    if geometry["stride"] % 2 == 0:
        close(first(to_high, exact, spatial), first(dense, exact, spatial))
    else:
        close(to_high, up_to(to_low, dense.shape[-spatial:]))


@given(geometry=geometries(), dim=st.sampled_from([1, 2, 3]), extra=st.integers(0, 12), seed=st.integers(0, 99))
def test_high_to_low_reads_the_pooled_map(geometry: dict[str, Any], dim: int, extra: int, seed: int) -> None:
    torch.manual_seed(seed)
    make, octave, spatial = CONVS[dim]
    size = smallest(geometry) + extra
    conv = make(4, 4, **geometry).double()
    low, raised = all_low(dim, (smallest(geometry) + 1,) * (dim - spatial) + (size,) * spatial, spatial)
    from_high = octave.from_conv(conv, HIGH, LOW)(raised)[1]
    close(from_high, octave.from_conv(conv, LOW, LOW)(carrier(raised), low)[1])


@given(
    geometry=geometries(),
    dim=st.sampled_from([1, 2, 2, 3]),
    size=st.integers(1, 9),
    seed=st.integers(0, 99),
    data=st.data(),
)
@settings(max_examples=150)
def test_transposed_fold(geometry: dict[str, Any], dim: int, size: int, seed: int, data: st.DataObject) -> None:
    """L→L and L→H of a transposed convolution, both exact but for what the missing half of an odd map adds."""
    torch.manual_seed(seed)
    make, octave, spatial = RAISED[dim]
    limit = max(geometry["stride"], geometry["dilation"])
    geometry = {**geometry, "output_padding": data.draw(st.integers(0, limit - 1))}
    out = geometry["stride"] * (size - 1) - 2 * geometry["padding"] + span(geometry) + geometry["output_padding"] + 1
    assume(out > 0)
    conv = make(4, 4, **geometry).double()
    low, raised = all_low(dim, (size,) * dim, spatial)
    dense = conv(raised)
    wanted = pool_low(dense, spatial)
    to_low = octave.from_conv(conv, LOW, LOW)(carrier(raised), low)[1]
    to_high = octave.from_conv(conv, LOW, HIGH)(carrier(raised), low)
    assert to_low.shape == wanted.shape and to_high.shape == dense.shape
    exact = min(out, geometry["stride"] * size - geometry["padding"]) if size % 2 else out
    close(first(to_low, exact // 2, spatial), first(wanted, exact // 2, spatial))
    close(first(to_high, exact, spatial), first(dense, exact, spatial))
    assert sum(p.numel() for p in octave.from_conv(conv, LOW, HIGH).parameters()) == sum(
        p.numel() for p in conv.parameters()
    )


AXES = [
    (Axis(k, s, d, p, p), to_low)
    for k, s, d, p in ((3, 1, 1, 1), (3, 2, 1, 1), (5, 1, 1, 2), (5, 2, 1, 2), (7, 2, 1, 3), (3, 1, 2, 2), (2, 2, 1, 0))
    for to_low in (True, False)
    if to_low or s % 2 == 0
]


@pytest.mark.parametrize(("axis", "to_low"), AXES)
def test_sharpened_taps_pass_constants_and_stay_in_their_places(axis: Axis, to_low: bool) -> None:
    taps = fold_taps(axis) if to_low else halve_taps(axis)
    sharp = sharpen_taps(axis, taps, to_low)
    assert (sharp.first, sharp.dilation, sharp.stride, len(sharp.matrix)) == (
        taps.first,
        taps.dilation,
        taps.stride,
        len(taps.matrix),
    )
    assert np.array(sharp.matrix).sum(0) == pytest.approx(np.ones(axis.kernel), abs=1e-9)


def test_without_amplification_they_guess_random_walks_better_than_the_fold(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "SHARPEN", 1.0)
    axis = Axis(3, 1, 1, 1, 1)
    fold = fold_taps(axis)
    guess = sharpen_taps.__wrapped__(axis, fold, True)
    walk = np.cumsum(np.random.default_rng(0).normal(size=(64, 400)), 1)
    low = walk.reshape(64, 200, 2).mean(2)
    w = np.array([1.0, -2.0, 1.0])
    wanted = (walk[:, :-2] * w[0] + walk[:, 1:-1] * w[1] + walk[:, 2:] * w[2])[:, 1:-1].reshape(64, 198, 2).mean(2)
    errors = []
    for taps in (fold, guess):
        folded = np.array(taps.matrix) @ w
        given = sum(folded[i] * low[:, 1 + taps.first + i : 199 + taps.first + i] for i in range(3))
        errors.append(float(((given - wanted) ** 2).mean()))
    assert errors[1] < 0.9 * errors[0]
