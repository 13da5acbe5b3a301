"""Forwards as users write them: convolutions as functions, heads that compute with sizes, checkpoints, hooks."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import octify
from octify import flows
from octify.layers import OctConv
from octify.oracles import ReplicatePadding, same_bits
from octify.rules.base import FUNCTIONS
from tests.oracles import trains

SHAPE = (2, 3, 64, 64)
SIZES = (SHAPE, (1, 3, 80, 64), (3, 3, 47, 61))


class Padded(nn.Conv2d):
    """A convolution that pads as TensorFlow does, by a module of its own, and calls the function."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> None:
        super().__init__(inputs, outputs, kernel, stride, groups=groups)
        more = kernel - stride
        self.static_padding = nn.ZeroPad2d((more // 2, more - more // 2) * 2) if more > 0 else nn.Identity()

    def forward(self, input: Tensor) -> Tensor:
        x = self.static_padding(input)
        return F.conv2d(x, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


class Functions(nn.Module):
    """Convolutions as functions, of modules' weights and of its own; what is dropped in training is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.grow = Padded(3, 16, 3, 2), Padded(16, 32, 1)
        self.deep, self.last = Padded(32, 32, 5, groups=32), Padded(32, 16, 1)
        self.own = nn.Parameter(torch.randn(16, 16, 3, 3) / 12)
        self.shift = nn.Parameter(torch.randn(16))
        self.fc = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        y = self.last(torch.relu(self.deep(torch.relu(self.grow(x)))))
        if self.training:
            y = y * torch.floor(0.8 + torch.rand(y.shape[0], 1, 1, 1))
        x = torch.relu(F.conv2d(input=x + y, weight=self.own, bias=self.shift, padding=1))
        return self.fc(x.mean((2, 3)))


class Anchors(nn.Module):
    """A detection head: one channel is dropped by a view, and tensors are made of sizes and of single numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.body = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 3, 2, 1)
        self.neck, self.head = nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(16, 12, 1)
        self.integral = nn.Conv2d(4, 1, 1, bias=False)
        self.strides = torch.tensor([2.0])

    def forward(self, x: Tensor) -> Tensor:
        x = self.head(torch.relu(self.neck(torch.relu(self.body(torch.relu(self.stem(x)))))))
        batch, _, height, width = x.shape
        scale = torch.cat([torch.full((height * width, 1), stride) for stride in self.strides])
        boxes = x.view(batch, 12, -1)
        found = self.integral(boxes.view(batch, 3, 4, height * width).transpose(2, 1).softmax(1))
        return found.view(batch, 3, height * width) * scale.transpose(0, 1)


class Checkpointed(nn.Module):
    """Saves memory where gradients are asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.layers = nn.ModuleList(nn.Conv2d(16 + 8 * index, 8, 3, padding=1) for index in range(3))
        self.fc = nn.Linear(40, 3)

    def forward(self, x: Tensor) -> Tensor:
        maps = [self.stem(x)]
        for layer in self.layers:
            run: Callable[..., Any] = lambda *given, layer=layer: layer(torch.relu(torch.cat(given, 1)))  # noqa: E731
            asked = self.training and any(found.requires_grad for found in maps)
            maps.append(checkpoint(run, *maps, use_reentrant=False) if asked else run(*maps))
        return self.fc(torch.cat(maps, 1).mean((2, 3)))


class Cropped(nn.Module):
    """The middle of a map, found by sums of sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.body = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 3)
        self.down, self.last = nn.Conv2d(16, 16, 3, 2), nn.Conv2d(32, 8, 3)

    def forward(self, x: Tensor) -> Tensor:
        wide = torch.relu(self.body(torch.relu(self.stem(x))))
        small = torch.relu(self.down(wide))
        height, width = small.shape[2:]
        top, left = (wide.shape[2] - height) // 2, (wide.shape[3] - width) // 2
        return self.last(torch.cat((wide[:, :, top : top + height, left : left + width], small), 1))


class Styled(nn.Module):
    """Weights made for each image from a vector, which is no image."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.weight = nn.Conv2d(3, 8, 3, padding=1), nn.Parameter(torch.randn(1, 8, 8, 3, 3) / 9)
        self.style, self.a, self.b = (
            nn.Linear(4, 8),
            nn.Conv2d(8, 16, 3, padding=1),
            nn.Conv2d(16, 8, 3, padding=1),
        )

    def forward(self, x: Tensor, style: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        batch, channels, height, width = x.shape
        weight = (self.weight * self.style(style).view(batch, 1, channels, 1, 1)).view(-1, channels, 3, 3)
        x = F.conv2d(x.reshape(1, -1, height, width), weight, padding=1, groups=batch)
        return self.b(torch.relu(self.a(x.view(batch, -1, height, width))))


def converted(model: nn.Module, alpha: float) -> Any:
    return octify.convert(model, alpha=alpha, example_inputs=SHAPE)


@pytest.mark.parametrize("kind", [Functions, Anchors, Checkpointed, Cropped])
def test_nothing_low_gives_the_same_bits_at_every_size(kind: type[nn.Module]) -> None:
    source = kind().eval()
    same = converted(source, 0.0)
    assert list(same.state_dict()) == list(source.state_dict())
    with torch.no_grad():
        for size in SIZES:
            x = torch.randn(size)
            assert same_bits(source(x), same(x))


@pytest.mark.parametrize("kind", [Functions, Anchors, Checkpointed, Cropped])
def test_a_constant_image_is_the_sources_and_the_inference_form_the_same(kind: type[nn.Module]) -> None:
    source = kind().double().eval()
    model = converted(source, 0.5)
    flat = torch.rand(2, 3, 1, 1, dtype=torch.double).expand(2, 3, 47, 61).contiguous()
    with torch.no_grad(), ReplicatePadding():
        assert torch.allclose(model(flat), source(flat), atol=1e-12)
    single, x = model.float(), torch.randn(SHAPE)
    with torch.no_grad():
        assert torch.allclose(octify.optimize(single, example_inputs=SHAPE)(x), single(x), atol=1e-4)
    trains(kind(), SHAPE[1:], alpha=0.5)


def test_functions_are_layers_of_their_own(tmp_path: Path) -> None:
    source = Functions().eval()
    model = converted(source, 0.5)
    octave = {path for path, module in model.named_modules() if isinstance(module, OctConv)}
    assert octave == {f"{home}octify_conv_{name}" for home, name in OCTAVE}
    assert not [name for name in model.state_dict() if name in ("own", "shift", "deep.weight")]
    assert "stem.octify_conv_weight" not in dict(model.named_modules()) and "stem.weight" in model.state_dict()
    octify.save(model, tmp_path / "net.safetensors")
    again = octify.load(tmp_path / "net.safetensors", model=Functions())
    x = torch.randn(SHAPE)
    assert torch.equal(again(x), model(x)) and torch.equal(copy.deepcopy(model)(x), model(x))
    images = torch.randn(16, 3, 64, 64)
    fitted = octify.convert(source, alpha=0.5, calibration=images)
    with torch.no_grad():
        errors = [float((net(images) - source(images)).square().mean()) for net in (fitted, model)]
    assert errors[0] < errors[1]


OCTAVE = (("grow.", "weight"), ("deep.", "weight"), ("last.", "weight"), ("", "own"))


def test_weights_of_several_geometries_stay_functions() -> None:
    class Twice(Functions):
        def forward(self, x: Tensor) -> Tensor:
            x = torch.relu(F.conv2d(self.grow(torch.relu(self.stem(x)))[:, :16], self.own, padding=1))
            return self.fc(torch.relu(F.conv2d(x, self.own, padding=2, dilation=2)).mean((2, 3)))

    source, x = Twice().eval(), torch.randn(SHAPE)
    assert "no rule for function conv2d" in str(octify.plan(source, alpha=0.5, example_inputs=SHAPE))
    assert torch.equal(converted(source, 0.0)(x), source(x))


def test_a_vector_is_no_image_and_a_function_ends_one() -> None:
    example = (torch.randn(SHAPE), torch.randn(2, 4))
    source = Styled().eval()
    model = octify.convert(source, alpha=0.5, example_inputs=example)
    assert {op.target for op in octify.plan_of(model).converted} == {"a", "b"}
    with torch.no_grad():
        fast = octify.optimize(model, example_inputs=example)  # holds a tensor of five axes
        assert torch.allclose(fast(*example), model(*example), atol=1e-4)


def test_the_inference_form_keeps_hooks() -> None:
    source = nn.Sequential(*(nn.Conv2d(a, 16, 3, padding=1) for a in (3, 16, 16, 16))).eval()
    source[3].register_forward_hook(lambda module, given, out: math.pi * out)
    model, x = converted(source, 0.5), torch.randn(SHAPE)
    with torch.no_grad():
        wanted, given = model(x), octify.optimize(model, example_inputs=SHAPE)(x)
    assert torch.allclose(given, wanted, atol=1e-4 * float(wanted.abs().max()))


def test_a_rule_that_fails_leaves_its_use_dense_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> None:
        raise IndexError("tuple index out of range")

    source, x = Functions().eval(), torch.randn(SHAPE)
    monkeypatch.setattr(FUNCTIONS[torch.relu], "flow", fails)
    with pytest.raises(IndexError):
        converted(source, 0.0)
    monkeypatch.setattr(flows, "FAULTS", (IndexError,))
    assert torch.equal(converted(source, 0.0)(x), source(x))
    plan = octify.plan(source, alpha=0.5, example_inputs=SHAPE)
    assert "its rule failed, please report this (IndexError: tuple index out of range)" in str(plan)
