"""CompConv against the paper's recursion written out by hand, its cost against its formula, and its weights."""

from __future__ import annotations

import copy
import math
import pickle
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from octify.compconv import (
    CompConv1d,
    CompConv2d,
    CompConv3d,
    depth_for,
    macs_per_position,
    shuffle_order,
    unit_channels,
)
from octify.compweights import fit, from_conv
from octify.errors import CalibrationError, ConversionError

RANKS: dict[int, tuple[Any, Any]] = {1: (CompConv1d, nn.Conv1d), 2: (CompConv2d, nn.Conv2d), 3: (CompConv3d, nn.Conv3d)}
CONVS: dict[int, Any] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
# kernel, stride, padding, dilation: half padding, none, too much, even kernels, the strings, mixed axes
GEOMETRIES: list[tuple[Any, Any, Any, Any]] = [
    (3, 1, 1, 1),
    (3, 2, 1, 1),
    (3, 3, 1, 1),
    (1, 1, 0, 1),
    (1, 2, 0, 1),
    (1, 3, 0, 1),
    (2, 2, 0, 1),
    (4, 2, 1, 1),
    (4, 1, 1, 1),
    (4, 1, "same", 1),
    (3, 1, "same", 2),
    (3, 1, "valid", 1),
    (3, 2, 0, 1),
    (3, 1, 3, 1),
    (5, 3, 4, 1),
    (3, 2, 2, 2),
    (3, 1, 3, 3),
    (7, 2, 3, 1),
    ((3, 5), (1, 2), (1, 2), (1, 1)),
    ((1, 3), (2, 3), (0, 2), (1, 2)),
]


def pad_axis(x: Tensor, axis: int, before: int, after: int, mode: str) -> Tensor:
    """Pads one axis by gathering, each mode from its definition."""
    size = x.shape[axis]
    at = torch.arange(-before, size + after)
    inside = (at >= 0) & (at < size)
    if mode == "reflect":
        at = at.abs()
        at = torch.where(at >= size, 2 * (size - 1) - at, at)
    elif mode == "circular":
        at = at % size
    padded = x.index_select(axis, at.clamp(0, size - 1))
    shape = [1] * x.dim()
    shape[axis] = -1
    return padded * inside.reshape(shape) if mode == "zeros" else padded


def plain(x: Tensor, conv: Any, stride: Any, pads: list[tuple[int, int]], mode: str) -> Tensor:
    for axis, (before, after) in enumerate(pads):
        x = pad_axis(x, 2 + axis, before, after, mode)
    return CONVS[x.dim() - 2](x, conv.weight, conv.bias, stride, 0, conv.dilation, conv.groups)


def pooled(x: Tensor, sizes: tuple[int, ...], starts: list[int], stride: tuple[int, ...]) -> Tensor:
    """Along every axis, output o is the mean of the inputs start + stride·o + (0 .. stride - 1), edges repeated."""
    for axis, (size, start, step) in enumerate(zip(sizes, starts, stride, strict=True)):
        last = x.shape[2 + axis] - 1
        places = [[min(max(start + step * o + j, 0), last) for o in range(size)] for j in range(step)]
        x = sum(x.index_select(2 + axis, torch.tensor(at)) for at in places) / step  # type: ignore[assignment]
    return x


