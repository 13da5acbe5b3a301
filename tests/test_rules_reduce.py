"""Reductions over channels and over branches, stacks of maps, and timm's gates built on them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from timm.layers import SelectiveKernel, SplitAttn
from timm.layers.create_attn import create_attn
from torch import Tensor, nn
from torch.nn import functional as F

from octify import convert, plan, plan_of
from octify.layers import Merge
from octify.layout import Layout
from octify.ops import along_axes, global_sum, over_channels, over_parts
from octify.optimize import optimize
from tests.oracles import constant_image_error, forms, random_bands, random_layout, trains


@pytest.mark.parametrize("size", [(8, 6), (7, 9)])
@pytest.mark.parametrize("kind", ["mean", "sum", "amax"])
@pytest.mark.parametrize("layout", [random_layout(12, 5), Layout.last(12, 12)])
def test_a_reduction_over_channels_is_that_of_the_map_the_bands_stand_for(
    kind: str, size: tuple[int, int], layout: Layout
) -> None:
    torch.manual_seed(0)
    high, low = random_bands(layout, size)
    dense = Merge(layout)(high, low)
    for keep in (True, False):
        wanted = getattr(dense, kind)(1, keepdim=keep)
        torch.testing.assert_close(over_channels(high, low, kind, 1, 2, keep), wanted)
        last = over_channels(high.movedim(1, -1), low.movedim(1, -1), kind, 3, 2, keep)
        torch.testing.assert_close(last, getattr(dense.movedim(1, -1), kind)(-1, keepdim=keep))
    torch.testing.assert_close(global_sum(high, low, layout.order, 1, (2, 3), False), dense.sum((2, 3)))


@pytest.mark.parametrize("size", [(8, 6), (7, 9)])
@pytest.mark.parametrize("kind", ["mean", "sum", "amax"])
@pytest.mark.parametrize("layout", [random_layout(12, 5), Layout.last(12, 12)])
@pytest.mark.parametrize("where", [2, 3])
def test_a_reduction_along_one_axis_is_that_of_the_map_the_bands_stand_for(
    kind: str, size: tuple[int, int], layout: Layout, where: int
) -> None:
    high, low = random_bands(layout, size)
    dense = Merge(layout)(high, low)
    for keep in (True, False):
        wanted = getattr(dense, kind)(where, keepdim=keep)
        found = along_axes(high, low, kind, layout.order, 1, (2, 3), (where,), keep)
        torch.testing.assert_close(found, wanted)
        last = along_axes(high.movedim(1, -1), low.movedim(1, -1), kind, layout.order, 3, (1, 2), (where - 1,), keep)
        torch.testing.assert_close(last, getattr(dense.movedim(1, -1), kind)(where - 1, keepdim=keep))


class Reduced(nn.Module):
    """A map that only reductions read, written in one of several ways."""

    def __init__(self, reduce: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.stem, self.body, self.reduce = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1), reduce

    def forward(self, x: Tensor) -> Tensor:
        return self.reduce(self.body(self.stem(x)))


REDUCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "one after the other": lambda x: x.mean(3).mean(2),
    "rows": lambda x: F.adaptive_avg_pool2d(x, (None, 1)),
    "columns": lambda x: F.adaptive_max_pool2d(x, (1, None)),
    "maximum of channels": lambda x: torch.max(x, dim=1, keepdim=True)[0],
    "maximum of parts": lambda x: x.view(x.shape[0], 2, 8, *x.shape[2:]).max(1)[0].sum(-1),
}


@pytest.mark.parametrize("way", REDUCTIONS)
def test_what_reductions_read_stays_in_bands(way: str) -> None:
    torch.manual_seed(0)
    source = Reduced(REDUCTIONS[way])
    net = convert(source, alpha=0.5, example_inputs=(2, 3, 32, 32))
    assert [op.target for op in plan_of(net).converted] == ["body"]
    assert not any(isinstance(module, Merge) for module in net.modules())
    assert constant_image_error(source, alpha=0.5) < 1e-9
    trains(source, alpha=0.5)


def test_places_of_maxima_are_those_of_a_dense_map() -> None:
    decided = plan(Reduced(lambda x: torch.max(x, dim=1)[1]), alpha=0.5, example_inputs=(2, 3, 32, 32))
    assert not decided.converted


@pytest.mark.parametrize("kind", ["mean", "sum", "amax"])
@pytest.mark.parametrize("first", [True, False])
def test_a_reduction_over_branches_is_one_a_band(kind: str, first: bool) -> None:
    branch = random_layout(6, 2)
    bits = branch.bits * 3 if first else tuple(bit for bit in branch.bits for _ in range(3))
    high, low = random_bands(Layout(bits), (7, 6))
    shape, axis = ((3, 6), 1) if first else ((6, 3), 2)
    wanted = getattr(Merge(Layout(bits))(high, low).unflatten(1, shape), kind)(axis)
    bands = [over_parts(band, kind, 1, 3, first) for band in (high, low)]
    if kind == "amax":
        assert [tuple(band.shape[:2]) for band in bands] == [(2, 4), (2, 2)]
    torch.testing.assert_close(Merge(branch)(*bands), wanted)


class Branches(nn.Module):
    """Two branches weighed against each other and added: by `stack`, a 5-D view, or an unsqueezed cat."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.one, self.two = nn.Conv2d(8, 12, 3, padding=1), nn.Conv2d(8, 12, 1)
        self.both = nn.Conv2d(8, 24, 3, padding=1, groups=2)
        self.gate, self.out = nn.Conv2d(12, 24, 1), nn.Conv2d(12, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        if self.way == "stack":
            maps = torch.stack([self.one(x), self.two(x)], dim=1)
        elif self.way == "unsqueeze":
            maps = torch.cat([self.one(x).unsqueeze(1), self.two(x).unsqueeze(1)], 1)
        else:
            maps = self.both(x)
            maps = maps.reshape(x.shape[0], 2, 12, x.shape[2], x.shape[3])
        weights = self.gate(maps.sum(1).mean((2, 3), keepdim=True)).view(-1, 2, 12, 1, 1).softmax(1)
        return self.out((maps * weights).sum(dim=1)).mean((2, 3))


@pytest.mark.parametrize("alpha", [0.25, 0.5])
@pytest.mark.parametrize("way", ["stack", "view"])
def test_weighed_branches_keep_a_constant_image_and_stay_in_bands(way: str, alpha: float) -> None:
    torch.manual_seed(0)
    assert constant_image_error(Branches(way), alpha=alpha) < 1e-9
    net = Branches(way)
    for name in {"stack": ["both"], "view": ["one", "two"]}[way]:
        delattr(net, name)
    made = trains(net, alpha=alpha)
    assert {forms(made)[name] for name in ("out", *(["one", "two"] if way == "stack" else ["both"]))} == {"octave"}
    assert not [node for node in made.graph.nodes if str(node.target).startswith("octify_")]


def test_branches_joined_otherwise_are_right_too() -> None:
    torch.manual_seed(0)
    assert constant_image_error(Branches("unsqueeze"), alpha=0.5) < 1e-9


def test_a_radix_convolution_gets_the_same_channels_low_in_every_branch() -> None:
    made = convert(Branches("view"), alpha=0.5, example_inputs=(1, 3, 32, 32))
    (given,) = plan_of(made).get("both").gives  # pyright: ignore
    layout = Layout.parse(given)
    assert layout[:12] == layout[12:] and layout.low == 12


class Gated(nn.Module):
    def __init__(self, gate: nn.Module) -> None:
        super().__init__()
        self.stem, self.conv = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 16, 3, padding=1)
        self.gate, self.out = gate, nn.Conv2d(16, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.gate(self.conv(self.stem(x)))).mean((2, 3))


