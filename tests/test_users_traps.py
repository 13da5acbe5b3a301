"""What users' forwards do that a tracer can be taken in by: questions, shared layers, turned maps, state."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import prune

import octify
from octify.oracles import same_bits

SIZES = ((2, 3, 32, 32), (3, 3, 38, 41))


class Three(nn.Module):
    """Three convolutions and something behind the second one."""

    def __init__(self, between: Callable[[Tensor], Tensor] = torch.relu) -> None:
        super().__init__()
        self.between = between
        self.f = nn.Conv2d(3, 32, 3, padding=1)
        self.e, self.g, self.h = (nn.Conv2d(32, 32, 3, padding=1) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.h(self.between(self.g(torch.relu(self.e(torch.relu(self.f(x)))))))


def asks(x: Tensor) -> Tensor:
    x = x if isinstance(x, Tensor) else x[-1]
    return F.relu(x if torch.is_tensor(x) else x[0])


def of_all_images(x: Tensor) -> Tensor:
    n, c, h, w = x.shape
    together = x.view(1, n * c, h, w)
    return (together / (1 + together.abs().amax(1, keepdim=True))).view(n, c, h, w)


def last_norm(x: Tensor) -> Tensor:
    x = x.permute(0, 2, 3, 1)
    x = x - x.mean(-1, keepdim=True)
    return (x / torch.sqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)).permute(0, 3, 1, 2)


def last_gate(x: Tensor) -> Tensor:
    x = x.permute(0, 2, 3, 1)
    return (x * torch.sigmoid(x[..., :1])).permute(0, 3, 1, 2)


def images_last(x: Tensor) -> Tensor:
    turned = x.permute(1, 2, 3, 0)
    return x + torch.relu(turned).permute(3, 0, 1, 2)


def half_by_int(x: Tensor) -> Tensor:
    small = F.adaptive_avg_pool2d(x, (int(x.shape[2] / 2), round(x.shape[3] / 2)))
    return x + F.interpolate(small, size=x.shape[2:]) * (0.5 if x.is_cuda else 1.0)


@pytest.mark.parametrize("between", [asks, of_all_images, last_norm, last_gate, images_last, half_by_int])
def test_the_oracles_hold_behind_it(between: Callable[[Tensor], Tensor]) -> None:
    torch.manual_seed(0)
    source = Three(between).eval()
    example = torch.randn(1, 3, 32, 32)
    same = octify.convert(source, alpha=0.0, example_inputs=example)
    octave = octify.convert(source, alpha=0.5, example_inputs=example)
    fast, dense = octify.optimize(octave), octify.optimize(source, example_inputs=example)
    any_size = octify.plan_of(octave).how == "symbolic"  # an inference form knows the example's branches only
    with torch.no_grad():
        for size in SIZES:
            x = torch.randn(size)
            assert same_bits(source(x), same(x)) and octave(x).shape == source(x).shape
            if any_size or size[2:] == example.shape[2:]:
                assert torch.allclose(fast(x), octave(x), atol=1e-4)
                assert torch.allclose(dense(x), source(x), atol=1e-4)


@pytest.mark.parametrize("first", [True, False])
def test_a_layer_that_is_called_on_a_dense_and_on_a_split_map_reads_dense_ones(first: bool) -> None:
    class Again(Three):
        def forward(self, x: Tensor) -> Tensor:
            x = torch.relu(self.f(x))
            x = torch.special.erf(x) if first else self.e(x)
            x = self.e(self.h(self.g(x)))
            return self.h(self.g(x if first else torch.special.erf(x)))

    source, x = Again().eval(), torch.randn(SIZES[0])
    octave = octify.convert(source, alpha=0.5, example_inputs=x)
    with torch.no_grad():
        assert octave(x).shape == source(x).shape and torch.allclose(octify.optimize(octave)(x), octave(x), atol=1e-4)


class Counting(Three):
    """Keeps a mean of its own, in place."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(32))

    def forward(self, x: Tensor) -> Tensor:
        x = self.g(torch.relu(self.f(x)))
        with torch.no_grad():
            self.mean.mul_(0.9).add_(torch.ones(32))
        return self.h(x)


def test_the_source_stays_as_it_is() -> None:
    source, x = Counting(), torch.randn(SIZES[0])
    prune.l1_unstructured(source.h, "weight", 0.5)
    before = {name: tensor.clone() for name, tensor in source.state_dict().items()}
    octify.plan(source, alpha=0.5, example_inputs=x)
    octify.convert(source, alpha=0.5, example_inputs=x)
    assert all(torch.equal(before[name], tensor) for name, tensor in source.state_dict().items())


def test_a_network_made_in_inference_mode_converts_and_stays_as_it_is() -> None:
    with torch.inference_mode():
        plain, source, x = Three().eval(), Counting().eval(), torch.randn(SIZES[0])
        before = source.mean.clone()
        octave = octify.convert(source, alpha=0.5, example_inputs=x)
        assert torch.equal(source.mean, before)
        octave(x)
        assert not torch.equal(octave.mean, before)
    assert octify.plan(plain, alpha=0.5, example_inputs=x).converted