def paper(module: Any, x: Tensor) -> Tensor:
    """The recursion of the paper, with the module's weights: b2, a2, b1, a1, b0, a0, trimming, shuffle."""
    kernel, dilation, stride, mode = module.kernel_size, module.dilation, module.stride, module.padding_mode
    reach = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
    same = [(total // 2, total - total // 2) for total in reach]
    if isinstance(module.padding, str):
        first = same if module.padding == "same" else [(0, 0)] * len(same)
    else:
        first = [(p, p) for p in module.padding]
    b = plain(x, module.units[0], stride, first, mode)
    if module.depth == 0:
        return b
    p = math.ceil(module.out_channels / (2 * (2**module.depth - 1)))
    # centre of the window read for output o is stride·o + (reach - 2·before) / 2; `int` rounds towards zero
    starts = [int((r - 2 * w[0] - s + 1) / 2) for r, w, s in zip(reach, first, stride, strict=True)]
    parts, taken = [], 0
    for level in range(1, module.depth):
        wide = p * 2 ** (level - 1)
        a = x[:, [(taken + channel) % x.shape[1] for channel in range(wide)]]
        a, taken = pooled(a, b.shape[2:], starts, stride), taken + wide
        parts += [a, b]
        b = plain(torch.cat([a, b], 1), module.units[level], 1, same, mode)
    a = plain(b, module.tail, 1, same, mode)
    total = sum(part.shape[1] for part in parts) + a.shape[1] + b.shape[1]
    trim = total - module.out_channels
    from_b = max(0, trim - a.shape[1])
    y = torch.cat([*parts, a[:, : a.shape[1] - (trim - from_b)], b[:, : b.shape[1] - from_b]], 1)
    groups = module.shuffle_groups
    chunks = [list(chunk) for chunk in torch.arange(y.shape[1]).tensor_split(groups)]
    order = [int(chunk[row]) for row in range(len(chunks[0])) for chunk in chunks if row < len(chunk)]
    return y[:, order]


def assert_as_paper(module: Any, x: Tensor) -> None:
    """Same output, same gradients of the input and of every parameter."""
    module = module.double()
    ours, theirs = x.double().requires_grad_(), x.double().requires_grad_()
    found, expected = module(ours), paper(module, theirs)
    torch.testing.assert_close(found, expected)
    weights = torch.linspace(-1, 1, found.numel(), dtype=torch.float64).reshape(found.shape)
    parameters = list(module.parameters())
    grads = torch.autograd.grad((found * weights).sum(), [ours, *parameters])
    torch.testing.assert_close(
        grads, torch.autograd.grad((expected * weights).sum(), [theirs, *parameters], materialize_grads=True)
    )


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
@pytest.mark.parametrize("depth", [0, 1, 2, 3])
def test_recursion(geometry: tuple[Any, Any, Any, Any], depth: int) -> None:
    torch.manual_seed(depth)
    module = CompConv2d(6, 31, *geometry, depth=depth)
    dense = nn.Conv2d(6, 31, *geometry)
    for size in ((12, 12), (11, 9), (7, 10)):
        x = torch.randn(2, 6, *size)
        assert module.float()(x).shape == dense(x).shape
        assert_as_paper(module, x)


@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
@pytest.mark.parametrize("stride", [1, 2])
def test_padding_modes(mode: str, stride: int) -> None:
    torch.manual_seed(0)
    module = CompConv2d(20, 28, 3, stride, 1, padding_mode=mode, bias=False, depth=3)
    assert_as_paper(module, torch.randn(2, 20, 9, 8))


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("depth", [1, 2, 3])
def test_ranks(rank: int, stride: int, depth: int) -> None:
    torch.manual_seed(rank)
    module = RANKS[rank][0](5, 17, 3, stride, 1, depth=depth)
    assert_as_paper(module, torch.randn(2, 5, *(9, 6, 7)[:rank]))


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_trimming_and_shuffle_of_every_remainder(depth: int) -> None:
    units = 2 * (2**depth - 1)
    for c_out in range(units, 3 * units + 1):
        for groups in {1, 2, min(3, c_out), c_out}:
            module = CompConv2d(4, c_out, 3, padding=1, depth=depth, shuffle_groups=groups).double()
            x = torch.randn(1, 4, 3, 3, dtype=torch.float64)
            torch.testing.assert_close(module(x), paper(module, x))
            rows = [row for unit in module.stands_for() for row in unit]
            copied = c_out - len(rows)
            assert len(set(rows)) == len(rows) and copied == unit_channels(c_out, depth) * (2 ** (depth - 1) - 1)


@given(st.integers(1, 40), st.integers(1, 40))
def test_shuffle_order_is_a_permutation(channels: int, groups: int) -> None:
    order = shuffle_order(channels, min(groups, channels))
    assert sorted(order) == list(range(channels))
    if channels % groups == 0:
        assert torch.equal(torch.tensor(order), torch.arange(channels).reshape(groups, -1).T.flatten())


def test_stands_for_names_the_channels_that_the_units_become() -> None:
    module = CompConv2d(9, 33, 3, padding=1, depth=3, shuffle_groups=2)
    outputs: dict[str, Tensor] = {}
    names = ["units.0", "units.1", "units.2", "tail"]
    for name in names:
        module.get_submodule(name).register_forward_hook(lambda _, __, y, name=name: outputs.__setitem__(name, y))
    y = module(torch.randn(1, 9, 5, 5))
    for name, rows in zip(names, module.stands_for(), strict=True):
        assert torch.equal(y[:, list(rows)], outputs[name][:, : len(rows)])


def copied(x: Tensor, *geometry: Any) -> Tensor:
    """The first copied channel, which with one shuffle group is the first of the output."""
    module = CompConv2d(x.shape[1], 30, *geometry, depth=2, shuffle_groups=1, dtype=torch.float64)
    return module(x)[:, :1]


@pytest.mark.parametrize("size", [(8, 8), (9, 7)])
def test_where_the_copies_are(size: tuple[int, int]) -> None:
    x = torch.randn(2, 3, *size, dtype=torch.float64)
    first = x[:, :1]
    assert torch.equal(copied(x, 3, 1, 1), first)
    assert torch.equal(copied(x, 4, 1, "same"), first)
    assert torch.equal(copied(x, 5, 1, 0), first[..., 2:-2, 2:-2])
    assert torch.equal(copied(x, 3, 1, 3), F.pad(first, (2, 2, 2, 2), mode="replicate"))
    assert torch.equal(copied(x, 2, 2, 0), F.avg_pool2d(first, 2))
    assert torch.equal(copied(x, 3, 3, 0), F.avg_pool2d(first, 3))
    halved = F.avg_pool2d(first, 2, ceil_mode=True, count_include_pad=False)
    for kernel in (1, 3, 7):
        torch.testing.assert_close(copied(x, kernel, 2, kernel // 2), halved)


def test_depth_zero_is_the_plain_convolution_bit_for_bit() -> None:
    torch.manual_seed(0)
    dense = nn.Conv2d(7, 9, 3, 2, 1, padding_mode="reflect")
    x = torch.randn(2, 7, 11, 10)
    assert torch.equal(from_conv(dense, depth=0)(x), dense(x))
    torch.manual_seed(0)
    assert torch.equal(CompConv2d(7, 9, 3, 2, 1, padding_mode="reflect", depth=0)(x), dense(x))


def test_one_map_without_its_batch_axis() -> None:
    module = CompConv2d(8, 15, 3, 2, 1, depth=2)
    x = torch.randn(8, 9, 7)
    torch.testing.assert_close(module(x), module(x[None])[0])


@given(st.integers(1, 40), st.integers(14, 60), st.integers(1, 4), st.integers(0, 3), st.integers(1, 2))
def test_cost_is_the_formula(c_in: int, c_out: int, kernel: int, depth: int, stride: int) -> None:
    with torch.device("meta"):
        module = CompConv2d(c_in, c_out, kernel, stride, kernel // 2, depth=depth, bias=False)
        x = torch.empty(2, c_in, 9, 8)
    with FlopCounterMode(display=False) as counter:
        y = module(x)
    positions = y.shape[0] * y.shape[2] * y.shape[3]
    macs = macs_per_position(c_in, c_out, kernel, depth)
    assert counter.get_total_flops() == 2 * positions * macs
    assert sum(parameter.numel() for parameter in module.parameters()) == macs
    assert macs_per_position(c_in, c_out, (kernel, kernel), depth) == macs


def test_cost_ratios_of_the_paper() -> None:
    ratios = {
        depth: macs_per_position(channels, channels, 3, depth) / macs_per_position(channels, channels, 3, 0)
        for depth, channels in ((1, 512), (2, 1024), (3, 512))
    }
    assert {depth: round(ratio, 3) for depth, ratio in ratios.items()} == {1: 0.501, 2: 0.279, 3: 0.177}


def test_depth_of_the_paper() -> None:
    assert [depth_for(c) for c in (1, 64, 128, 255, 256, 511, 512, 4096)] == [1, 1, 1, 1, 2, 2, 3, 3]
    assert [depth_for(256, c0) for c0 in (1, 32, 64, 256, 512)] == [3, 3, 3, 1, 1]
    for c_in in range(1, 1100):
        for c0 in (1, 3, 64, 100):
            assert depth_for(c_in, c0) == min(3, math.floor(math.log2(max(1.0, c_in / c0))) + 1)


def test_depth_zero_serves_a_single_output_channel() -> None:
    assert CompConv2d(8, 1, 3, depth=0)(torch.zeros(1, 8, 3, 3)).shape == (1, 1, 1, 1)


BAD: list[tuple[dict[str, Any], str]] = [
    ({"c0": 0}, "c0 is 0: expected 1 or more"),
    ({"c0": -4, "depth": 1}, "c0 is -4"),
    ({"depth": 4}, "depth is 4: expected 0 to 3"),
    ({"depth": -1}, "depth is -1: expected 0 to 3"),
    ({"depth": 3, "out_channels": 13}, "14 units, found 13 output channels"),
    ({"depth": 2, "out_channels": 5}, "6 units, found 5 output channels"),
    ({"depth": 1, "out_channels": 1}, "2 units, found 1 output channels"),
    ({"groups": 4}, "has no groups, found groups=4"),
    ({"shuffle_groups": 0}, "shuffle_groups is 0: expected 1 to C_out = 64"),
    ({"shuffle_groups": 65}, "shuffle_groups is 65"),
]


@pytest.mark.parametrize(("wrong", "message"), BAD, ids=[message for _, message in BAD])
def test_bad_input_says_what_was_expected(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ConversionError, match=message):
        CompConv2d(**{"in_channels": 8, "out_channels": 64, "kernel_size": 3, **wrong})


def test_formulas_refuse_what_the_module_refuses() -> None:
    for depth in (4, -1):
        with pytest.raises(ConversionError, match="depth"):
            macs_per_position(64, 64, 3, depth)
    with pytest.raises(ConversionError, match="14 units"):
        unit_channels(13, 3)


@pytest.mark.parametrize("wrong", [nn.Linear(3, 4), nn.ConvTranspose2d(4, 4, 3), nn.LazyConv2d(4, 3)], ids=repr)
def test_only_plain_convolutions_become_compconvs(wrong: nn.Module) -> None:
    with pytest.raises(ConversionError, match="expected a Conv1d, Conv2d or Conv3d itself"):
        from_conv(wrong)


def test_grouped_convolutions_are_refused() -> None:
    with pytest.raises(ConversionError, match="groups=2"):
        from_conv(nn.Conv2d(8, 8, 3, groups=2))


def test_from_conv_keeps_what_the_source_is() -> None:
    conv = nn.Conv2d(8, 30, 3, 2, 1, dtype=torch.bfloat16, padding_mode="replicate").eval()
    conv.weight.requires_grad_(False)
    comp = from_conv(conv, depth=2)
    assert not comp.training and comp.padding_mode == "replicate" and comp.stride == (2, 2)
    for name, parameter in comp.named_parameters():
        assert parameter.dtype == torch.bfloat16 and parameter.requires_grad == name.endswith("bias")
    rows = comp.stands_for()
    for unit, outputs in zip([*comp.units, comp.tail], rows, strict=True):
        assert torch.equal(unit.bias[: len(outputs)], conv.bias[list(outputs)])  # type: ignore[index,union-attr]


def test_the_first_unit_keeps_its_rows_of_the_source() -> None:
    for depth in (1, 2, 3):
        conv = nn.Conv2d(8, 45, 3, 2, 1)
        comp = from_conv(conv, depth=depth)
        rows, x = list(comp.stands_for()[0]), torch.randn(2, 8, 9, 9)
        torch.testing.assert_close(comp(x)[:, rows], conv(x)[:, rows])


def test_from_conv_is_deterministic_and_leaves_the_global_random_state() -> None:
    conv = nn.Conv2d(8, 30, 3)
    state = torch.get_rng_state()
    first, again, other = (from_conv(conv, depth=3, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
    assert not torch.equal(first.units[1].weight, other.units[1].weight)  # type: ignore[arg-type]


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("depth", [1, 2, 3])
def test_from_conv_keeps_the_variance(stride: int, depth: int) -> None:
    # Only the borders, where padding takes inputs away, and chance can make the ratio differ from one.
    torch.manual_seed(0)
    conv = nn.Conv2d(24, 140, 3, stride, 1, bias=False)
    with torch.no_grad():
        conv.weight *= torch.logspace(-1, 1, 140)[:, None, None, None]
    x = torch.randn(16, 24, 24, 24)
    inner = (..., slice(4, -4), slice(4, -4))
    dense = conv(x)[inner].square().mean((0, 2, 3))
    found = torch.stack(
        [from_conv(conv, depth=depth, seed=seed)(x)[inner].square().mean((0, 2, 3)) for seed in range(4)]
    )
    for rows in from_conv(conv, depth=depth).stands_for():
        ratio = (found.mean(0) / dense)[list(rows)].mean().item()
        assert ratio == pytest.approx(1, abs=0.15), ratio


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_from_conv_on_the_meta_device(rank: int) -> None:
    conv = RANKS[rank][1](6, 30, 3, device="meta")
    comp = from_conv(conv, depth=2)
    assert type(comp) is RANKS[rank][0] and all(parameter.is_meta for parameter in comp.parameters())
    x = torch.empty(1, 6, *[8] * rank, device="meta")
    assert comp(x).shape == conv(x).shape


def test_a_dead_source_channel_stays_finite() -> None:
    conv = nn.Conv2d(8, 30, 3)
    nn.init.zeros_(conv.weight)
    assert all(parameter.isfinite().all() for parameter in from_conv(conv, depth=3).parameters())


def test_state_dict_copy_and_pickle() -> None:
    comp = CompConv2d(9, 31, 3, padding=1, depth=3)
    x = torch.randn(1, 9, 5, 5)
    other = CompConv2d(9, 31, 3, padding=1, depth=3)
    other.load_state_dict(comp.state_dict())
    assert not list(comp.buffers())
    for twin in (other, copy.deepcopy(comp), pickle.loads(pickle.dumps(comp))):
        assert torch.equal(twin(x), comp(x))


def test_exports_for_every_size() -> None:
    comp = CompConv2d(9, 31, 3, 2, 1, depth=3).eval()
    size = {2: torch.export.Dim("height", min=4, max=64), 3: torch.export.Dim("width", min=4, max=64)}
    program = torch.export.export(comp, (torch.randn(1, 9, 8, 8),), dynamic_shapes=(size,)).module()
    for shape in ((8, 8), (9, 7), (13, 16)):
        x = torch.randn(1, 9, *shape)
        torch.testing.assert_close(program(x), comp(x))


# kernel, stride, padding, dilation and mode of the layers that are fitted
FITS: list[tuple[int, tuple[Any, ...], str, bool]] = [
    (2, (3, 1, 1, 1), "zeros", True),
    (2, (3, 2, 1, 1), "zeros", False),
    (2, (3, 3, 0, 2), "replicate", True),
    (2, (4, 1, "same", 1), "zeros", False),
    (2, (1, 2, 0, 1), "zeros", True),
    (2, ((1, 3), (2, 1), (0, 1), (1, 1)), "circular", True),
    (1, (3, 2, 1, 1), "reflect", True),
    (3, (2, 1, 1, 1), "zeros", True),
]


@pytest.mark.parametrize(("rank", "geometry", "mode", "bias"), FITS, ids=str)
@pytest.mark.parametrize("depth", [0, 1, 2, 3])
def test_fit_finds_a_layer_that_it_can_express(
    rank: int, geometry: tuple[Any, ...], mode: str, bias: bool, depth: int
) -> None:
    torch.manual_seed(rank)
    make = RANKS[rank][0]
    teacher, pupil = (
        make(4, 31, *geometry, bias=bias, padding_mode=mode, depth=depth, dtype=torch.float64) for _ in range(2)
    )
    sizes = {1: (400,), 2: (20, 21), 3: (7, 8, 9)}[rank]
    inputs = [torch.randn(6, 4, *sizes, dtype=torch.float64) for _ in range(2)]
    report = fit(pupil, [(x, teacher(x)) for x in inputs], ridge=1e-9, positions=1500)
    names = ["units.0", "units.1", "units.2"][: max(1, depth)] + ["tail"] * (depth > 0)
    assert [unit.name for unit in report] == names
    assert all(unit.after < 1e-9 < unit.before for unit in report)
    fresh = torch.randn(1, 4, *sizes, dtype=torch.float64)
    torch.testing.assert_close(pupil(fresh), teacher(fresh), rtol=1e-4, atol=1e-4)


def test_fit_is_the_least_squares_solution() -> None:
    torch.manual_seed(0)
    dense = nn.Conv2d(12, 40, 3, 2, 1, dtype=torch.float64)
    comp = from_conv(dense, depth=2)
    x = torch.randn(4, 12, 12, 12, dtype=torch.float64)
    fit(comp, [(x, dense(x))], ridge=0.0, positions=4 * 36)
    seen: list[Tensor] = []
    comp.units[1].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    y = comp(x)
    patches = F.unfold(seen[0], 3, padding=1).transpose(1, 2).flatten(0, 1)
    patches = torch.cat([patches, torch.ones_like(patches[:, :1])], 1)
    rows = list(comp.stands_for()[1])
    targets = dense(x)[:, rows].permute(0, 2, 3, 1).flatten(0, 2)
    expected = patches @ torch.linalg.lstsq(patches, targets).solution
    torch.testing.assert_close(y[:, rows].permute(0, 2, 3, 1).flatten(0, 2), expected, rtol=1e-6, atol=1e-6)


def test_fit_lowers_the_error_on_unseen_maps_and_a_strong_ridge_keeps_the_weights() -> None:
    torch.manual_seed(0)
    dense, blur = nn.Conv2d(32, 64, 3, 1, 1), nn.Conv2d(6, 32, 5, padding=2)
    seen, fresh = (blur(torch.randn(8, 6, 16, 16)).relu().detach() for _ in range(2))
    comp = from_conv(dense, depth=2)
    kept = copy.deepcopy(comp)
    rows = [row for unit in comp.stands_for() for row in unit]

    def error(module: nn.Module) -> float:
        return (module(fresh) - dense(fresh))[:, rows].square().mean().item()

    fit(kept, [(seen, dense(seen))], ridge=1e9)
    for name in ("units.0.weight", "units.1.weight", "tail.weight"):
        torch.testing.assert_close(kept.get_parameter(name), comp.get_parameter(name), rtol=1e-3, atol=1e-4)
    before = error(comp)
    fit(comp, [(seen, dense(seen))])
    assert error(comp) < 0.7 * before


def test_fit_leaves_the_weights_of_trimmed_channels() -> None:
    comp = CompConv2d(6, 29, 3, padding=1, depth=3)  # trims all 12 channels of a0 and one of b0
    before = copy.deepcopy(comp)
    report = fit(comp, [(x := torch.randn(4, 6, 9, 9), nn.Conv2d(6, 29, 3, padding=1)(x))])
    assert [unit.name for unit in report] == ["units.0", "units.1", "units.2"]
    assert torch.equal(comp.tail.weight, before.tail.weight)  # type: ignore[union-attr]
    assert torch.equal(comp.units[2].weight[-1], before.units[2].weight[-1])  # type: ignore[index]
    assert not torch.equal(comp.units[2].weight[-2], before.units[2].weight[-2])  # type: ignore[index]


def test_fit_refuses_what_it_cannot_use() -> None:
    comp = CompConv2d(6, 29, 3, padding=1, depth=3)
    with pytest.raises(CalibrationError, match="expected at least one pair"):
        fit(comp, [])
    with pytest.raises(CalibrationError, match=r"\(1, 29, 8, 8\), expected the CompConv's \(1, 29, 9, 9\)"):
        fit(comp, [(torch.zeros(1, 6, 9, 9), torch.zeros(1, 29, 8, 8))])