GATES: dict[str, Any] = {
    **{name: lambda name=name: create_attn(name, 16) for name in ("se", "ese", "eca", "gc", "cbam", "lcbam")},
    "ge": lambda: create_attn("ge", 16, use_mlp=False),
    "gather": lambda: create_attn("ge", 16, use_mlp=False, extent=4),
    "split": lambda: SplitAttn(16, kernel_size=3, groups=2),
    "selective": lambda: SelectiveKernel(16, 16),
    "selective/halves": lambda: SelectiveKernel(16, 16, split_input=True),
}


@pytest.mark.parametrize("name", GATES)
def test_timms_gates_keep_a_constant_image_and_let_both_sides_convert(name: str) -> None:
    torch.manual_seed(0)
    # The oracle is about constant maps: a window that hangs over the border is none of its business.
    if name != "gather":
        assert constant_image_error(Gated(GATES[name]()), alpha=0.5) < 1e-6
    made = forms(trains(Gated(GATES[name]()), alpha=0.5))
    assert made["conv"] == made["out"] == "octave"


def test_the_convolution_over_eca_vectors_does_not_count() -> None:
    decided = plan_of(convert(Gated(create_attn("eca", 16)), alpha=0.5, example_inputs=(1, 3, 32, 32)))  # pyright: ignore
    assert {op.target for op in decided.convolutions} == {"stem", "conv", "out"}


class Covered(nn.Module):
    """CBAM's gate of channels: windows as large as the map, whatever its size."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)
        self.gate, self.last = nn.Linear(16, 16), nn.Conv2d(16, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.second(torch.relu(self.first(x))))
        mean = F.avg_pool2d(x, (x.size(2), x.size(3)), stride=(x.size(2), x.size(3)))
        most = F.max_pool2d(x, x.size()[2:]).flatten(1)
        x = x * torch.sigmoid(self.gate(mean.flatten(1)) + self.gate(most))[:, :, None, None]
        return F.avg_pool2d(self.last(x), kernel_size=x.shape[-2:])


def test_windows_that_are_computed_to_cover_the_map_reduce_it() -> None:
    source = Covered().eval()
    octave = convert(source, alpha=0.5, example_inputs=(1, 3, 40, 48)).eval()
    pools = [op.form for op in plan_of(octave).ops if "pool" in op.target]
    assert pools == ["bands"] * 3
    assert constant_image_error(Covered(), (3, 40, 48), alpha=0.5) < 1e-9
    for size in ((40, 48), (41, 33)):
        image = torch.rand(2, 3, *size)
        same = convert(source, alpha=0.0)
        assert torch.equal(same(image), source(image))
        assert octave(image).shape == source(image).shape
        torch.testing.assert_close(optimize(octave)(image), octave(image), rtol=1e-4, atol=1e-5)
