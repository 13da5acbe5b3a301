"""`OctConv2d(kernels="paper")` is the paper's layer: equation 4 written down with `torch.nn.functional`."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from octify.layers import OctConv2d


def equation_4(layer: OctConv2d, high: Tensor | None, low: Tensor | None, kernel: int, stride: int, groups: int):
    """Y^H = f(X^H; W_HH) + up(f(X^L; W_LH)), Y^L = f(X^L; W_LL) + f(pool(X^H); W_HL); a stride is a pooling before."""

    def f(x: Tensor | None, weight: Tensor | None) -> Tensor | float:
        return 0.0 if x is None or weight is None else F.conv2d(x, weight, padding=kernel // 2, groups=groups)

    def pool(x: Tensor | None, by: int) -> Tensor | None:
        return x if x is None or by == 1 else F.avg_pool2d(x, by)

    def up(x: Tensor | float) -> Tensor | float:
        return x if isinstance(x, float) else F.interpolate(x, scale_factor=2, mode="nearest")

    def add_bias(y: Tensor, bias: Tensor | None) -> Tensor:
        return y if bias is None else y + bias[:, None, None]

    to_high = up(f(pool(low, stride), layer.weight_lh)) if stride % 2 else f(pool(low, stride // 2), layer.weight_lh)
    out_high = f(pool(high, stride), layer.weight_hh) + to_high
    out_low = f(pool(low, stride), layer.weight_ll) + f(pool(high, 2 * stride), layer.weight_hl)
    given = ((out_high, layer.bias_h), (out_low, layer.bias_l))
    return [add_bias(y, bias) for y, bias in given if isinstance(y, Tensor)]


@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("kernel", [1, 3, 5])
@pytest.mark.parametrize("stride", [1, 2, 3, 4])
@pytest.mark.parametrize("alpha", [(0.5, 0.5), (0.25, 0.75), (0, 0.5), (0.5, 0), (0.75, 1), (1, 0.25), (1, 1)])
def test_is_equation_4(alpha: tuple[float, float], stride: int, kernel: int, groups: int) -> None:
    torch.manual_seed(0)
    layer = OctConv2d(16, 32, kernel, stride, kernel // 2, groups=groups, alpha=alpha, kernels="paper").double()
    size = 8 * stride
    sides = [torch.randn(2, count, length, length, dtype=torch.float64, requires_grad=count > 0)
             for count, length in ((layer.in_layout.high, size), (layer.in_layout.low, size // 2))]  # fmt: skip
    high, low = (side if side.shape[1] else None for side in sides)
    given = layer(sides[0], low) if low is not None else layer(sides[0])
    bands = [band for band in (given if isinstance(given, tuple) else (given,)) if band.shape[1]]
    due = equation_4(layer, high, low, kernel, stride, groups)
    assert [tuple(band.shape) for band in bands] == [tuple(band.shape) for band in due]
    weights = [torch.randn_like(band) for band in due]
    leaves = [leaf for leaf in (high, low, *layer.parameters()) if leaf is not None]
    gradients = [
        torch.autograd.grad(sum((y * w).sum() for y, w in zip(side, weights, strict=True)), leaves)
        for side in (bands, due)
    ]
    for found, expected in ((bands, due), gradients):
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("stride", [1, 2])
def test_depthwise_has_no_paths_between_the_bands(stride: int) -> None:
    layer = OctConv2d(16, 16, 3, stride, 1, groups=16, alpha=0.5, kernels="paper").double()
    assert layer.weight_hl is None and layer.weight_lh is None
    high, low = torch.randn(1, 8, 16, 16, dtype=torch.float64), torch.randn(1, 8, 8, 8, dtype=torch.float64)
    for x, y, weight, bias in zip(
        (high, low), layer(high, low), (layer.weight_hh, layer.weight_ll), (layer.bias_h, layer.bias_l), strict=True
    ):
        due = F.conv2d(F.avg_pool2d(x, stride), weight, bias, padding=1, groups=8)
        torch.testing.assert_close(y, due, rtol=1e-12, atol=1e-12)


def test_layer_without_a_stride_pools_nothing() -> None:
    """`downsample="stride"`, the paper's weaker ablation, is another function than pooling, of the same size."""
    torch.manual_seed(0)
    pooled = OctConv2d(8, 8, 3, 2, 1, alpha=0.5, kernels="paper")
    strided = OctConv2d(8, 8, 3, 2, 1, alpha=0.5, kernels="paper", downsample="stride")
    strided.load_state_dict(pooled.state_dict())
    bands = torch.randn(1, 4, 16, 16), torch.randn(1, 4, 8, 8)
    high, low = strided(*bands)
    assert [high.shape, low.shape] == [band.shape for band in pooled(*bands)]
    assert not torch.allclose(high, pooled(*bands)[0])
    weight = (strided.weight_hh, strided.weight_ll)
    own = F.conv2d(bands[1], weight[1], None, 2, 1)
    own += F.conv2d(F.avg_pool2d(bands[0], 2), strided.weight_hl, strided.bias_l, 2, 1)
    torch.testing.assert_close(low, own)
