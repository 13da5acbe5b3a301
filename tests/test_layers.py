"""The layers by hand and from trained convolutions: channel order, sizes, modes, and what users do with a module."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.layers import Conv2dSame
from torch import Tensor, nn

from octify import resample
from octify.errors import ConversionError
from octify.layers import (
    Merge,
    OctConv1d,
    OctConv2d,
    OctConv3d,
    OctConvTranspose2d,
    Split,
    pool_low,
    up_to,
)
from octify.layout import Layout
from octify.resample import add_raised, read_both

KINDS: dict[int, tuple[Any, Any]] = {1: (nn.Conv1d, OctConv1d), 2: (nn.Conv2d, OctConv2d), 3: (nn.Conv3d, OctConv3d)}


def close(found: Tensor, wanted: Tensor, atol: float = 1e-12) -> None:
    assert found.shape == wanted.shape
    torch.testing.assert_close(found, wanted, rtol=0, atol=atol)


def as_pair(value: Tensor | tuple[Tensor, Tensor], layout: Layout) -> tuple[Tensor, Tensor]:
    if isinstance(value, tuple):
        return value
    assert layout.is_dense
    return value, value[:, :0]


def first(x: Tensor, length: int, spatial: int) -> Tensor:
    """The first rows and columns."""
    return x[(..., *(slice(length),) * spatial)]


def dense_conv(conv: nn.Module, x: Tensor) -> Tensor:
    """Without the bias, so that parts add up."""
    return conv(x) - conv(torch.zeros_like(x))


GEOMETRIES = [
    (3, 1, 1, 1),
    (3, 2, 1, 1),
    (1, 2, 0, 1),
    (5, 3, 2, 1),
    (2, 2, 0, 1),
    (3, 1, 2, 2),
    (3, 4, 0, 1),
    (1, 3, 0, 1),
    (1, 4, 0, 1),
]

layouts = st.lists(st.booleans(), min_size=6, max_size=6).map(Layout.of)


@given(bits=st.lists(st.booleans(), min_size=1, max_size=70), spatial=st.sampled_from([1, 2]), size=st.integers(1, 7))
def test_merge_after_split(bits: list[bool], spatial: int, size: int) -> None:
    layout = Layout.of(bits)
    if layout.is_dense:
        return
    x = torch.randn(2, len(bits), *(size + 2, size)[2 - spatial :])
    high, low = Split(layout, spatial)(x)
    assert low.shape[2:] == tuple((length + 1) // 2 for length in x.shape[2:])
    merged = Merge(layout, spatial)(high, low)
    assert torch.equal(merged[:, layout.high_index], x[:, layout.high_index])
    wanted = up_to(pool_low(x, spatial), x.shape[2:])[:, layout.low_index]
    close(merged[:, layout.low_index], wanted, 1e-6)
    again = Split(layout, spatial)(merged)
    torch.testing.assert_close(again, (high, low))


def test_resampling_by_its_definition() -> None:
    x = torch.arange(15.0).reshape(1, 1, 3, 5)
    assert torch.equal(pool_low(x)[0, 0], torch.tensor([[3.0, 5.0, 6.5], [10.5, 12.5, 14.0]]))
    low = torch.arange(6.0).reshape(1, 1, 2, 3)
    wanted = torch.tensor([[0.0, 0, 1, 1, 2], [0, 0, 1, 1, 2], [3, 3, 4, 4, 5]])
    assert torch.equal(up_to(low, (3, 5))[0, 0], wanted)
    for size in range(1, 300):
        line = torch.arange((size + 1) // 2, dtype=torch.float32).reshape(1, 1, -1)
        assert torch.equal(up_to(line, (size,))[0, 0], torch.arange(size).div(2, rounding_mode="floor").float())


@given(height=st.integers(1, 9), width=st.integers(1, 9), channels_last=st.booleans())
def test_pools_alike_with_and_without_gradients(height: int, width: int, channels_last: bool) -> None:
    order = torch.channels_last if channels_last else torch.contiguous_format
    x = torch.randn(2, 3, height, width, dtype=torch.float64).contiguous(memory_format=order)
    wanted = torch.nn.functional.avg_pool2d(x, 2, ceil_mode=True, count_include_pad=False)
    close(pool_low(x), wanted)
    close(pool_low(x.requires_grad_()), wanted)


@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last])
def test_gradients_between_the_bands_are_right_to_the_second(order: torch.memory_format) -> None:
    high = torch.randn(2, 3, 4, 6, dtype=torch.float64).contiguous(memory_format=order).requires_grad_()
    low = torch.randn(2, 3, 2, 3, dtype=torch.float64).contiguous(memory_format=order).requires_grad_()
    assert type(read_both(high)[1].grad_fn).__name__ == "_ReadBackward"
    assert type(add_raised(1 * high, low, (4, 6)).grad_fn).__name__ == "_AddBackward"
    for function, inputs in (
        (lambda x, y: read_both(x), (high, low)),
        (lambda x, y: add_raised(1 * x, y, (4, 6)), (high, low)),
        (lambda x, y: add_raised(read_both(x)[0] * 2, read_both(x)[1] ** 2 + y, (4, 6)) ** 3, (high, low)),
    ):
        assert torch.autograd.gradcheck(function, inputs, check_forward_ad=True)
        assert torch.autograd.gradgradcheck(function, inputs)


@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("size", [(8, 12), (7, 12)])
def test_a_layer_learns_the_same_with_pytorchs_own_pooling(
    order: torch.memory_format, size: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    conv = nn.Conv2d(8, 8, 3, padding=1).double()
    layer = OctConv2d.from_conv(conv, Layout.last(8, 4), Layout.last(8, 4)).to(memory_format=order)
    x = torch.randn(2, 4, *size, dtype=torch.float64).contiguous(memory_format=order).requires_grad_()
    low = torch.randn(2, 4, (size[0] + 1) // 2, size[1] // 2, dtype=torch.float64).contiguous(memory_format=order)

    def gradients() -> list[Tensor]:
        out = [band.mul_(2).relu_() for band in layer(x, low)]  # in place, as activations do
        return list(torch.autograd.grad(sum(band.pow(3).sum() for band in out), [x, *layer.parameters()]))

    own = gradients()
    monkeypatch.setattr(resample, "_halves_quickly", lambda x: False)
    for found, wanted in zip(own, gradients(), strict=True):
        close(found, wanted, 1e-9)


@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last_3d])
def test_time_is_not_pooled(order: torch.memory_format) -> None:
    x = torch.randn(2, 3, 3, 5, 4).contiguous(memory_format=order)
    wanted = torch.stack([pool_low(x[:, :, frame]) for frame in range(3)], 2)
    close(pool_low(x), wanted, 1e-6)
    assert torch.equal(up_to(wanted, (5, 4))[:, :, 1], up_to(wanted[:, :, 1], (5, 4)))


@given(
    layouts=st.tuples(layouts, layouts),
    dim=st.sampled_from([1, 2, 2, 3]),
    kernel=st.integers(1, 5),
    stride=st.integers(1, 3),
    seed=st.integers(0, 99),
)
@settings(max_examples=80)
def test_bands_are_the_dense_convolution(
    layouts: tuple[Layout, Layout], dim: int, kernel: int, stride: int, seed: int
) -> None:
    """Any layout: what enters as low counts as its U, what leaves as low is the average."""
    torch.manual_seed(seed)
    inside, outside = layouts
    make, octave = KINDS[dim]
    spatial = min(dim, 2)
    conv = make(6, 6, kernel, stride, kernel // 2).double()
    x = torch.randn(2, 6, *(5,) * (dim - spatial), *(12,) * spatial, dtype=torch.float64)
    is_low = torch.tensor(inside.bits).reshape(-1, *(1,) * dim)
    smooth = up_to(pool_low(x, spatial), x.shape[-spatial:])
    from_high, from_low = dense_conv(conv, x * ~is_low), dense_conv(conv, smooth * is_low)
    if stride % 2:
        from_low = up_to(pool_low(from_low, spatial), from_low.shape[-spatial:])
    bias = conv.bias.detach().reshape(-1, *(1,) * dim)
    wanted_high = (from_high + from_low + bias)[:, outside.high_index]
    wanted_low = pool_low(conv(smooth), spatial)[:, outside.low_index]
    layer = octave.from_conv(conv, inside, outside)
    high, low = as_pair(layer(x if inside.is_dense else Split(inside, spatial)(x)), outside)
    # Of an odd number of outputs the last has no other to be averaged with.
    pairs = wanted_high.shape[-1] // 2
    close(first(high, 2 * pairs, spatial), first(wanted_high, 2 * pairs, spatial))
    assert high.shape == wanted_high.shape
    if not outside.is_dense:
        close(first(low, pairs, spatial), first(wanted_low, pairs, spatial))
        assert low.shape == wanted_low.shape


@pytest.mark.parametrize("make, octave", [(nn.Conv2d, OctConv2d), (nn.ConvTranspose2d, OctConvTranspose2d)])
@pytest.mark.parametrize(
    "groups, channels, inside, outside",
    [
        (2, (8, 12), "2h2l2l2h", "3l3h1h3l2h"),
        (3, (6, 9), "1h1l1l1h1h1l", "2h1l1h1l1h1l2h"),
        (4, (4, 8), "2h2l", "4h4l"),
        (4, (4, 4), "1h1l1h1l", "1h1l1h1l"),
    ],
)
def test_groups(make: Any, octave: Any, groups: int, channels: tuple[int, int], inside: str, outside: str) -> None:
    torch.manual_seed(0)
    before, after = Layout.parse(inside), Layout.parse(outside)
    conv = make(*channels, 4, 2, 1, groups=groups).double()
    x = torch.randn(2, channels[0], 8, 8, dtype=torch.float64)
    smooth = up_to(pool_low(x), (8, 8))
    merged = torch.where(torch.tensor(before.bits)[:, None, None], smooth, x)
    layer = octave.from_conv(conv, before, after)
    high, low = layer(*Split(before)(x))
    close(high, conv(merged)[:, after.high_index])
    close(low, pool_low(conv(smooth))[:, after.low_index])


def test_refuses_layouts_that_break_groups() -> None:
    conv = nn.Conv2d(4, 4, 3, groups=2)
    with pytest.raises(ConversionError, match="0 to 2 low channels in 2 groups"):
        OctConv2d.from_conv(conv, Layout.last(4, 2), Layout.parse("1h1l1h1l"))
    with pytest.raises(ConversionError, match="keeps its input's layout"):
        OctConv2d.from_conv(nn.Conv2d(4, 4, 3, groups=4), Layout.last(4, 2), Layout.last(4, 1))


@pytest.mark.parametrize("mode", ["zeros", "replicate", "reflect", "circular"])
@pytest.mark.parametrize("layouts", [("6h", "6l"), ("6l", "6l"), ("6l", "6h"), ("1h2l3h", "2l2h2l")])
@pytest.mark.parametrize("size", [(12, 8), (9, 7), (5, 11)])
def test_constant_map(mode: str, layouts: tuple[str, str], size: tuple[int, int]) -> None:
    """Pooling and upsampling lose nothing of a constant: any layout gives the dense result."""
    inside, outside = (Layout.parse(text) for text in layouts)
    for kernel, stride, padding, dilation in GEOMETRIES:
        if mode == "zeros" and padding:
            continue
        conv = nn.Conv2d(6, 6, kernel, stride, padding, dilation, padding_mode=mode).double()
        x = torch.randn(2, 6, 1, 1, dtype=torch.float64).expand(2, 6, *size)
        wanted = conv(x)
        layer = OctConv2d.from_conv(conv, inside, outside)
        high, low = as_pair(layer(x if inside.is_dense else Split(inside)(x)), outside)
        close(high, wanted[:, outside.high_index])
        if not outside.is_dense:
            close(low, pool_low(wanted)[:, outside.low_index])


@pytest.mark.parametrize("mode, padding", [("circular", 1), ("circular", 3), ("reflect", 1), ("replicate", 3)])
def test_padding_modes_exact_on_the_low_grid(mode: str, padding: int) -> None:
    conv = nn.Conv2d(3, 3, 2 * padding + 1, 2, padding, padding_mode=mode).double()
    low = torch.randn(1, 3, 4, 6, dtype=torch.float64)
    dense = conv(up_to(low, (8, 12)))
    layer = OctConv2d.from_conv(conv, Layout.last(3, 3), Layout.last(3, 1))
    high, low_out = layer(low.new_empty(1, 0, 8, 12), low)
    close(high, dense[:, :2])
    close(low_out, pool_low(dense)[:, 2:])


def test_a_map_too_small_for_its_mode_repeats_the_edge() -> None:
    conv = nn.Conv2d(3, 3, 7, 1, 3, padding_mode="reflect")
    x = torch.randn(1, 3, 1, 1).expand(1, 3, 4, 4)
    for kernels in ("fold", "paper"):
        layer = OctConv2d.from_conv(conv, Layout.dense(3), Layout.last(3, 3), kernels=kernels)
        close(layer(x)[1], pool_low(conv(x)), 1e-5)


@pytest.mark.parametrize(
    "kernel, stride, dilation", [(3, 2, 1), (5, 2, 1), (1, 2, 1), (3, 1, 1), (4, 2, 1), (3, 3, 2), (2, 1, 1)]
)
def test_dynamic_same_padding(kernel: int, stride: int, dilation: int) -> None:
    """timm's Conv2dSame: the high path bit for bit, the low one of the right size and exact on divisible sizes."""
    conv = Conv2dSame(4, 4, kernel, stride, dilation=dilation)
    layout = Layout.last(4, 4)
    plain = OctConv2d.from_conv(conv, Layout.dense(4), Layout.dense(4), padding="same_dynamic")
    double = copy.deepcopy(conv).double()
    layer = OctConv2d.from_conv(double, layout, layout, padding="same_dynamic")
    lifted = OctConv2d.from_conv(double, layout, Layout.dense(4), padding="same_dynamic")
    for size in range(6, 19):
        x = torch.randn(1, 4, size, size + 1)
        assert torch.equal(plain(x), conv(x))
        high, low = Split(layout)(x.double())
        dense = double(up_to(low, x.shape[2:]))
        out_high, out_low = layer(high, low)
        assert out_high.shape[2:] == dense.shape[2:] and out_low.shape == pool_low(dense).shape
        assert lifted(high, low).shape == dense.shape
    x = torch.randn(1, 4, 12, 24, dtype=torch.float64)
    _, low = Split(layout)(x)
    dense = double(up_to(low, (12, 24)))
    close(layer(x[:, :0], low)[1], pool_low(dense))
    if stride % 2 == 0:
        close(lifted(x[:, :0], low), dense)


