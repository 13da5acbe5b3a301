"""What networks are made of is part of one program of octify's own kernels, and gives the same."""

from __future__ import annotations

import pickle
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.layers import BatchNormAct2d, Conv2dSame, GroupNormAct, LayerNorm2d, ScaledStdConv2d
from torch import Tensor, fx, nn
from torch.nn import functional as F

import octify
from octify.layers import OctConvTranspose2d
from octify.optimize import build, flatten
from octify.optimize.native import Program, why_not
from tests.test_native import close, lowered
from tests.test_optimize import ready

pytestmark = pytest.mark.skipif(bool(why_not()), reason=f"octify's kernels need a C++ compiler: {why_not()}")


def program_of(net: nn.Module, *, alpha: float = 0.5, size: int = 48) -> tuple[fx.GraphModule, nn.Module]:
    """An octave network's form with programs, and the network."""
    octave_net = octify.convert(net.eval(), alpha=alpha, example_inputs=(1, 3, size, size)).eval()
    example = (torch.empty(1, 3, size, size, device="meta"),)
    form = build._with_programs(flatten(octave_net, example), example)
    assert form is not None
    return form, octave_net


class Block(nn.Module):
    """A residual block around what a function makes of a map of 24 channels."""

    def __init__(self, body: Callable[[Tensor], Tensor], *layers: nn.Module) -> None:
        super().__init__()
        self.layers, self.body = nn.ModuleList(layers), body
        self.first, self.last = nn.Conv2d(24, 24, 3, padding=1), nn.Conv2d(24, 24, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        for layer in self.layers:
            y = layer(y)
        return x + self.last(self.body(y))


class Scaled(nn.Module):
    """ConvNeXt's scale of a branch."""

    def __init__(self) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.linspace(-1, 1, 24))

    def forward(self, x: Tensor) -> Tensor:
        return x.mul(self.gamma.reshape(1, -1, 1, 1))


