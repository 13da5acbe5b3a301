"""What layers are asked for beside the dense layer's output: exact where the way behind a layer can be undone."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from timm.layers.norm_act import BatchNormAct2d
from torch import Tensor, fx, nn

from octify.calibrate import targets as targets_module
from octify.calibrate.data import read_images
from octify.calibrate.fit import pair_layers
from octify.calibrate.targets import extra_of
from octify.calibrate.walk import Walk, walk_dense, walk_octave
from octify.calibrate.ways import find_way
from octify.convert import choose_recipe, finish, read_flows
from octify.layers import Merge, Split
from octify.layout import Layout
from octify.module import OctaveModule
from octify.plan import make_plan
from octify.resample import pool_low


class Normed(nn.Module):
    """A branch with a batch norm beside a convolved shortcut; `order` says which of both comes first."""

    def __init__(self, shortcut_first: bool = True) -> None:
        super().__init__()
        self.stem, self.shortcut_first = nn.Conv2d(3, 8, 3, padding=1), shortcut_first
        self.short, self.conv = (nn.Conv2d(8, 12, 3, padding=1) for _ in range(2))
        self.norm, self.last = nn.BatchNorm2d(12), nn.Conv2d(12, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        if self.shortcut_first:
            y = self.short(x)
            return self.last(torch.relu(self.norm(self.conv(x)) + y))
        y = self.norm(self.conv(x))
        return self.last(torch.relu(y + self.short(x)))


class Permuted(nn.Module):
    """ConvNeXt's block: a linear layer on channels-last maps, moved back, scaled and added."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.short = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 12, 3, padding=1)
        self.conv, self.last = nn.Linear(12, 12), nn.Conv2d(12, 4, 1)
        self.scale = nn.Parameter(torch.linspace(0.5, 1.5, 12)[:, None, None])

    def forward(self, x: Tensor) -> Tensor:
        x = self.short(self.stem(x))
        y = self.conv(torch.tanh(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return self.last(torch.relu(x + self.scale * y))


def drawn(net: nn.Module) -> nn.Module:
    """With weights and statistics that are no special case."""
    dice = torch.Generator().manual_seed(1)
    for name, tensor in net.state_dict().items():
        if tensor.is_floating_point():
            around = 1.0 if name.endswith(("norm.weight", "var")) else 0.0
            tensor.copy_(around + torch.randn(tensor.shape, generator=dice).clamp(-2, 2) * 0.3)
    return net.double().eval()


def walked(net: nn.Module, name: str) -> tuple[Walk, Walk, tuple[fx.Node, fx.Node], OctaveModule]:
    """Both networks run up to a layer: the dense one behind it, the octave one in front of it."""
    x = torch.randn(6, 3, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    recipe = choose_recipe(None, 0.5, None).with_defaults(min_size=2)
    flows = read_flows(net, recipe, (x[:1],))
    converted = finish(flows, make_plan(flows)).eval()
    images = read_images(flows.trace, [x], None)
    source, octave = walk_dense(images.trace, images.fit), walk_octave(converted, images.fit)
    pairs = pair_layers(source.nodes, converted)
    pair = next((theirs, node) for node, theirs in pairs.items() if node.target == name)
    source.run_through(pair[0])
    octave.run_before(pair[1])
    return source, octave, pair, converted


@pytest.mark.parametrize(("make", "name"), [(Normed, "conv"), (lambda: Normed(False), "short"), (Permuted, "conv")])
def test_a_layer_that_gives_what_it_is_asked_for_makes_the_dense_sum(
    make: Callable[[], nn.Module], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(targets_module, "FAINT", 0.0)
    monkeypatch.setattr(targets_module, "SHARES", ())
    source, octave, pair, converted = walked(drawn(make()), name)
    outputs = source.values[pair[0]]
    extra, way = extra_of(source, octave, pair, outputs), find_way(source.root, pair[0])
    assert way.other is not None and way.activation is not None and extra is not None
    found = [find_way(converted, band).other for band in sorted(pair[1].users, key=lambda item: item.args[1])]  # type: ignore
    layout: Layout = converted.get_submodule(name).out_layout  # type: ignore
    axis = 1 if way.follow(outputs[0]).shape == outputs[0].shape else -1
    split, merge = Split(layout), Merge(layout)
    for index, plain in enumerate(outputs):
        wanted = split(way.follow(plain) + source.values[way.other][index])
        bands = split(plain.movedim(axis, 1))
        for more in (True, False):
            given = [value + extra(band, index) * more for value, band in zip(bands, ("high", "low"), strict=True)]  # type: ignore
            behind = split(way.follow(merge(*given).movedim(1, axis)))
            sums = [value + octave.values[node][index] for value, node in zip(behind, found, strict=True)]  # type: ignore
            close = [torch.allclose(first, second, atol=1e-12) for first, second in zip(sums, wanted, strict=True)]
            assert all(close) == more, "without it the shortcut lacks something"


def test_who_comes_first_is_fitted_to_its_own_output(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(targets_module, "SHARES", ())
    source, octave, pair, _ = walked(drawn(Normed(False)), "conv")
    assert extra_of(source, octave, pair, source.values[pair[0]]) is None


def test_behind_a_relu_the_low_band_can_be_the_mean_of_what_is_behind_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(targets_module, "FAITH", 0.0)
    x = torch.randn(4, 5, 8, 8, generator=torch.Generator().manual_seed(0))
    shift = targets_module._shift(torch.relu, x, 2)  # pyright: ignore[reportPrivateUsage]
    assert torch.allclose(torch.relu(pool_low(x) + shift), pool_low(torch.relu(x)), atol=1e-6)


def test_what_is_linear_or_flat_moves_no_target() -> None:
    x = torch.randn(4, 5, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for act in (lambda x: 2 * x, lambda x: torch.zeros_like(x)):  # type: ignore
        assert targets_module._shift(act, x, 2).abs().max() < 1e-12  # type: ignore


def test_the_shift_never_takes_the_band_further_from_what_is_wanted() -> None:
    x = 2 * torch.randn(4, 5, 8, 8, generator=torch.Generator().manual_seed(0))
    for act in (torch.relu, nn.functional.silu, nn.functional.hardswish, nn.functional.gelu, torch.sigmoid):
        wanted, plain = pool_low(act(x)), pool_low(x)
        shift = targets_module._shift(act, x, 2)  # pyright: ignore[reportPrivateUsage]
        assert bool(((act(plain + shift) - wanted).abs() <= (act(plain) - wanted).abs()).all())


class Readers(nn.Module):
    """Ways of all kinds: `end` is what stands behind a convolution."""

    def __init__(self, end: nn.Module, twice: bool = False) -> None:
        super().__init__()
        self.conv, self.end, self.twice = nn.Conv2d(3, 4, 1), end, twice

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return self.end(y) + y if self.twice else self.end(y)


@pytest.mark.parametrize(
    ("end", "steps", "activation"),
    [
        ([nn.BatchNorm2d(4), nn.ReLU(inplace=True)], 1, True),
        ([nn.BatchNorm2d(4), nn.Dropout(), nn.Hardswish()], 2, True),
        ([BatchNormAct2d(4)], 1, True),
        ([BatchNormAct2d(4, apply_act=False), nn.SiLU()], 1, True),
        ([nn.GroupNorm(2, 4), nn.ReLU()], 0, False),
        ([nn.BatchNorm2d(4, track_running_stats=False), nn.ReLU()], 0, False),
        ([nn.BatchNorm2d(4), nn.MaxPool2d(3, 1, 1), nn.ReLU()], 1, False),
    ],
)
def test_ways(end: Sequence[nn.Module], steps: int, activation: bool) -> None:
    net = Readers(nn.Sequential(*end))
    drawn(net)
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    for twice in (False, True):
        net.twice = twice
        flows = read_flows(net, choose_recipe(None, 0.5, None), (x,))
        node = next(node for node in flows.trace.nodes if node.target == "conv")
        way = find_way(flows.trace.model, node)
        if twice:
            assert (len(way.steps), way.activation) == (0, None)
            continue
        assert (len(way.steps), way.activation is not None) == (steps, activation)
        y: Tensor = net.conv(x)
        kept = y.clone()
        if way.activation is not None:
            assert torch.equal(way.activation(way.follow(y)), net(x))
            assert torch.equal(y, kept)
