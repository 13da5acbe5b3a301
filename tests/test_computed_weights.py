"""Convolutions that compute their weights whenever they run: standardised, scaled, masked, shared."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import octify
from octify.conversion import Conversion
from octify.oracles import constant_error, same_bits
from octify.recipe import Recipe
from octify.verify import all_checks
from tests.oracles import forms, trains


class Standardised(nn.Conv2d):
    """Weight standardisation as it is written by hand."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight
        centred = weight - weight.mean(dim=(1, 2, 3), keepdim=True)
        scale = torch.sqrt(torch.var(weight.view(weight.size(0), -1), dim=1) + 1e-5).view(-1, 1, 1, 1)
        return F.conv2d(x, centred / scale, self.bias, self.stride, self.padding, self.dilation, self.groups)


class Equalised(nn.Module):
    """A learning rate for all layers, as in GANs that grow."""

    def __init__(self, reads: int, gives: int, kernel: int) -> None:
        super().__init__()
        self.weight, self.bias = (
            nn.Parameter(torch.randn(gives, reads, kernel, kernel)),
            nn.Parameter(torch.ones(gives)),
        )
        self.scale, self.padding = (reads * kernel**2) ** -0.5, kernel // 2

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight * self.scale, self.bias * 0.5, padding=self.padding)


class Masked(nn.Conv2d):
    """A weight times a buffer."""

    def __init__(self, *args: int, **options: int) -> None:
        super().__init__(*args, **options)
        self.register_buffer("mask", (torch.rand_like(self.weight) > 0.5).float())

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.mask * self.weight, self.bias)


