"""Networks as users write them: what their forwards make, enter and return, and weights that are computed."""

from __future__ import annotations

import pickle
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm

import octify
from octify.errors import ModelError
from octify.graph import sharing_copy
from octify.layers import OctConv
from octify.oracles import same_bits
from tests.oracles import constant_image_error

SIZES = ((2, 3, 64, 64), (1, 3, 80, 64), (3, 3, 47, 61))


def block(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(inputs, outputs, 3, stride, 1)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU())


class Body(nn.Module):
    """Three convolutions of which two can be octave, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a, self.b = block(3, 16), block(16, 16), block(16, 16)
        self.fc = nn.Linear(16, 4)

    def features(self, x: Tensor) -> Tensor:
        return self.b(self.a(self.stem(x)))

    def forward(self, x: Tensor) -> object:
        return self.fc(self.features(x).mean((2, 3)))


class Grids(Body):
    """A detection head: lists of chunks, grids of the map's size on its device."""

    def forward(self, x: Tensor) -> object:
        parts = list(self.features(x).chunk(2, 1))
        parts.append(parts[-1] + parts[0])
        x = torch.cat(parts, 1)
        batch, channels, height, width = x.shape
        rows, columns = torch.meshgrid(
            torch.arange(0.0, height, device=x.device), torch.linspace(-1, 1, width, device=x.device), indexing="ij"
        )
        x = x.view(batch, 3, channels // 3, height, width).permute(0, 1, 3, 4, 2)
        grid = torch.stack((rows, columns), 2).view(1, 1, height, width, 2)
        return torch.cat((x[..., :2] + grid, x[..., 2:]), -1).view(batch, -1, channels // 3), torch.zeros(batch, 3)


class Autocast(Body):
    def forward(self, x: Tensor) -> object:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            x = self.features(x)
        return self.fc(x.float().mean((2, 3)))


class Frozen(Body):
    def forward(self, x: Tensor) -> object:
        with torch.no_grad():
            x = self.a(self.stem(x))
        return self.fc(self.b(x).mean((2, 3)))


class Noise(Body):
    def forward(self, x: Tensor) -> object:
        return self.fc(self.features(x).mean((2, 3)) + torch.randn(1, 16))


class Ordered(Body):
    def forward(self, x: Tensor) -> object:
        return OrderedDict({"out": super().forward(x), "features": [x], "0": x, "class": x})


@dataclass
class Output:
    logits: Tensor


class Dataclass(Body):
    def forward(self, x: Tensor) -> object:
        return Output(self.fc(self.features(x).mean((2, 3))))


class Middle(Body):
    """An operation between two convolutions."""

    def __init__(self, operation: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.operation = operation

    def features(self, x: Tensor) -> Tensor:
        return self.b(self.operation(self.a(self.stem(x))))


class Unpooling(Body):
    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = nn.MaxPool2d(2, return_indices=True), nn.MaxUnpool2d(2)
        self.last = block(16, 16)

    def features(self, x: Tensor) -> Tensor:
        x = self.b(self.a(self.stem(x)))
        return self.last(self.up(*self.down(x), output_size=x.size()))


def glu(x: Tensor) -> Tensor:
    return F.glu(torch.cat((x, 2 - x), 1), 1)


def shuffle(x: Tensor) -> Tensor:
    return x - F.channel_shuffle(x, 4)


def of_two(x: Tensor) -> Tensor:
    first, second = torch.split(x, x.shape[1] // 2, 1)
    return torch.cat((torch.max(first, second), torch.where(first > 0.4, second, 0.1)), 1)


def dropout(x: Tensor) -> Tensor:
    return F.dropout(x, 0.5, training=False) + x.masked_fill(x < 0.5, 0.25)


def shift(x: Tensor) -> Tensor:
    """Temporal shift, as written with assignments to slices."""
    clips = x.view(-1, 1, *x.shape[1:])
    shifted = torch.zeros_like(clips)
    shifted[:, :, 4:] = clips[:, :, :-4]
    shifted[:, :, :4] = 0.5
    return shifted.view(x.shape)


def assigned(x: Tensor) -> Tensor:
    part = (x * 2)[:, 3:9]
    part[:, 1] = 0.5
    x.sinh_()
    return torch.cat((part, x[:, :10]), 1)


class Dispatched(Body):
    """Some of torch's functions are local to what made them, and do not pickle by themselves."""

    def forward(self, x: Tensor) -> object:
        return self.fc(F.adaptive_max_pool2d(self.features(x), 2).mean((2, 3)))


def converted(model: nn.Module, alpha: float) -> nn.Module:
    return octify.convert(model, alpha=alpha, example_inputs=SIZES[0])


@pytest.mark.parametrize("kind", [Grids, Autocast, Frozen, Ordered, Dispatched])
def test_nothing_low_gives_the_same_bits_at_every_size(kind: type[Body]) -> None:
    source = kind().eval()
    same = converted(source, 0.0)
    with torch.no_grad():
        for size in SIZES:
            x = torch.randn(size)
            expected, found = source(x), same(x)
            assert type(expected) is type(found) and same_bits(expected, found)


@pytest.mark.parametrize("operation", [glu, shuffle, of_two, dropout, shift, assigned])
def test_what_stands_between_convolutions_keeps_the_oracles(operation: Callable[[Tensor], Tensor]) -> None:
    source, x = Middle(operation).eval(), torch.randn(SIZES[2])
    with torch.no_grad():
        assert torch.equal(converted(source, 0.0)(x), source(x))
    opaque = [op.name for op in octify.plan(source, alpha=0.5, example_inputs=SIZES[0]).ops if op.kind == "opaque"]
    assert bool(opaque) == (operation in (shift, assigned))
    assert constant_image_error(source, SIZES[0][1:], alpha=0.5) < 1e-12


def test_indices_of_a_pool_leave_it_dense_and_unpooling_right() -> None:
    source, x = Unpooling().eval(), torch.randn(SIZES[2])
    assert torch.equal(converted(source, 0.0)(x), source(x))
    assert "it gives several tensors" in str(octify.plan(source, alpha=0.5, example_inputs=SIZES[0]))
    assert converted(source, 0.5)(x).shape == (3, 4)


def test_an_example_of_one_image_runs_with_several_and_tells_of_no_branches() -> None:
    model = converted(Grids(), 0.5).eval()
    assert not octify.plan_of(model).notes
    assert [model(torch.randn(size))[0].shape[0] for size in SIZES] == [2, 1, 3]


def test_a_forward_without_gradients_has_none_after_conversion() -> None:
    source = Frozen().train()
    model = converted(source, 0.5)
    model(torch.randn(SIZES[0])).sum().backward()
    trained = {name.partition(".")[0] for name, value in model.named_parameters() if value.grad is not None}
    assert trained == {"b", "fc"} and torch.is_grad_enabled()


def test_random_numbers_are_drawn_anew() -> None:
    model, x = converted(Noise().eval(), 0.5), torch.randn(SIZES[0])
    assert not torch.equal(model(x), model(x))


def test_a_dataclass_stays_one() -> None:
    assert isinstance(converted(Dataclass().eval(), 0.5)(torch.randn(SIZES[1])), Output)


def test_functions_that_torch_makes_pickle() -> None:
    model, x = converted(Dispatched().eval(), 0.5), torch.randn(SIZES[0])
    assert torch.equal(model(x), pickle.loads(pickle.dumps(model))(x))


COMPUTED: list[Callable[[nn.Module], nn.Module]] = [
    weight_norm,
    spectral_norm,
    parametrizations.weight_norm,
    parametrizations.spectral_norm,
    parametrizations.orthogonal,
    lambda conv: prune.l1_unstructured(conv, "weight", 0.3),
]


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("compute", COMPUTED)
def test_computed_weights_are_converted_as_they_are_now(compute: Callable[[nn.Module], nn.Module]) -> None:
    source = Body().double().eval()
    for part in (source.a, source.b):
        compute(part[0])
    x = torch.randn(SIZES[2], dtype=torch.double)
    with torch.no_grad():
        before = source(x)
        assert torch.equal(converted(source, 0.0)(x), before)
        assert list(converted(source, 0.0).state_dict()) == list(source.state_dict())
    model = converted(source, 0.5)
    assert isinstance(model.a[0], OctConv) and isinstance(model.b[0], OctConv)
    assert all(value.requires_grad for value in model.a[0].parameters())
    assert "plain from now on" in str(octify.plan_of(model))
    assert constant_image_error(sharing_copy(source), SIZES[0][1:], alpha=0.5) < 1e-12
    assert torch.equal(source(x), before)


def test_the_inference_form_settles_what_stays_dense() -> None:
    source = Body().eval()
    parametrizations.weight_norm(source.stem[0])
    x = torch.randn(SIZES[0])
    model = converted(source, 0.5)
    fast = octify.optimize(model, example_inputs=SIZES[0])
    with torch.no_grad():
        assert torch.allclose(fast(x), model(x), atol=1e-5)


class PoolingTwice(nn.Module):
    """One pooling module for maps of several layouts, as U-Nets have it."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Conv2d(i, o, 3, padding=1, padding_mode="replicate") for i, o in PAIRS)
        self.pool, self.last = nn.MaxPool2d(2), nn.Conv2d(16, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.pool(torch.relu(self.c(self.pool(torch.relu(self.b(self.pool(self.a(x)))))))))


PAIRS = ((3, 16), (16, 16), (16, 16))


@pytest.mark.parametrize("dense", ["a", "b", "c"])
def test_a_module_without_weights_may_be_called_on_bands_and_on_a_whole_map(dense: str) -> None:
    source = PoolingTwice().double().eval()
    layers = [{"match": dense, "alpha": 0.0}]
    recipe = octify.Recipe.from_dict({"version": 1, "defaults": {"alpha": 0.5, "min_size": 2}, "layers": layers}, "one")
    model = octify.convert(source, recipe=recipe, example_inputs=(1, 3, 64, 64))
    x = torch.full((2, 3, 64, 64), 0.3, dtype=torch.double)
    with torch.no_grad():
        assert torch.allclose(model(x), source(x), atol=1e-10)
        assert model(torch.randn(2, 3, 48, 32).double()).shape == (2, 4, 6, 4)


def test_what_cannot_be_traced_is_refused_by_name() -> None:
    scripted, lazy = Body().eval(), Body()
    scripted.a = torch.jit.script(scripted.a)
    lazy.b = nn.LazyConv2d(16, 3)
    with pytest.raises(ModelError, match=r'"a" .* is TorchScript'):
        converted(scripted, 0.5)
    with pytest.raises(ModelError, match=r'"b" .* has no weights yet'):
        converted(lazy, 0.5)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda net: torch.relu, "expected a torch.nn.Module"),
        (torch.compile, "is compiled: pass the module"),
        (lambda net: converted(net, 0.5), "is converted already"),
        (lambda net: octify.optimize(net, example_inputs=SIZES[0]), "is converted already"),
    ],
)
def test_what_is_no_source_is_refused_by_name(spoil: Callable[[nn.Module], nn.Module], said: str) -> None:
    given = spoil(Body().eval())
    with pytest.raises(ModelError, match=said):
        converted(given, 0.25)


def test_whole_numbers_are_examples_of_their_own_kind() -> None:
    class Pixels(Body):
        def forward(self, x: Tensor) -> object:
            return super().forward(x.float() / 255)

    images = [torch.randint(0, 256, (4, 3, 64, 64), dtype=torch.uint8) for _ in range(4)]
    octave = octify.convert(Pixels().eval(), calibration=images, target=0.8)
    assert torch.isfinite(octave(images[0])).all()
    with pytest.raises(ModelError, match="1x3x64x64"):
        octify.convert(Body().eval(), calibration=images, target=0.8)


def test_a_dense_map_that_is_enlarged_does_not_keep_what_it_is_added_to_dense() -> None:
    """Attention on a map that is too small to split, and back, as LowFormer has it."""

    class Lowered(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)
            self.up, self.last = nn.ConvTranspose2d(16, 16, 2, 2), nn.Conv2d(16, 8, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            x = torch.relu(self.second(torch.relu(self.first(x))))
            tokens = F.avg_pool2d(x, 2).flatten(2)
            mixed = (tokens.softmax(2) * tokens).unflatten(2, (x.shape[2] // 2, x.shape[3] // 2))
            return self.last(x + self.up(mixed))

    source = Lowered().eval()
    octave = octify.convert(source, alpha=0.5, example_inputs=(1, 3, 14, 14))
    assert {op.target: op.form for op in octify.plan_of(octave).ops}["up"] == "octave"
    image = torch.rand(2, 3, 14, 14)
    assert octave.eval()(image).shape == source(image).shape
    torch.testing.assert_close(octify.optimize(octave)(image), octave(image), rtol=1e-4, atol=1e-5)
