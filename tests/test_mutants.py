"""Broken on purpose: each fault must be noticed by an oracle, or the oracles prove nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from octify import layers, octbase, octconv, ops, resample
from octify.conversion import Conversion
from octify.recipe import Recipe
from octify.rules import channels, join, norm
from octify.rules.base import Bands
from octify.verify import all_checks

Patch = pytest.MonkeyPatch


class Net(nn.Module):
    """A bit of everything: cat, chunk, add, a gate, norms, a slope a channel, pooling, an opaque operation."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.left = nn.Conv2d(8, 16, 3, padding=1, bias=False)
        self.right = nn.Conv2d(8, 24, 3, padding=1)
        self.norm = nn.BatchNorm2d(40)
        self.slope = nn.PReLU(40)
        self.depthwise = nn.Conv2d(20, 20, 3, padding=1, groups=20)
        self.squeeze = nn.Conv2d(20, 20, 1)
        self.mix = nn.Conv2d(20, 32, 1)
        self.down = nn.Conv2d(32, 32, 3, stride=2, padding=1)
        self.head = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        x = torch.cat((self.left(x), self.right(x)), 1)
        first, second = self.slope(self.norm(x)).chunk(2, 1)
        first = first + 2 * self.depthwise(second)
        first = first * torch.sigmoid(self.squeeze(F.adaptive_avg_pool2d(first, 1)))
        x = self.mix(first)
        x = x + torch.cumsum(x, 1)  # no rule: a merge before, a split behind
        return self.head(self.down(x).mean((2, 3)))


def failures() -> set[str]:
    """The names of the checks that fail on the network above; a crash counts as one."""
    torch.manual_seed(0)
    reading = Conversion.read(Net(), Recipe.uniform(0.25), (1, 3, 64, 64))
    return {check.name for check in all_checks(reading) if not check.passed}


CONSTANT, BLOCKS = "equal on constant images", "equal on 2x2 blocks, layer by layer"


def test_without_a_fault_every_check_passes() -> None:
    assert not failures()


def swapped_cat(patch: Patch) -> None:
    """The inputs of a concatenation change places."""
    emit = channels.Cat.emit

    def wrong(self: Any, op: Any, build: Any) -> Any:
        function = build.function
        build.function = lambda f, *args, **more: (
            function(f, tuple(reversed(args[0])), *args[1:], **more) if f is torch.cat else function(f, *args, **more)
        )
        try:
            return emit(self, op, build)
        finally:
            del build.function

    patch.setattr(channels.Cat, "emit", wrong)


def wrong_slice_of_a_norm(patch: Patch) -> None:
    """A norm's parameters are taken from the channels before."""
    real = norm.slice_channels
    patch.setattr(
        norm,
        "slice_channels",
        lambda module, index, *rest: real(module, tuple((i + 1) % 40 for i in index), *rest),
    )


def swapped_bands_of_an_operand(patch: Patch) -> None:
    """An elementwise operation forgets its second operand's low band."""
    emit = join.Elementwise.emit

    def wrong(self: Any, op: Any, build: Any) -> Any:
        found = emit(self, op, build)
        return Bands(found.high, build.function(torch.mul, found.low, 1.5), found.layout, found.map)

    patch.setattr(join.Elementwise, "emit", wrong)


def order_forgotten_by_a_merge(patch: Patch) -> None:
    """A merge leaves the high channels first."""
    patch.setattr(
        layers.Merge,
        "forward",
        lambda self, *bands: torch.cat((bands[0], resample.up_to(bands[1], bands[0].shape[-2:])), 1).flip(1),
    )


def order_forgotten_by_a_global_mean(patch: Patch) -> None:
    """A global pooling gives its channels in another order."""
    patch.setattr(ops, "_in_order", lambda x, order, axis, spatial, keepdim: (x if keepdim else x.flatten(1)).flip(1))


def mirrored_low_band(patch: Patch) -> None:
    """A convolution mirrors what it gives low."""
    real = octconv.OctConv._to_low
    patch.setattr(octconv.OctConv, "_to_low", lambda self, *args: real(self, *args).flip(-1))


def shifted_upsampling(patch: Patch) -> None:
    """Upsampling is off by one."""
    for place in (octconv, layers):
        patch.setattr(place, "up_to", lambda x, size: resample.up_to(x, size).roll(1, -1))


def bilinear_upsampling(patch: Patch) -> None:
    """Upsampling smooths."""
    for place in (octconv, layers):
        patch.setattr(place, "up_to", lambda x, size: F.interpolate(x, size=list(size), mode="bilinear"))


def strided_pooling(patch: Patch) -> None:
    """Pooling takes one of four."""
    patch.setattr(layers, "pool_low", lambda x, spatial=2: torch.roll(x, 1, -1)[..., ::2, ::2])


def transposed_fold(patch: Patch) -> None:
    """The folded kernel is mirrored."""
    real = octbase.fold_weight
    patch.setattr(octbase, "fold_weight", lambda weight, taps: real(weight, taps).flip(-1))


def unfolded_kernel(patch: Patch) -> None:
    """The kernel is copied instead of folded, as the paper slices it."""
    real = octbase.fold_weight

    def copied(weight: Tensor, taps: Any) -> Tensor:
        folded = real(weight, taps)
        return weight.clone() if folded.shape == weight.shape else folded

    patch.setattr(octbase, "fold_weight", copied)


def wrong_channels_of_a_weight(patch: Patch) -> None:
    """A path takes the rows of a weight in reverse."""
    real = octbase.path_weight
    patch.setattr(octbase, "path_weight", lambda weight, *rest: real(weight, *rest).flip(0))


def a_path_left_out(patch: Patch) -> None:
    """Low to high adds nothing."""
    real = octconv.OctConv._run

    def wrong(self: Any, path: str, *args: Any) -> Tensor:
        return real(self, path, *args) * (0 if path == "lh" else 1)

    patch.setattr(octconv.OctConv, "_run", wrong)


def trainable_parameters_cut_off(patch: Patch) -> None:
    """A path's weight gets no gradient."""
    real = octconv.OctConv._run

    def wrong(self: Any, path: str, *args: Any) -> Tensor:
        found = real(self, path, *args)
        return found.detach() if path == "hl" else found

    patch.setattr(octconv.OctConv, "_run", wrong)


MUTANTS: list[tuple[Callable[[Patch], None], str]] = [
    (swapped_cat, CONSTANT),
    (wrong_slice_of_a_norm, CONSTANT),
    (swapped_bands_of_an_operand, CONSTANT),
    (order_forgotten_by_a_merge, CONSTANT),
    (order_forgotten_by_a_global_mean, CONSTANT),
    (wrong_channels_of_a_weight, CONSTANT),
    (a_path_left_out, CONSTANT),
    (mirrored_low_band, BLOCKS),
    (shifted_upsampling, BLOCKS),
    (bilinear_upsampling, BLOCKS),
    (strided_pooling, BLOCKS),
    (transposed_fold, BLOCKS),
    (unfolded_kernel, BLOCKS),
    (trainable_parameters_cut_off, "gradients reach every parameter"),
]


@pytest.mark.parametrize(("break_it", "noticed_by"), MUTANTS, ids=lambda value: getattr(value, "__name__", ""))
def test_a_fault_is_noticed(break_it: Callable[[Patch], None], noticed_by: str, monkeypatch: Patch) -> None:
    break_it(monkeypatch)
    assert noticed_by in failures()
