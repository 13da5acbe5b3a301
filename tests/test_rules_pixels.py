"""Pixel shuffle and its inverse on bands, and axes moved by their several names."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import octify
from octify.layers import Split
from octify.layout import Layout
from octify.ops import shuffle_bands, unshuffle_bands
from octify.oracles import same_bits
from tests.oracles import by_definition, constant_image_error, forms, random_bands, random_layout, trains


def spread(layout: Layout, times: int) -> Layout:
    """Every channel so many times, one behind the other."""
    return Layout.of(
        [low for low in (index in layout.low_index for index in range(layout.channels)) for _ in range(times)]
    )


@pytest.mark.parametrize("size", [(6, 8), (5, 7), (1, 4)])
@pytest.mark.parametrize("factor", [1, 2, 3, 4])
@pytest.mark.parametrize("low", [2, 5])
def test_both_are_what_they_are_of_the_map_the_bands_stand_for(factor: int, size: tuple[int, int], low: int) -> None:
    few = random_layout(5, low)
    many = spread(few, factor**2)
    large = (factor * size[0], factor * size[1])
    for function, op, layout, out, shape in (
        (shuffle_bands, F.pixel_shuffle, many, few, size),
        (unshuffle_bands, F.pixel_unshuffle, few, many, large),
    ):
        bands = random_bands(layout, shape)
        wanted = by_definition(lambda x, op=op: op(x, factor), *bands, layout, out)
        for found, band in zip(function(*bands, factor), wanted, strict=True):
            torch.testing.assert_close(found, band, rtol=0, atol=1e-12)


class Upscaler(nn.Module):
    """Features at half of the size, as upscalers with pixel unshuffle compute them."""

    def __init__(self, factor: int = 2) -> None:
        super().__init__()
        area = factor**2
        self.stem, self.first = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)
        self.fewer, self.narrow = nn.PixelUnshuffle(factor), nn.Conv2d(16 * area, 24, 1)
        self.wide, self.more = nn.Conv2d(24, 16 * area, 3, padding=1), nn.PixelShuffle(factor)
        self.second, self.last = nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(16, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.first(torch.relu(self.stem(x))))
        y = self.wide(torch.relu(self.narrow(self.fewer(x))))
        return self.last(torch.relu(self.second(self.more(y) + x)))


def test_an_upscaler_stays_in_bands(tmp_path: Path) -> None:
    source = Upscaler().eval()
    image = torch.rand(2, 3, 40, 36)
    assert same_bits(octify.convert(source, alpha=0.0)(image), source(image))
    converted = octify.convert(source, alpha=0.5, example_inputs=(1, 3, 48, 48)).eval()
    assert forms(converted)["fewer"] == forms(converted)["more"] == "bands"
    assert not [module for module in converted.modules() if isinstance(module, Split)]
    image = torch.rand(2, 3, 58, 34)
    torch.testing.assert_close(octify.optimize(converted)(image), converted(image), rtol=1e-5, atol=1e-5)
    trains(source, (3, 48, 48), alpha=0.5)
    octify.save(converted, tmp_path / "net.safetensors")


def test_pixel_unshuffle_keeps_constant_images() -> None:
    source = nn.Sequential(nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 3), nn.PixelUnshuffle(2), nn.Conv2d(64, 8, 1))
    assert constant_image_error(source, (3, 40, 36), alpha=0.5) < 1e-9


@pytest.mark.parametrize("backend", ["onnx", "pt2"])
def test_an_upscaler_is_exported_for_open_sizes(backend: str, tmp_path: Path) -> None:
    converted = octify.convert(Upscaler().eval(), alpha=0.5, example_inputs=(1, 3, 48, 48)).eval()
    octify.export(converted, tmp_path / f"net.{backend}", format=backend)  # compares at two sizes


@pytest.mark.parametrize(
    "turned",
    [
        lambda x: x.movedim(1, -1).swapaxes(1, 2).movedim(-1, 1).transpose(2, 3),
        lambda x: torch.moveaxis(x, (2, 3), (1, 2)).permute(0, 3, 1, 2),
        lambda x: torch.transpose(x, dim0=1, dim1=3).swapdims(3, 1),
    ],
)
def test_axes_are_followed_by_all_their_names(turned: Callable[[Tensor], Tensor]) -> None:
    class Turned(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return self[2](turned(torch.relu(self[1](self[0](x)))))

    source = Turned(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3)).eval()
    image = torch.rand(2, 3, 40, 36)
    assert same_bits(octify.convert(source, alpha=0.0)(image), source(image))
    converted = octify.convert(source, alpha=0.5, example_inputs=(1, 3, 40, 36))
    assert set(list(forms(converted).values())[1:-1]) <= {"bands", "octave"}
    assert constant_image_error(source, (3, 40, 36), alpha=0.5) < 1e-9