@pytest.mark.parametrize("padding", ["same", "valid"])
@pytest.mark.parametrize("kernel", [2, 3, 4])
def test_named_padding(padding: str, kernel: int) -> None:
    conv = nn.Conv2d(4, 4, kernel, padding=padding).double()
    layout = Layout.last(4, 4)
    low = torch.randn(1, 4, 6, 5, dtype=torch.float64)
    dense = conv(up_to(low, (12, 10)))
    wanted = pool_low(dense)
    found = OctConv2d.from_conv(conv, layout, layout)(low.new_empty(1, 0, 12, 10), low)[1]
    close(
        found[..., : dense.shape[2] // 2, : dense.shape[3] // 2],
        wanted[..., : dense.shape[2] // 2, : dense.shape[3] // 2],
    )
    assert found.shape == wanted.shape
    x = torch.randn(1, 4, 9, 9, dtype=torch.float64)
    assert torch.equal(OctConv2d.from_conv(conv, Layout.dense(4), Layout.dense(4))(x), conv(x))


@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
def test_without_low_channels_it_is_the_plain_convolution(mode: str) -> None:
    for kernels, stride in (("fold", 1), ("fold", 2), ("paper", 1)):
        torch.manual_seed(5)
        conv = nn.Conv2d(4, 6, 3, stride, 1, groups=2, padding_mode=mode)
        torch.manual_seed(5)
        layer = OctConv2d(4, 6, 3, stride, 1, groups=2, padding_mode=mode, kernels=kernels)
        x = torch.randn(2, 4, 9, 7)
        assert torch.equal(layer(x), conv(x)), "by hand, from the same seed"
        from_conv = OctConv2d.from_conv(conv, Layout.dense(4), Layout.dense(6), kernels=kernels)
        assert torch.equal(from_conv(x), conv(x))


@pytest.mark.parametrize(
    "kernel, stride", [(1, 1), (1, 2), (1, 3), (3, 1), (3, 2), (5, 1), (5, 2), (7, 1), (7, 2), (2, 2), (4, 4)]
)
def test_never_more_parameters(kernel: int, stride: int) -> None:
    padding = 0 if kernel == stride else kernel // 2
    conv = nn.Conv2d(8, 8, kernel, stride, padding)
    for low in (2, 4, 8):
        layer = OctConv2d.from_conv(conv, Layout.last(8, low), Layout.last(8, low))
        assert sum(p.numel() for p in layer.parameters()) <= sum(p.numel() for p in conv.parameters())


def test_takes_over_what_belongs_to_the_module() -> None:
    conv = nn.Conv2d(4, 4, 3, padding=1, dtype=torch.bfloat16).to(memory_format=torch.channels_last).eval()
    conv.weight.requires_grad_(False)
    layer = OctConv2d.from_conv(conv, Layout.last(4, 2), Layout.last(4, 2))
    assert not layer.training and layer.weight_hl.dtype == torch.bfloat16
    assert layer.weight_ll.is_contiguous(memory_format=torch.channels_last) and not layer.weight_ll.is_contiguous()
    assert not layer.weight_hh.requires_grad and layer.bias_h.requires_grad
    shared = {p.data_ptr() for p in layer.parameters()} & {p.data_ptr() for p in conv.parameters()}
    assert not shared, "the source keeps its own weights"
    given = torch.randn(4, 4, 3, 3), torch.randn(4)
    other = OctConv2d.from_conv(conv, Layout.last(4, 2), Layout.last(4, 2), weight=given[0], bias=given[1])
    assert torch.equal(other.weight_hh, given[0][:2, :2]) and torch.equal(other.bias_l, given[1][2:])


def test_on_the_meta_device() -> None:
    for conv, kind in ((nn.Conv2d, OctConv2d), (nn.ConvTranspose2d, OctConvTranspose2d)):
        source = conv(6, 6, 3, 2, 1, device="meta")
        layer = kind.from_conv(source, Layout.parse("1h2l3h"), Layout.parse("1l2h3l"))
        high, low = layer(torch.empty(1, 4, 9, 9, device="meta"), torch.empty(1, 2, 5, 5, device="meta"))
        assert high.is_meta and low.shape[2] == (high.shape[2] + 1) // 2
    scattered = Layout.of(bit % 2 == 0 for bit in range(80))
    with torch.device("meta"):
        split = Split(scattered)
    x = torch.randn(1, 80, 4, 4)
    split.to_empty(device="cpu")
    assert torch.equal(split(x)[0], x[:, 1::2]), "the order survives a start on the meta device"


def samples() -> list[tuple[nn.Module, tuple[Tensor, ...]]]:
    high, low = torch.randn(2, 6, 10, 14), torch.randn(2, 2, 5, 7)
    plain = {"in_channels": 8, "out_channels": 8, "alpha": 0.25}
    return [
        (OctConv2d(**plain, kernel_size=3, padding=1), (high, low)),
        (OctConv2d(**plain, kernel_size=3, stride=2, padding=1), (high, low)),
        (OctConv2d(**plain, kernel_size=3, stride=2, padding=1, kernels="fold"), (high, low)),
        (OctConv2d(**plain, kernel_size=3, stride=2, kernels="fold"), (high, low)),
        (OctConv2d(**plain, kernel_size=2, stride=2, kernels="fold"), (high, low)),
        (OctConv2d(**plain, kernel_size=1, stride=2, kernels="fold"), (high, low)),
        (OctConv2d(**plain, kernel_size=1, stride=4, kernels="fold"), (high, low)),
        (OctConv2d(8, 8, 3, 1, 1, alpha=(0, 1)), (torch.randn(2, 8, 10, 14),)),
        (OctConv2d(8, 8, 3, 1, 1, alpha=(1, 0.5)), (torch.randn(2, 0, 10, 14), torch.randn(2, 8, 5, 7))),
        (OctConvTranspose2d(**plain, kernel_size=4, stride=2, padding=1), (high, low)),
        (Split(Layout.last(8, 2)), (torch.randn(2, 8, 10, 14),)),
        (Merge(Layout.parse("2h2l4h")), (high, low)),
    ]


NAMES = [
    "3x3",
    "3x3s2",
    "fold3x3s2",
    "fold3x3s2p0",
    "fold2x2s2",
    "fold1x1s2",
    "fold1x1s4",
    "first",
    "from all low",
    "transposed",
    "split",
    "merge",
]


@pytest.mark.parametrize("which", range(len(NAMES)), ids=NAMES)
def test_copies_and_pickles(which: int) -> None:
    layer, inputs = samples()[which]
    wanted = layer(*inputs)
    stream = io.BytesIO()
    torch.save(layer.state_dict(), stream)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        torch.testing.assert_close(other(*inputs), wanted, rtol=0, atol=0)
        assert str(other) == str(layer)


@pytest.mark.parametrize("which", range(len(NAMES)), ids=NAMES)
def test_exports_with_any_batch_and_size(which: int) -> None:
    """From an example of even size, run at odd ones."""
    layer, inputs = samples()[which]
    layout = Layout.last(8, 8 - inputs[0].shape[1])
    chain = nn.Sequential(layer) if layout.is_dense else nn.Sequential(Split(layout), layer)
    free = dict.fromkeys((0, 2, 3), torch.export.Dim.DYNAMIC)
    program = torch.export.export(chain, (torch.randn(2, 8, 12, 16),), dynamic_shapes=(free,))
    for batch, height, width in ((2, 10, 14), (3, 11, 16), (5, 13, 17), (4, 16, 15)):
        x = torch.randn(batch, 8, height, width)
        torch.testing.assert_close(program.module()(x), chain(x))


@pytest.mark.parametrize("which", [1, 2, 3, 9, 11], ids=[NAMES[which] for which in (1, 2, 3, 9, 11)])
def test_traces_into_one_graph(which: int) -> None:
    layer, inputs = samples()[which]
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*inputs), layer(*inputs))


def test_wrong_input_says_what_was_expected() -> None:
    layer = OctConv2d(4, 4, 3, padding=1, alpha=0.5)
    with pytest.raises(ConversionError, match="a pair"):
        layer(torch.zeros(1, 4, 8, 8))
    with pytest.raises(ConversionError, match="one tensor"):
        OctConv2d(4, 4, 3, padding=1, alpha=(0, 0.5))(torch.zeros(1, 4, 8, 8), torch.zeros(1, 2, 4, 4))
    for wrong in (
        {"kernels": "folded"},
        {"padding_mode": "mirror"},
        {"alpha": 2},
        {"paths": ("hh", "up")},
        {"downsample": "max"},
    ):
        with pytest.raises(ConversionError, match="expected"):
            OctConv2d(4, 4, 3, padding=1, **{"alpha": 0.5, **wrong})


def test_adds_in_place_without_breaking_gradients() -> None:
    layer = OctConv2d(4, 4, 3, padding=1, alpha=0.5).double()
    high = torch.randn(1, 2, 5, 5, dtype=torch.float64, requires_grad=True)
    low = torch.randn(1, 2, 3, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(layer, (high, low))
