"""What levers cost and what is expected: exact where a network is linear, and the same in whatever company."""

from __future__ import annotations

import itertools
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import octify
from octify.calibrate import run, sensitivity
from octify.calibrate.apart import OUTPUTS, find_apart
from octify.calibrate.data import read_images
from octify.calibrate.expect import expect
from octify.calibrate.felt import Felt
from octify.calibrate.levers import Lever, find_levers
from octify.calibrate.sensitivity import measure_curves
from octify.calibrate.walk import walk_dense
from octify.convert import choose_recipe, read_flows
from octify.errors import CalibrationError, CalibrationWarning
from octify.flows import Flows
from tests.test_calibrate import SIZE, Residual, pictures


class Concatenating(nn.Module):
    """DenseNet's: every layer reads what all before it gave; no layer is behind the last ones, which merge."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.layers = nn.ModuleList(nn.Conv2d(8 + 8 * index, 8, 3, padding=1) for index in range(4))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for layer in self.layers:
            x = torch.cat([x, torch.relu(layer(x))], 1)
        return x.mean((2, 3))


def found_in(net: nn.Module) -> tuple[Flows, list[Lever]]:
    torch.manual_seed(0)
    flows = read_flows(net.double().eval(), choose_recipe(None, 0.5, None), (1, 3, SIZE, SIZE))
    return flows, find_levers(flows, {})


@pytest.mark.parametrize("make", [Residual, Concatenating])
def test_levers_of_a_group_do_not_meet(make: type[nn.Module]) -> None:
    flows, levers = found_in(make())
    apart = find_apart(flows, levers, most=len(levers))
    assert sorted(itertools.chain(*apart.groups)) == list(range(len(levers)))
    for met, group in itertools.product(apart.meets.values(), apart.groups):
        assert len(met.intersection(group)) <= 1
    for index, lever in enumerate(levers):
        assert all(index in apart.meets[name.replace(".", "_")] for name in lever.writers)
    few = find_apart(flows, levers, most=2)
    assert len(few.groups) == min(2, len(apart.groups)) and few.meets == apart.meets


def test_what_reaches_the_outputs_past_all_layers_meets_them() -> None:
    flows, levers = found_in(Concatenating())
    assert find_apart(flows, levers).meets[OUTPUTS] == set(range(len(levers)))


@pytest.mark.parametrize("make", [Residual, Concatenating])
def test_a_levers_loss_is_the_same_in_any_company(make: type[nn.Module], monkeypatch: pytest.MonkeyPatch) -> None:
    flows, levers = found_in(make())
    images = read_images(flows.trace, [pictures(40).double()], None)
    monkeypatch.setattr(sensitivity, "FEWEST", 12)
    monkeypatch.setattr(sensitivity, "MOST_IMAGES", 12)
    monkeypatch.setattr(sensitivity, "find_apart", lambda *given: find_apart(*given, most=len(levers)))
    together = measure_curves(flows, images, levers)
    monkeypatch.setattr(sensitivity, "find_apart", _each_alone)
    for first, second in zip(measure_curves(flows, images, levers), together, strict=True):
        assert first.losses == pytest.approx(second.losses, rel=1e-8)
    assert len({curve.losses for curve in together}) == len(levers)


def _each_alone(flows: Flows, levers: list[Lever]) -> Any:
    apart = find_apart(flows, levers)
    return type(apart)([[index] for index in range(len(levers))], apart.meets)


def test_what_outputs_feel_is_exact_where_the_network_is_linear() -> None:
    net = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 4, 3, stride=2), nn.Flatten()).double()
    x = torch.randn(5, 3, 8, 8, dtype=torch.float64)
    flows = read_flows(net, choose_recipe(None, 0.5, None), (x[:1],))
    source = walk_dense(flows.trace, [(x,)])
    node = next(node for node in source.nodes if node.target == "0")
    felt = Felt(source, (x,), {node}, [2.0], directions=3, seed=0)
    with torch.no_grad():
        moved = felt.values[node] + torch.randn_like(felt.values[node])
        wanted = felt.output_change([net[2](net[1](moved))])
    assert wanted.shape == (3, 5)
    assert torch.allclose(felt.change(node, moved), wanted, atol=1e-10)
    assert felt.change(node, felt.values[node]).abs().max() == 0


def test_in_many_directions_the_mean_square_is_the_loss() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Flatten())
    x = torch.randn(3, 3, 4, 4)
    flows = read_flows(net, choose_recipe(None, 0.5, None), (x[:1],))
    source = walk_dense(flows.trace, [(x,)])
    felt = Felt(source, (x,), set(), [2.0], directions=4000, seed=0)
    with torch.no_grad():
        y = net(x)
        moved = y + torch.randn_like(y)
    wanted = (moved - y).square().sum(1) / 2.0
    assert torch.allclose(felt.output_change([moved]).square().mean(0).float(), wanted, rtol=0.15)


# ---- what is expected ------------------------------------------------------------------------------------------------


def test_what_changes_nothing_keeps_everything() -> None:
    y = torch.randn(6, 10, generator=torch.Generator().manual_seed(0))
    same = expect([y], [y], [y.clone()])
    assert (same.loss, same.judges, same.share, same.high) == (0.0, 6, 1.0, 1.0)
    assert same.low is not None and 0.8 < same.low < 1, "six images are no proof"
    maps = torch.randn(4, 3, 5, 5)
    assert expect([], [maps], [maps]).share == 1.0
    assert expect([], [maps[:, :, 0]], [maps[:, :, 0]]).share is None


def test_every_error_meets_every_margin() -> None:
    margins = torch.tensor([[2.0, 0.0, -9.0], [-9.0, 1.0, 5.0], [9.0, 3.0, 0.0]])  # 2, 4 and 6 to the second class
    moved = torch.tensor([[4.5, 7.5, 0.0]])  # this judge's second class gains 3 on its first
    judged = torch.tensor([[4.5, 4.5 - 1e-3, 0.0]])
    found = expect([margins], [judged], [moved])
    assert found.share == pytest.approx(2 / 4), "its own margin and the one of 2 are lost, 4 and 6 are not"
    turned = expect([margins], [judged.flip(1)], [moved.flip(1)])
    assert turned == found, "classes count by their rank"


def test_little_kept_is_said_before_the_long_work(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    net = Residual().eval()
    seen: list[str] = []
    monkeypatch.setattr(run, "fit_kernels", lambda *_, **__: seen.append("kernels") or [])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        report: Any = octify.convert(net, alpha=0.95, calibration=pictures(12), progress=seen.append).octify_report
    said = [str(warning.message) for warning in caught if warning.category is CalibrationWarning]
    assert len(said) == report.expected.is_poor
    trial = next(index for index, text in enumerate(seen) if text.startswith("a quick trial keeps"))
    assert trial < seen.index("kernels") and str(report.expected) in seen[trial]
    assert report.expected.judges == 4 > report.held_back, "three of twelve would say too little"


def test_out_of_reach_is_said_before_anything_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "measure_curves", lambda *_: pytest.fail("measured"))
    with pytest.raises(CalibrationError, match="out of reach"):
        octify.convert(Residual().eval(), calibration=pictures(), target=0.1)