class Shifted(nn.Module):
    """One learned number for all channels, and another one."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.bias = nn.Parameter(torch.tensor([1.5])), nn.Parameter(torch.tensor([-0.25]))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * F.relu(x) + self.bias


def shuffled(x: Tensor) -> Tensor:
    n, c, h, w = x.size()
    return x.view(n, 3, c // 3, h, w).transpose(1, 2).contiguous().view(n, c, h, w)


def split(x: Tensor) -> Tensor:
    one, two, three = x.split([5, 11, 8], 1)
    return torch.cat((three, F.relu(one), two), 1)


def bilinear(x: Tensor) -> Tensor:
    x = F.avg_pool2d(F.max_pool2d(x, 3, stride=1, padding=1), 3, 1, 1)
    return F.interpolate(x, scale_factor=1, mode="bilinear")


def corners(x: Tensor) -> Tensor:
    return F.interpolate(F.relu(x), size=x.shape[2:], mode="bilinear", align_corners=True)


def around(x: Tensor) -> Tensor:
    return F.relu(x)


BLOCKS: dict[str, Callable[[], Block]] = {
    "layer norm": lambda: Block(F.gelu, LayerNorm2d(24)),
    "group norm": lambda: Block(F.silu, nn.GroupNorm(4, 24), GroupNormAct(24, 6)),
    "instance norm": lambda: Block(F.relu, nn.InstanceNorm2d(24, affine=True), nn.InstanceNorm2d(24)),
    "layer scale": lambda: Block(torch.sigmoid, nn.Conv2d(24, 24, 1), Scaled()),
    "learned numbers": lambda: Block(torch.tanh, Shifted()),
    "numbers": lambda: Block(lambda x: (1 - 2 * F.silu(x)) / 3),
    "number in place": lambda: Block(lambda x: F.gelu(x).mul_(1.7)),
    "difference": lambda: Block(lambda x: x - F.elu(x)),
    "product": lambda: Block(lambda x: F.relu(x) * x),
    "gate by position": lambda: Block(lambda x: x * x.mean(1, keepdim=True).sigmoid()),
    "slices": lambda: Block(lambda x: torch.cat((x[:, 7:], x[:, :7]), 1)),
    "every other": lambda: Block(lambda x: torch.cat((x[:, ::2], x[:, 1::2]), 1)),
    "shuffle": lambda: Block(shuffled),
    "split": lambda: Block(split),
    "chunks": lambda: Block(lambda x: x.chunk(2, 1)[0].repeat(1, 2, 1, 1) + x),
    "upsampling": lambda: Block(lambda x: F.interpolate(x, scale_factor=2.0), nn.MaxPool2d(2), nn.MaxPool2d(1, 1)),
    "bilinear": lambda: Block(bilinear, nn.MaxPool2d(2), nn.Upsample(scale_factor=2, mode="bilinear")),
    "corners": lambda: Block(corners, nn.AvgPool2d(2), nn.UpsamplingBilinear2d(scale_factor=2), nn.Conv2d(24, 24, 1)),
    "transposed": lambda: Block(
        F.relu, nn.Conv2d(24, 24, 2, 2), nn.ReLU(), nn.ConvTranspose2d(24, 24, 2, 2), nn.BatchNorm2d(24)
    ),
    "zeros around": lambda: Block(around, nn.ZeroPad2d((1, 2, 0, 3)), nn.Conv2d(24, 24, (4, 4))),
    "norm and activation": lambda: Block(F.relu, BatchNormAct2d(24), nn.ReLU(), BatchNormAct2d(24)),
    "padded by size": lambda: Block(F.relu, Conv2dSame(24, 24, 3), nn.BatchNorm2d(24)),
    "standardised": lambda: Block(F.relu, ScaledStdConv2d(24, 24, 3, padding=1)),
    "average": lambda: Block(F.relu, nn.AvgPool2d(3, 1, 1), nn.AvgPool2d(3, 1, 1, count_include_pad=False)),
}


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_what_a_program_holds(name: str, alpha: float) -> None:
    """In one program, at even and odd sizes, for batches."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 24, 3, padding=1), nn.ReLU(), BLOCKS[name](), nn.Conv2d(24, 4, 1))
    form, octave_net = program_of(ready(net), alpha=alpha)
    calls = [node.target for node in form.graph.nodes if node.op not in ("placeholder", "output", "get_attr")]
    # A mean over channels, repetition, groups of low channels alone and padded bands run on PyTorch.
    held = name not in ("gate by position", "chunks") and (alpha < 1 or name not in ("group norm", "instance norm"))
    held = held and (alpha == 0 or name != "zeros around")
    assert len(calls) == 1 or not held, calls
    with torch.no_grad():
        for size in ((48, 48), (52, 30), (47, 45)):
            if name in ("upsampling", "bilinear", "corners", "transposed") and size[0] % 2:
                continue  # halved and doubled
            x = torch.randn(2, 3, *size)
            assert close(form(x), octave_net(x)), size


@st.composite
def transposed_layers(draw: st.DrawFn) -> nn.ConvTranspose2d:
    """Of stride 2, of any other geometry."""
    kernel, dilation = (draw(st.tuples(st.integers(1, 5), st.integers(1, 5))), draw(st.sampled_from((1, 1, 2, 3))))
    padding = tuple(draw(st.integers(0, min(3, dilation * (size - 1)))) for size in kernel)
    more = draw(st.integers(0, 1))
    return nn.ConvTranspose2d(12, 12, kernel, 2, padding, more, bias=draw(st.booleans()), dilation=dilation)


@settings(max_examples=40, deadline=None)
@given(layer=transposed_layers(), alpha=st.sampled_from((0.0, 0.5, 1.0)), size=st.tuples(*[st.integers(29, 34)] * 2))
def test_transposed_layers_of_any_geometry(layer: nn.ConvTranspose2d, alpha: float, size: tuple[int, int]) -> None:
    net = nn.Sequential(nn.Conv2d(3, 12, 1), nn.Conv2d(12, 12, 3, padding=1), nn.ReLU(), layer, nn.BatchNorm2d(12),
                        nn.ReLU(), nn.Conv2d(12, 12, 1), nn.Conv2d(12, 4, 1))  # fmt: skip
    form, octave_net = program_of(ready(net), alpha=alpha, size=32)
    assert [node.op for node in form.graph.nodes].count("call_module") == 1
    assert alpha == 0 or type(octave_net.get_submodule("3")) is OctConvTranspose2d
    with torch.no_grad():
        x = torch.randn(2, 3, *size)
        assert close(form(x), octave_net(x))


