"""Networks drawn at random from what users' networks are made of: the oracles hold for each of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.layers import LayerNorm2d
from torch import Tensor, nn
from torch.nn import functional as F

import octify
from octify.oracles import ReplicatePadding
from octify.recipe import Recipe

WIDTH = 16


class Residual(nn.Module):
    """x plus, minus or times what a part makes of it."""

    def __init__(self, body: nn.Module, how: str) -> None:
        super().__init__()
        self.body, self.how = body, how

    def forward(self, x: Tensor) -> Tensor:
        y = self.body(x)
        ways = {
            "add": lambda: x + y,
            "sub": lambda: x - 0.5 * y,
            "mul": lambda: x * y.sigmoid(),
            "product": lambda: x * y,
        }
        return ways[self.how]()


class Concatenation(nn.Module):
    """A part's output beside its input, brought back to the width."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body, self.join = body, nn.Conv2d(2 * WIDTH, WIDTH, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.join(torch.cat((x, self.body(x)), 1))


class Halves(nn.Module):
    """Half of the channels through a part of that width; the halves are put back and shuffled."""

    def __init__(self, kernel: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(WIDTH // 2, WIDTH // 2, kernel, padding=kernel // 2)

    def forward(self, x: Tensor) -> Tensor:
        one, two = x.chunk(2, 1)
        x = torch.cat((one, F.relu(self.conv(two))), 1)
        n, c, h, w = x.shape
        return x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)


class Slices(nn.Module):
    """The channels in two parts, changed over, one of them with numbers of its own."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self.at = at

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat((x[:, self.at :], (1 - x[:, : self.at]) / 2), 1)


class Gate(nn.Module):
    """Squeeze and excitation."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = nn.Conv2d(WIDTH, 4, 1), nn.Conv2d(4, WIDTH, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.up(F.relu(self.down(x.mean((2, 3), keepdim=True)))).sigmoid()


class SpatialGate(nn.Module):
    """CBAM's gate by position."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 1, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.conv(torch.cat((x.mean(1, keepdim=True), x.amax(1, keepdim=True)), 1)).sigmoid()


class Scales(nn.Module):
    """A coarser branch brought back to the size of its input."""

    def __init__(self, mode: str) -> None:
        super().__init__()
        self.conv, self.mode = nn.Conv2d(WIDTH, WIDTH, 3, stride=2, padding=1), mode

    def forward(self, x: Tensor) -> Tensor:
        return x + F.interpolate(self.conv(x), size=x.shape[-2:], mode=self.mode)


class Scale(nn.Module):
    """A learned number a channel."""

    def __init__(self) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.linspace(0.5, 1.5, WIDTH).view(1, WIDTH, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


ACTIVATIONS = (nn.ReLU, nn.SiLU, nn.GELU, nn.Hardswish, nn.LeakyReLU, nn.ELU, nn.Mish, nn.Hardtanh)
Draw = Callable[[st.SearchStrategy[Any]], Any]
PADDINGS = ("zeros", "reflect", "replicate", "circular")
PIECES: dict[str, Callable[[Draw], nn.Module]] = {
    "conv": lambda draw: _conv(draw),
    "depthwise": lambda draw: nn.Conv2d(WIDTH, WIDTH, 3, padding=1, groups=WIDTH),
    "same": lambda draw: nn.Conv2d(WIDTH, WIDTH, draw(st.sampled_from([2, 3, (1, 5)])), padding="same"),
    "batch norm": lambda draw: nn.BatchNorm2d(WIDTH),
    "group norm": lambda draw: nn.GroupNorm(draw(st.sampled_from([1, 4, WIDTH])), WIDTH),
    "activation": lambda draw: draw(st.sampled_from(ACTIVATIONS))(),
    "channel norm": lambda draw: LayerNorm2d(WIDTH),
    "product": lambda draw: Residual(nn.Conv2d(WIDTH, WIDTH, 1), "product"),
    "slices": lambda draw: Slices(draw(st.integers(1, WIDTH - 1))),
    "prelu": lambda draw: nn.PReLU(WIDTH),
    "pool": lambda draw: draw(
        st.sampled_from([
            nn.MaxPool2d(2), nn.MaxPool2d(3, 2, 1), nn.MaxPool2d(2, ceil_mode=True), nn.AvgPool2d(3, 1, 1),
            nn.AvgPool2d(2, ceil_mode=True, count_include_pad=False),
        ])
    ),
    "pad": lambda draw: draw(
        st.sampled_from([nn.ReflectionPad2d(1), nn.ReplicationPad2d((1, 0, 2, 1)), nn.ZeroPad2d((0, 1, 0, 1))])
    ),
    "gate": lambda draw: Gate(),
    "spatial gate": lambda draw: SpatialGate(),
    "halves": lambda draw: Halves(draw(st.sampled_from([1, 3]))),
    "scales": lambda draw: Scales(draw(st.sampled_from(["nearest", "bilinear"]))),
    "scale": lambda draw: Scale(),
    "dropout": lambda draw: nn.Dropout2d(0.1),
    "residual": lambda draw: Residual(_same_size(draw), draw(st.sampled_from(["add", "sub", "mul"]))),
    "concatenation": lambda draw: Concatenation(_same_size(draw)),
}  # fmt: skip


def _conv(draw: Draw) -> nn.Conv2d:
    kernel, dilation = draw(st.integers(1, 5)), draw(st.integers(1, 2))
    return nn.Conv2d(
        WIDTH, WIDTH, kernel, draw(st.sampled_from([1, 1, 1, 2, 3, (1, 2)])), dilation * (kernel - 1) // 2, dilation,
        groups=draw(st.sampled_from([1, 1, 2, 4])), bias=draw(st.booleans()),
        padding_mode=draw(st.sampled_from(PADDINGS)),
    )  # fmt: skip


def _same_size(draw: Draw) -> nn.Module:
    return nn.Sequential(nn.Conv2d(WIDTH, WIDTH, 3, padding=1), nn.BatchNorm2d(WIDTH), nn.ReLU())


@st.composite
def networks(draw: Draw) -> nn.Sequential:
    """A stem, pieces with a convolution here and there, and a classifier."""
    names = draw(st.lists(st.sampled_from([*PIECES]), min_size=3, max_size=9))
    body: list[nn.Module] = []
    for name in names:
        body.append(PIECES[name](draw))
        if name in ("batch norm", "pool", "pad"):
            body.append(nn.Conv2d(WIDTH, WIDTH, 3, padding=1))
    return nn.Sequential(
        nn.Conv2d(3, WIDTH, 3, padding=1), nn.ReLU(), *body, nn.Conv2d(WIDTH, WIDTH, 3, padding=1),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(WIDTH, 5),
    )  # fmt: skip


ALPHAS, SIZES = st.sampled_from([0.25, 0.5, 0.75, 1.0]), st.sampled_from([(40, 40), (37, 43)])


def _prepared(net: nn.Module, alpha: float, size: tuple[int, int], seed: int) -> tuple[nn.Module, Tensor, nn.Module]:
    """The network with weights that keep the variance, two images, and the octave network; double precision."""
    torch.manual_seed(seed)
    for parameter in net.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=(2 / parameter[0].numel()) ** 0.5)
    image = torch.rand(2, 3, *size, dtype=torch.float64)
    recipe = Recipe.from_dict({"version": 1, "defaults": {"alpha": alpha, "min_size": 4}}, "fuzz")
    net = net.double().eval()
    return net, image, octify.convert(net, recipe=recipe, example_inputs=image[:1]).eval()


@settings(max_examples=60)
@given(networks(), ALPHAS, SIZES, st.integers(0, 999))
def test_the_oracles_hold_for_any_network(net: nn.Module, alpha: float, size: tuple[int, int], seed: int) -> None:
    net, image, octave = _prepared(net, alpha, size, seed)
    assert octave(image).shape == net(image).shape

    nothing = octify.convert(net, alpha=0.0, example_inputs=image[:1]).eval()
    assert torch.equal(nothing(image), net(image))

    flat = image[..., :1, :1].expand(2, 3, *size).contiguous()
    with ReplicatePadding(), torch.no_grad():
        assert torch.allclose(octave(flat), net(flat), rtol=1e-9, atol=1e-9)

    octave.train()(image).square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in octave.parameters())


@settings(max_examples=20)
@given(networks(), ALPHAS, SIZES, st.integers(0, 999))
def test_the_optimised_form_gives_the_same(net: nn.Module, alpha: float, size: tuple[int, int], seed: int) -> None:
    _, image, octave = _prepared(net, alpha, size, seed)
    images = [image, image[:1, :, :-3, :-2]]
    with torch.no_grad():
        wanted = [octave(each) for each in images]
        octave = octave.float()
        fast = octify.optimize(octave, example_inputs=images[0][:1].float())
        for each, expected in zip(images, wanted, strict=True):
            # Where a net blows rounding up, its own form does so as well, most of all where channels are last.
            own = octave(each.float().contiguous(memory_format=torch.channels_last)) - expected
            found = fast(each.float()) - expected
            assert found.abs().max() <= max(1e-5 * expected.abs().max().clamp_min(1), 8 * own.abs().max())