def test_outputs_with_a_row_a_position_calibrate() -> None:
    class Rows(Three):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).permute(0, 2, 3, 1).reshape(-1, 32)

    octave = octify.convert(Rows().eval(), calibration=[torch.randn(4, 3, 64, 64) for _ in range(6)], target=0.8)
    assert octave.octify_report.expected is not None  # pyright: ignore[reportAttributeAccessIssue]


def in_place(self: Keeping, x: Tensor) -> None:
    with torch.no_grad():
        self.centre.mul_(0.9).add_(x.mean((0, 2, 3)), alpha=0.1)


def assigned(self: Keeping, x: Tensor) -> None:
    self.centre = 0.9 * self.centre + 0.1 * x.mean((0, 2, 3)).detach()


class Keeping(Three):
    """Centres by means that it keeps in training, as vector quantisers and spectral norms by hand do."""

    def __init__(self, keep: Callable[[Any, Tensor], None]) -> None:
        super().__init__()
        self.keep = keep
        self.register_buffer("centre", torch.randn(32))
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.f(x))
        if self.training:
            self.steps.add_(1)
            self.keep(self, x)
        return self.h(self.g(x - self.centre.view(1, -1, 1, 1)))


@pytest.mark.parametrize("keep", [in_place, assigned])
@pytest.mark.parametrize("training", [True, False])
def test_buffers_are_written_to_in_training_alone(keep: Callable[[Any, Tensor], None], training: bool) -> None:
    source = Keeping(keep).train(training)
    same = octify.convert(source, alpha=0.0, example_inputs=SIZES[0])
    octave = octify.convert(source, alpha=0.5, example_inputs=SIZES[0])
    x = torch.randn(2, *SIZES[0][1:])
    for mode in (False, True, True, False):
        with torch.no_grad():
            outputs = [net.train(mode)(x) for net in (source, same, octave)]
        assert same_bits(outputs[0], outputs[1])
        assert all(torch.equal(net.steps, source.steps) for net in (same, octave))
        assert all(torch.allclose(net.centre, source.centre) for net in (same, octave))
    assert source.steps == 2
    torch.testing.assert_close(octify.optimize(octave)(x), octave(x), rtol=1e-4, atol=1e-4)


def test_buffers_stay_buffers() -> None:
    source, other, x = Keeping(in_place).eval(), Keeping(in_place).eval(), torch.randn(SIZES[0])
    same = octify.convert(source, alpha=0.0, example_inputs=x)
    same.load_state_dict(other.state_dict())
    assert same_bits(same(x), other(x))
    assert octify.convert(source, alpha=0.5, example_inputs=x).bfloat16()(x.bfloat16()).dtype is torch.bfloat16


class Copied(nn.Module):
    """What is written over is a copy in the source, where a low band would be passed on."""

    def __init__(self, copied: Callable[[Tensor, Tensor], Tensor], reads: int = 16) -> None:
        super().__init__()
        self.copied = copied
        self.a, self.b, self.o = nn.Conv2d(3, 16, 1), nn.Conv2d(16, 16, 1), nn.Conv2d(16, 4, 1)
        self.c = nn.Conv2d(reads, 16, 1)

    def forward(self, x: Tensor) -> Tensor:
        a = self.b(self.a(x))
        return self.o(self.c(torch.relu_(self.copied(a, x))) + a)


def shuffled(a: Tensor, _: Tensor) -> Tensor:
    return a.view(a.shape[0], 2, 8, *a.shape[2:]).transpose(1, 2).reshape(a.shape)


COPIES: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], int]] = {
    "joined with an image": (lambda a, x: torch.cat([a, x], 1), 19),
    "shuffled": (shuffled, 16),
    "halves in turn": (lambda a, _: torch.cat([*reversed(a.chunk(2, 1))], 1), 16),
    "padded by nothing": (lambda a, _: nn.functional.pad(a, (0, 0, 0, 0)), 16),
}


@pytest.mark.parametrize("name", COPIES)
def test_what_is_written_over_is_no_one_else_s(name: str) -> None:
    source = Copied(*COPIES[name]).eval().double()
    octave = octify.convert(source, alpha=0.5, example_inputs=(1, 3, 32, 32))
    x = torch.rand(2, 3, 1, 1, dtype=torch.float64).expand(2, 3, 32, 32).contiguous()
    torch.testing.assert_close(octave(x), source(x), rtol=0, atol=1e-12)
    octave.train()(x).square().mean().backward()
    form = octify.optimize(octify.convert(source.float(), alpha=0.5, example_inputs=(1, 3, 32, 32)))
    torch.testing.assert_close(form(x.float()), source(x.float()), rtol=1e-4, atol=1e-4)
