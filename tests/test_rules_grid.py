"""Padding and cutting by amounts that a network computes from its maps' sizes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import octify
from octify.layers import Merge, Split
from octify.ops import crop_bands, pad_bands
from octify.oracles import same_bits
from tests.oracles import constant_image_error, random_bands, random_layout, trains

SIZES = ((1, 3, 64, 64), (2, 3, 47, 61), (1, 3, 50, 64))


@pytest.mark.parametrize("size", [(8, 12), (7, 9)])
@pytest.mark.parametrize("rows", [(None, 5), (0, -2), (2, None), (4, 100), (2, -1)])
def test_a_crop_from_an_even_place_is_that_of_the_map_the_bands_stand_for(
    rows: tuple[Any, Any], size: tuple[int, int]
) -> None:
    layout = random_layout(6, 2)
    high, low = random_bands(layout, size)
    wanted = Merge(layout)(high, low)[:, :, slice(*rows), :5]
    found = Merge(layout)(*crop_bands(high, low, ((1, *rows), (0, None, 5))))
    torch.testing.assert_close(found, wanted, rtol=0, atol=0)


def test_a_crop_from_an_odd_place_is_a_negative_padding() -> None:
    layout = random_layout(6, 2)
    high, low = random_bands(layout, (9, 8))
    for wanted, found in zip(pad_bands(high, low, [0, 0, -3, -1]), crop_bands(high, low, ((1, 3, -1),)), strict=True):
        assert torch.equal(wanted, found)


class Decoder(nn.Module):
    """A U-Net's step up: what was upsampled is padded, or the other map cut, to one size."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way
        self.stem, self.down = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 32, 3, padding=1)
        self.up = nn.Sequential(nn.Upsample(scale_factor=2), nn.Conv2d(32, 16, 1))
        self.both = nn.Conv2d(32, 16, 3, padding=1)
        self.last = nn.Conv2d(16, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        skip = torch.relu(self.stem(x))
        x = self.up(torch.relu(self.down(F.max_pool2d(skip, 2))))
        if self.way == "pad":
            down, right = skip.size(2) - x.size(2), skip.size(3) - x.size(3)
            x = F.pad(x, [right // 2, right - right // 2, down // 2, down - down // 2], mode="replicate")
        else:
            skip = skip[:, :, : x.shape[2], : x.shape[3]]
        return self.last(torch.relu(self.both(torch.cat((skip, x), 1))))


@pytest.mark.parametrize("way", ["pad", "cut"])
def test_a_decoder_stays_in_bands_at_every_size(way: str) -> None:
    torch.manual_seed(0)
    source = Decoder(way).eval()
    octave = octify.convert(source, alpha=0.5, example_inputs=SIZES[0])
    assert {op.target for op in octify.plan_of(octave).converted} == {"down", "up.1", "both", "last"}
    assert not [module for module in octave.modules() if isinstance(module, (Split, Merge))]
    same, fast = octify.convert(source, alpha=0.0, example_inputs=SIZES[0]), octify.optimize(octave)
    with torch.no_grad():
        for size in SIZES:
            x = torch.randn(size)
            assert same_bits(source(x), same(x))
            wanted = octave(x)
            assert wanted.shape == source(x).shape and torch.allclose(fast(x), wanted, atol=1e-5)
    for size in SIZES:
        assert constant_image_error(Decoder(way), size[1:], alpha=0.5) < 1e-9
    trains(Decoder(way), SIZES[1][1:], alpha=0.5)


@pytest.mark.parametrize("way", ["pad", "cut"])
def test_a_decoder_is_exported_for_any_size(way: str, tmp_path: Path) -> None:
    octave = octify.convert(Decoder(way), alpha=0.5, example_inputs=SIZES[0]).eval()
    done = octify.export(octave, tmp_path / "net.onnx")
    assert done.dynamic == ("batch", "size") and done.error < 1e-4