class Net(nn.Module):
    """A head on two sizes has its weights once."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = Standardised(3, 16, 3, padding=1)
        self.standard = Standardised(16, 32, 3, 2, 1)
        self.equal, self.mask = Equalised(32, 32, 3), Masked(32, 32, 3, padding=1, groups=4)
        self.head, self.last = Equalised(32, 32, 1), nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.standard(torch.relu(self.stem(x))))
        x = x + self.mask(torch.relu(self.equal(x)))
        return self.last(self.head(x).mean((2, 3)) + self.head(F.avg_pool2d(x, 2)).mean((2, 3)))


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    return Net().eval()


def test_they_are_converted_with_the_weights_of_the_moment(net: Net) -> None:
    converted = octify.convert(net, alpha=0.5, example_inputs=(1, 3, 64, 64))
    octave = [target for target, form in forms(converted).items() if form == "octave"]
    assert [target.partition(".")[0] for target in octave] == ["standard", "equal", "mask", "head"]
    notes = [op.notes for op in octify.plan_of(converted).ops if op.form == "octave"]
    assert all("plain from now on, with the weights that the forward gives now" in given for given in notes)
    assert not [name for name, _ in converted.named_parameters() if name in ("equal.weight", "equal.bias")]
    exact = octify.convert(net.double(), alpha=0.5, example_inputs=(1, 3, 64, 64))
    assert constant_error(net, exact, [torch.rand(2, 3, 64, 64, dtype=torch.float64)]) < 1e-9


def test_dense_ones_stay_what_they_are(net: Net) -> None:
    same = octify.convert(net, alpha=0.0)
    assert list(same.state_dict()) == list(net.state_dict())
    image = torch.rand(2, 3, 47, 61)
    assert same_bits(same(image), net(image))
    with torch.no_grad():
        same.stem.weight.mul_(2).add_(1)  # standardised again whenever it runs
    torch.testing.assert_close(same(image), net(image), rtol=1e-3, atol=1e-3)


def test_they_train_save_and_load(net: Net, tmp_path: Path) -> None:
    trains(net, (3, 48, 48), alpha=0.5)
    converted = octify.convert(net, alpha=0.5, example_inputs=(1, 3, 64, 64)).eval()
    octify.save(converted, tmp_path / "net.safetensors")
    again = octify.load(tmp_path / "net.safetensors", Net()).eval()
    image = torch.rand(2, 3, 64, 64)
    assert torch.equal(again(image), converted(image))
    torch.testing.assert_close(octify.optimize(converted)(image), converted(image), rtol=1e-4, atol=1e-4)


class Noisy(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight + torch.randn_like(self.weight), self.bias)


class Counting(nn.Conv2d):
    def __init__(self, *args: int) -> None:
        super().__init__(*args)
        self.count = nn.Parameter(torch.ones(1), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight * self.count.add_(1), self.bias)


class FromInput(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight * x.mean(), self.bias)


@pytest.mark.parametrize("kind", [Noisy, Counting, FromInput])
def test_weights_that_are_not_the_same_twice_stay_the_forward_s(kind: type[nn.Conv2d]) -> None:
    net = nn.Sequential(nn.Conv2d(3, 16, 3), kind(16, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.Conv2d(16, 16, 3))
    converted = octify.convert(net.eval(), alpha=0.5, example_inputs=(1, 3, 48, 48))
    octave = [target for target, form in forms(converted).items() if form == "octave"]
    assert octave == ["3", "4"]
    converted(torch.rand(1, 3, 48, 48))


def test_two_layers_of_one_weight_stay_dense() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Conv2d(3, 16, 3)
            self.weight = nn.Parameter(torch.rand(16, 16, 3, 3))

        def forward(self, x: Tensor) -> Tensor:
            x = torch.relu(F.conv2d(self.stem(x), self.weight * 0.1))
            return torch.relu(F.conv2d(x, self.weight * 0.2))

    net = Twice().eval()
    converted = octify.convert(nn.Sequential(net, nn.Conv2d(16, 16, 3), nn.Conv2d(16, 8, 3)), alpha=0.5)
    assert [target for target, form in forms(converted).items() if form == "octave"] == ["1", "2"]


def holed(self: nn.Conv2d) -> Tensor:
    kernel = self.weight * 1.0
    kernel[:, :, 0, 0] = 0
    return kernel


def halved(self: nn.Conv2d) -> Tensor:
    kernel = self.weight.clone()
    kernel.mul_(0.5)
    return kernel


class Made(nn.Conv2d):
    """A kernel that a function makes, which may be read once more."""

    def __init__(self, make: Callable[[nn.Conv2d], Tensor], again: bool) -> None:
        super().__init__(16, 16, 3, padding=1)
        self.make, self.again = make, again

    def forward(self, x: Tensor) -> Tensor:
        kernel = self.make(self)
        x = F.conv2d(x, kernel, self.bias, padding=1)
        return x * kernel.mean() if self.again else x


@pytest.mark.parametrize(("make", "again"), [(holed, False), (halved, False), (lambda self: self.weight.tanh(), True)])
def test_kernels_that_are_written_to_or_read_again_stay_the_forward_s(
    make: Callable[[nn.Conv2d], Tensor], again: bool
) -> None:
    net = nn.Sequential(nn.Conv2d(3, 16, 3), Made(make, again), nn.Conv2d(16, 16, 3), nn.Conv2d(16, 16, 3)).eval()
    image = torch.rand(2, 3, 48, 48)
    assert same_bits(octify.convert(net, alpha=0.0)(image), net(image))
    converted = octify.convert(net, alpha=0.5, example_inputs=image)
    assert [target for target, form in forms(converted).items() if form == "octave"] == ["2", "3"]
    assert converted(image).shape == net(image).shape


def test_what_became_octave_can_be_printed(net: Net) -> None:
    assert "OctConv2d" in repr(octify.convert(net, alpha=0.5, example_inputs=(1, 3, 64, 64)))


def test_a_weight_of_two_names_leaves_neither(net: Net) -> None:
    net.equal.other = net.equal.weight  # pyright: ignore[reportAttributeAccessIssue]
    converted = octify.convert(net, alpha=0.5, example_inputs=(1, 3, 64, 64))
    assert not [name for name, _ in converted.named_parameters() if name in ("equal.weight", "equal.other")]


def test_verify_knows_them_and_what_depends_on_position() -> None:
    shuffling = nn.Sequential(nn.Conv2d(3, 16, 3), nn.Conv2d(16, 64, 3), nn.PixelShuffle(2), nn.Conv2d(16, 3, 3))
    for source in (Net(), shuffling):
        reading = Conversion.read(source.eval(), Recipe.uniform(0.5), (1, 3, 64, 64))
        checks = {check.name: check for check in all_checks(reading)}
        assert not [check for check in checks.values() if not check.passed]
        told = checks["equal on constant images"].value
        assert told == "does not apply: 2 depends on position" if source is shuffling else isinstance(told, float)