def test_strided_layers_at_odd_sizes_and_bands_without_high_channels() -> None:
    class Net(nn.Module):
        """What repeats the edge on the low grid, pools both bands, and merges what is added to a dense map."""

        def __init__(self) -> None:
            super().__init__()
            self.stem, self.down = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 2, 2)
            self.pool, self.body = nn.AvgPool2d(3, 2, 1), nn.Conv2d(16, 16, 3, stride=2, padding=1)
            self.last = nn.Conv2d(16, 8, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            x = F.relu(self.stem(x))
            x = F.relu(self.down(x))
            return self.last(F.relu(self.body(x)) + self.pool(x))

    for alpha in (0.5, 1.0):
        form, octave_net = program_of(Net(), alpha=alpha, size=64)
        assert [node.op for node in form.graph.nodes].count("call_module") == 1
        with torch.no_grad():
            for size in ((64, 64), (66, 70), (61, 59), (63, 65)):
                x = torch.randn(2, 3, *size)
                assert close(form(x), octave_net(x)), (alpha, size)


def test_parts_of_inputs_and_outputs() -> None:
    """A part of what comes in or goes out lies in memory that each call brings."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Conv2d(5, 6, 3, padding=1), nn.Conv2d(4, 6, 1)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            y = F.relu(self.one(x[:, 2:7]))
            return y, y[:, 1:3], self.two(y[:, 2:]) + self.two(x[:, 4:])

    net = Net().eval()
    x = torch.randn(2, 8, 9, 7)
    with torch.no_grad():
        module, programs = lowered(net, x)
        assert len(programs) == 1
        for _ in range(2):
            x = torch.randn(2, 8, 9, 7)
            assert all(close(found, wanted) for found, wanted in zip(module(x), net(x), strict=True))


def test_a_form_with_functions_between_its_programs_pickles() -> None:
    net = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1), nn.Softmax2d(),
                        nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(16, 4, 1))  # fmt: skip
    form, octave_net = program_of(net)
    assert sum(isinstance(part, Program) for part in form.modules()) > 1
    x = torch.randn(1, 3, 40, 44)
    with torch.no_grad():
        assert close(pickle.loads(pickle.dumps(form))(x), octave_net(x))


class Last(nn.Module):
    """ConvNeXt's block as torchvision writes it: norm, linear layers and GELU with channels last."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(24, 24, 7, padding=3, groups=24), nn.LayerNorm(24)
        self.one, self.two = nn.Linear(24, 48), nn.Linear(48, 24)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.conv(x).permute(0, 2, 3, 1))
        return x + self.two(F.gelu(self.one(y))).permute(0, 3, 1, 2)


@pytest.mark.parametrize("alpha", [0.0, 0.5])
def test_channels_last_layers_and_the_head_are_part_of_the_program(alpha: float) -> None:
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 40), nn.Hardswish(), nn.Linear(40, 10)]
    body = [nn.Conv2d(3, 24, 3, padding=1), nn.Conv2d(24, 24, 1), Last(), Last(), nn.Conv2d(24, 16, 1)]
    form, octave_net = program_of(nn.Sequential(*body, *head), alpha=alpha)
    calls = [node.target for node in form.graph.nodes if node.op not in ("placeholder", "output", "get_attr")]
    assert len(calls) == 2, "the program, and the flattening of what it gives"
    with torch.no_grad():
        for size in ((48, 48), (33, 50)):
            x = torch.randn(3, 3, *size)
            assert close(form(x), octave_net(x)), size


def test_what_is_one_position_at_one_size_only_is_not_flattened_for_all() -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 4, 4), nn.Flatten(), nn.Linear(8, 5)).eval()
    form = build._with_programs(
        flatten(net, (torch.empty(1, 3, 4, 4, device="meta"),)), (torch.empty(1, 3, 4, 4, device="meta"),)
    )
    assert form is not None
    with torch.no_grad():
        x = torch.randn(2, 3, 4, 4)
        assert close(form(x), net(x))
        with pytest.raises(RuntimeError):
            form(torch.randn(2, 3, 8, 8))
