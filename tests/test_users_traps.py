"""What users' forwards do that a tracer can be taken in by: questions, shared layers, turned maps, state."""

from __future__ import annotations

from collections.abc import Callable

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
    plan = octify.plan(source, alpha=0.5, example_inputs=x)
    octify.convert(source, alpha=0.5, example_inputs=x)
    assert all(torch.equal(before[name], tensor) for name, tensor in source.state_dict().items())
    assert "writes to buffers by itself (mean)" in str(plan)


def test_a_network_made_in_inference_mode_converts_and_stays_as_it_is() -> None:
    with torch.inference_mode():
        plain, source, x = Three().eval(), Counting().eval(), torch.randn(SIZES[0])
        before = source.mean.clone()
        octave = octify.convert(source, alpha=0.5, example_inputs=x)
        assert "writes to buffers by itself (mean)" in str(octify.plan_of(octave))
        assert torch.equal(source.mean, before)
    assert octify.plan(plain, alpha=0.5, example_inputs=x).converted


def test_outputs_with_a_row_a_position_calibrate() -> None:
    class Rows(Three):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).permute(0, 2, 3, 1).reshape(-1, 32)

    octave = octify.convert(Rows().eval(), calibration=[torch.randn(4, 3, 64, 64) for _ in range(6)], target=0.8)
    assert octave.octify_report.expected is not None  # pyright: ignore[reportAttributeAccessIssue]
