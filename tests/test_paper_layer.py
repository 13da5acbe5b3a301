"""`OctConv(kernels="paper")` against equation 4 of arXiv 1904.05049, written down as it stands there."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from octify.errors import ConversionError
from octify.layers import OctConv2d, OctConv3d, fits_paper, pool_low

ALPHAS = (0, 0.125, 0.25, 0.5, 0.75, 1)
SHARES = [(a, a) for a in ALPHAS] + [(0, a) for a in ALPHAS[1:]] + [(a, 0) for a in ALPHAS[1:]] + [(1, 0.5), (0.25, 1)]


def equation_4(layer: OctConv2d, high: Tensor, low: Tensor | None, downsample: str) -> list[Tensor | None]:
    """Y^H = f(X^H; W_HH) + up(f(X^L; W_LH)), Y^L = f(X^L; W_LL) + f(pool(X^H); W_HL); of stride 2 as the authors do it.

    At stride 2 the maps are pooled first and X^L, being of the output's size already, is not upsampled.
    """
    stride, margin = layer.stride[0], layer.kernel_size[0] // 2

    def f(x: Tensor, weight: Tensor | None, step: int = 1) -> Tensor | float:
        return 0.0 if weight is None else F.conv2d(x, weight, stride=step, padding=margin)

    def pool(x: Tensor) -> Tensor:
        return F.avg_pool2d(x, 2, ceil_mode=True, count_include_pad=False)

    def up(x: Tensor | float) -> Tensor | float:
        if isinstance(x, float):
            return x
        return x.repeat_interleave(2, 2).repeat_interleave(2, 3)[:, :, : high.shape[2], : high.shape[3]]

    step = stride if downsample == "stride" else 1
    shrunk = high
    if stride == 2 and downsample == "pool" and high.shape[1]:
        shrunk = pool(high)
    same = low if stride == 1 or step == 2 or low is None else pool(low)
    to_high: Tensor | float = f(shrunk, layer.weight_hh, step)
    to_low: Tensor | float = 0.0
    if high.shape[1]:
        to_low = to_low + f(pool(shrunk), layer.weight_hl, step)
    if low is not None and same is not None:
        across = f(low, layer.weight_lh)
        to_high = to_high + (up(across) if stride == 1 else across)
        to_low = to_low + f(same, layer.weight_ll, step)
    outputs: list[Tensor | None] = []
    for value, bias in ((to_high, layer.bias_h), (to_low, layer.bias_l)):
        if isinstance(value, float):
            outputs.append(None)
            continue
        outputs.append(value if bias is None else value + bias[:, None, None])
    return outputs


def bands_of(layer: OctConv2d, size: tuple[int, int], seed: int = 0) -> list[Tensor]:
    """Fresh inputs for a layer, with gradients."""
    torch.manual_seed(seed)
    high = torch.randn(2, layer.in_layout.high, *size, dtype=torch.float64, requires_grad=True)
    if layer.in_layout.is_dense:
        return [high]
    shape = [(length + 1) // 2 for length in size]
    return [high, torch.randn(2, layer.in_layout.low, *shape, dtype=torch.float64, requires_grad=True)]


@pytest.mark.parametrize("downsample", ["pool", "stride"])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("kernel", [1, 3, 5, 7])
def test_layer_is_equation_4(kernel: int, stride: int, downsample: str) -> None:
    for shares, size in itertools.product(SHARES, [(16, 12), (15, 9)]):
        layer = OctConv2d(8, 16, kernel, stride, kernel // 2, alpha=shares, downsample=downsample).double()
        inputs = bands_of(layer, size)
        found = layer(*inputs)
        found = list(found) if isinstance(found, tuple) else [found, None]
        wanted = equation_4(layer, inputs[0], inputs[1] if len(inputs) > 1 else None, downsample)
        leaves = [leaf for leaf in (*inputs, *layer.parameters()) if leaf.numel()]
        pairs = [(ours, theirs) for ours, theirs in zip(found, wanted, strict=True) if theirs is not None]
        assert len(pairs) == sum(band is not None and band.numel() > 0 for band in found)
        for ours, theirs in pairs:
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
        # A random weighting of the outputs, so that no gradient vanishes by symmetry.
        weights = [torch.randn_like(ours) for ours, _ in pairs]
        ours, theirs = (
            sum((side * w).sum() for side, w in zip(sides, weights, strict=True)) for sides in zip(*pairs, strict=True)
        )
        gradients = torch.autograd.grad(ours, leaves), torch.autograd.grad(theirs, leaves)
        for left, right in zip(*gradients, strict=True):
            torch.testing.assert_close(left, right, rtol=1e-12, atol=1e-11)


def test_parameters_are_as_many_as_dense() -> None:
    for kernel, stride, shares in itertools.product((1, 3, 7), (1, 2), SHARES):
        layer = OctConv2d(8, 16, kernel, stride, kernel // 2, alpha=shares)
        assert sum(p.numel() for p in layer.parameters()) == 8 * 16 * kernel**2 + 16


def test_dense_stage_pools_before_its_strided_convolution() -> None:
    layer = OctConv2d(4, 4, 3, 2, 1, alpha=0).double()
    x = torch.randn(1, 4, 9, 9, dtype=torch.float64)
    pooled = F.avg_pool2d(x, 2, ceil_mode=True, count_include_pad=False)
    torch.testing.assert_close(layer(x), F.conv2d(pooled, layer.weight_hh, layer.bias_h, padding=1), rtol=0, atol=0)


def test_time_keeps_its_stride() -> None:
    layer = OctConv3d(8, 8, (3, 3, 3), (2, 2, 2), 1, alpha=0.5).double()
    high, low = torch.randn(1, 4, 8, 9, 9, dtype=torch.float64), torch.randn(1, 4, 8, 5, 5, dtype=torch.float64)
    out_high, out_low = layer(high, low)
    assert out_high.shape == (1, 4, 4, 5, 5) and out_low.shape == (1, 4, 4, 3, 3)

    def f(x: Tensor, weight: Tensor) -> Tensor:
        return F.conv3d(x, weight, stride=(2, 1, 1), padding=1)

    shrunk = pool_low(high)
    wanted_high = f(shrunk, layer.weight_hh) + f(low, layer.weight_lh) + layer.bias_h[:, None, None, None]
    wanted_low = (
        f(pool_low(low), layer.weight_ll) + f(pool_low(shrunk), layer.weight_hl) + layer.bias_l[:, None, None, None]
    )
    torch.testing.assert_close(out_high, wanted_high, rtol=0, atol=1e-12)
    torch.testing.assert_close(out_low, wanted_low, rtol=0, atol=1e-12)


def test_depthwise_has_no_paths_between_the_bands() -> None:
    layer = OctConv2d(8, 16, 3, 2, 1, groups=8, alpha=0.5).double()
    assert layer.paths == ("hh", "ll") and str(layer.out_layout) == "8h8l"
    high, low = torch.randn(1, 4, 8, 8, dtype=torch.float64), torch.randn(1, 4, 4, 4, dtype=torch.float64)
    out_high, out_low = layer(high, low)
    for out, x, weight, bias in (
        (out_high, high, layer.weight_hh, layer.bias_h),
        (out_low, low, layer.weight_ll, layer.bias_l),
    ):
        torch.testing.assert_close(
            out, F.conv2d(F.avg_pool2d(x, 2), weight, bias, padding=1, groups=4), rtol=0, atol=1e-12
        )


def test_paths_switch_off() -> None:
    layer = OctConv2d(8, 8, 3, 1, 1, alpha=0.5, paths=("hh", "ll", "hl"))
    assert layer.weight_lh is None and layer.weight_hl is not None
    first = OctConv2d(8, 8, 3, 1, 1, alpha=(0, 0.5), paths=("hh", "ll"))
    assert first.paths == ("hh", "hl"), "the only path into the low band stays"


@pytest.mark.parametrize("geometry", [{"padding": 0}, {"kernel_size": 2, "padding": 1}, {"padding": 2}])
def test_refuses_what_is_not_half_padded(geometry: dict[str, int]) -> None:
    arguments = {"kernel_size": 3, **geometry}
    conv = torch.nn.Conv2d(8, 8, **arguments)
    assert fits_paper(conv) is not None
    with pytest.raises(ConversionError, match="fold"):
        OctConv2d(8, 8, **arguments, alpha=0.5)


def test_fits_half_padding() -> None:
    assert fits_paper(torch.nn.Conv2d(8, 8, 3, 2, 1)) is None
    assert fits_paper(torch.nn.Conv2d(8, 8, 3, padding=2, dilation=2)) is None
    assert fits_paper(torch.nn.Conv2d(8, 8, 3, padding="same")) is None
    assert fits_paper(torch.nn.Conv3d(8, 8, (3, 1, 1), padding=(0, 0, 0))) is None
    assert "transposed" in str(fits_paper(torch.nn.ConvTranspose2d(8, 8, 2, 2)))
