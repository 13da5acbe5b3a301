"""Linear layers on channels-last maps, and transposed convolutions, inside networks."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from octify import convert, plan, plan_of
from octify.layout import Layout
from octify.linear import OctLinear
from tests.oracles import by_definition, constant_image_error, forms, random_bands, random_layout, trains


@pytest.mark.parametrize("size", [(8, 6), (7, 9), (1, 5)])
@pytest.mark.parametrize("reads", [Layout.dense(6), random_layout(6, 2), Layout.last(6, 6)])
@pytest.mark.parametrize("gives", [Layout.dense(10), random_layout(10, 4), Layout.last(10, 10)])
def test_a_linear_layer_of_bands_is_that_of_the_map_they_stand_for(
    reads: Layout, gives: Layout, size: tuple[int, int]
) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(6, 10).double()
    high, low = random_bands(reads, size)
    layer = OctLinear.from_linear(linear, reads, gives)
    given = layer(*((high.movedim(1, -1),) if reads.is_dense else (high.movedim(1, -1), low.movedim(1, -1))))
    bands = (given,) if gives.is_dense else given
    wanted = by_definition(lambda x: linear(x.movedim(1, -1)).movedim(-1, 1), high, low, reads, gives)
    for band, expected in zip(bands, wanted, strict=False):
        torch.testing.assert_close(band.movedim(-1, 1), expected, rtol=1e-9, atol=1e-9)
    assert sum(p.numel() for p in layer.parameters()) == sum(p.numel() for p in linear.parameters())


class Block(nn.Module):
    """ConvNeXt's block as torchvision and timm write it."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.dw = nn.Conv2d(channels, channels, 7, padding=3, groups=channels)
        self.norm, self.up, self.act = nn.LayerNorm(channels), nn.Linear(channels, 4 * channels), nn.GELU()
        self.down = nn.Linear(4 * channels, channels)
        self.gamma = nn.Parameter(torch.rand(channels))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.dw(x).permute(0, 2, 3, 1))
        y = self.down(self.act(self.up(y))).permute(0, 3, 1, 2)
        return x + y.mul(self.gamma.reshape(1, -1, 1, 1))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.grow = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 16, 1)
        self.block, self.more = Block(16), Block(16)
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.more(self.block(self.grow(self.stem(x)))).mean((2, 3)))


class Decoder(nn.Module):
    """Two transposed convolutions, the second one depthwise."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.down = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 16, 3, stride=2, padding=1)
        self.up, self.wide = nn.ConvTranspose2d(16, 12, 2, stride=2), nn.ConvTranspose2d(12, 12, 4, 2, 1, groups=12)
        self.grouped = nn.ConvTranspose2d(12, 8, 2, stride=2, groups=4)
        self.out = nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.grouped(self.wide(self.up(self.down(self.stem(x))))))


@pytest.mark.parametrize("alpha", [0.25, 0.5, 1.0])
def test_a_channels_last_network_keeps_a_constant_image(alpha: float) -> None:
    torch.manual_seed(0)
    assert constant_image_error(Net(), alpha=alpha) < 1e-9


@pytest.mark.parametrize("alpha", [0.25, 0.5, 1.0])
def test_transposed_convolutions_whose_taps_are_equal_keep_a_constant_image(alpha: float) -> None:
    """Else they make a pattern of 2x2 positions out of a constant, which a low band cannot hold."""
    torch.manual_seed(0)
    net = Decoder()
    net.wide = nn.ConvTranspose2d(12, 12, 2, 2, groups=12)
    for layer in (net.up, net.wide, net.grouped):
        layer.weight.data[:] = layer.weight.data.mean((2, 3), keepdim=True)
    assert constant_image_error(net, alpha=alpha) < 1e-9


def test_a_channels_last_block_is_converted_without_adapters() -> None:
    made = forms(convert(Net(), alpha=0.5, example_inputs=(1, 3, 32, 32)))
    octave = {target for target, form in made.items() if form == "octave"}
    assert octave == {"grow", *(f"{b}.{part}" for b in ("block", "more") for part in ("dw", "up", "down"))}
    converted = convert(Net(), alpha=0.5, example_inputs=(1, 3, 32, 32))
    assert not [node for node in converted.graph.nodes if str(node.target).startswith(("octify_split", "octify_merge"))]
    trains(Net(), alpha=0.5)


def test_transposed_convolutions_are_converted_and_train() -> None:
    made = forms(trains(Decoder(), alpha=0.5))
    assert [made[name] for name in ("down", "up", "wide", "grouped", "out")] == ["octave"] * 5


def test_a_linear_layer_on_vectors_or_tokens_is_no_convolution() -> None:
    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.conv = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
            self.next, self.token, self.head = nn.Conv2d(8, 8, 1), nn.Linear(8, 8), nn.Linear(8, 5)

        def forward(self, x: Tensor) -> Tensor:
            x = self.next(self.conv(self.stem(x)))
            return self.head(self.token(x.flatten(2).transpose(1, 2)).mean(1))

    decided = plan(Tokens(), alpha=0.5, example_inputs=(1, 3, 32, 32))
    assert {op.target for op in decided.convolutions} == {"stem", "conv", "next"}
    converted = convert(Tokens(), alpha=0.5, example_inputs=(1, 3, 32, 32))
    assert plan_of(converted).get("token").kind == "plain"  # pyright: ignore
    assert converted(torch.randn(2, 3, 32, 32)).shape == (2, 5)
