"""Alphas chosen by time: the table finds what layers take, and a choice is measured before it is taken."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import octify
from octify.bench import Settings, measure_latency
from octify.bench.bundles import look_of
from octify.calibrate.costs import CostModel
from octify.calibrate.latency import LatencyModel, LatencyTable, in_time
from octify.calibrate.levers import find_levers
from octify.cli import app
from octify.conversion import Conversion
from octify.cost import model_cost, source_cost
from octify.errors import BackendError, CalibrationError
from octify.recipe import Recipe

SHAPE = (1, 3, 32, 32)
RECIPE = Recipe.uniform(0.5)


def chain() -> nn.Module:
    torch.manual_seed(0)
    convs = [layer for _ in range(3) for layer in (nn.Conv2d(16, 16, 3, padding=1), nn.ReLU())]
    last = [nn.Conv2d(16, 24, 3, 2, 1), nn.ReLU(), nn.Conv2d(24, 16, 1)]
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), *convs, *last, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4)
    )


def by_clock(monkeypatch: pytest.MonkeyPatch, ms: Callable[[nn.Module], float]) -> None:
    """Networks take the ms that a function says."""
    monkeypatch.setattr("octify.bench.bundles.runner", lambda model, inputs, settings: lambda: model)
    monkeypatch.setattr(
        "octify.bench.bundles.interleave", lambda calls, *_: [[ms(call()) / 1000] * 3 for call in calls]
    )


def gmacs(model: nn.Module) -> float:
    return model_cost(model, (torch.empty(SHAPE, device="meta"),)).gmacs


def model_of(saves: dict[str, float], dense_ms: float = 10.0) -> tuple[LatencyModel, CostModel, int]:
    flows = Conversion.read(chain(), RECIPE, SHAPE).flows
    levers, macs = find_levers(flows, {}), source_cost(flows.trace).gmacs * 1e9
    table = LatencyTable(RECIPE, dense_ms, saves, lambda recipe: 1.0)
    return LatencyModel(flows, levers, macs, table), CostModel(flows, levers, macs), len(levers)


def test_where_every_layer_saves_alike_time_goes_as_multiply_adds() -> None:
    flows = Conversion.read(chain(), RECIPE, SHAPE).flows
    macs = source_cost(flows.trace).gmacs * 1e9
    alike = {str(node.target): 10.0 / macs for node in flows.trace.nodes if node.op == "call_module"}
    latency, cost, count = model_of(alike)
    settings = np.random.default_rng(0).integers(0, 14, (20, count)).astype(np.float64)
    assert np.allclose(latency.ratio(settings), cost.ratio(settings), rtol=1e-12)


def test_a_layer_that_saves_nothing_is_worth_nothing() -> None:
    latency, cost, count = model_of({"3": 1e-9})
    settings = np.full(count, 8.0)
    third = cost.saved(settings)[cost.layers.index("3")]
    assert latency.ratio(settings) == pytest.approx(1 - third * 1e-9 / 10)


def test_the_table_finds_what_layers_take(monkeypatch: pytest.MonkeyPatch) -> None:
    """The clock is linear in each layer's multiply-adds; layers that look the same have one rate."""
    flows = Conversion.read(chain(), RECIPE, SHAPE).flows
    levers, macs = find_levers(flows, {}), source_cost(flows.trace).gmacs * 1e9
    cost = CostModel(flows, levers, macs)
    rates = {"7": 9e-6, "9": 4e-6}
    truth = np.array([rates.get(path, 2e-6) for path in cost.layers])

    def ms(model: nn.Module) -> float:
        convs = {name: each for name, each in model.named_modules() if isinstance(each, octify.OctConv2d)}
        low = [convs[lever.writers[0]].out_layout.low if lever.writers[0] in convs else 0 for lever in levers]
        return 20.0 - float(cost.saved(np.array(low, dtype=np.float64)) @ truth)

    by_clock(monkeypatch, ms)
    monkeypatch.setattr("octify.bench.latency.TRUST", 1e-9)
    table = measure_latency(chain(), RECIPE, SHAPE, Settings(threads=1))
    assert table.dense_ms == pytest.approx(20.0)
    for path in ("3", "5", "7"):
        assert table.saves[path] == pytest.approx(rates.get(path, 2e-6), rel=0.05), path
    assert look_of(flows, "3") == look_of(flows, "5") != look_of(flows, "7")
    half = ms(octify.convert(chain(), recipe=RECIPE, example_inputs=SHAPE)) / 20
    assert table.share(RECIPE) == pytest.approx(half)


def test_nothing_faster_is_no_table(monkeypatch: pytest.MonkeyPatch) -> None:
    by_clock(monkeypatch, lambda model: 10.0 - gmacs(model))
    with pytest.raises(BackendError, match="nothing gets faster here"):
        measure_latency(chain(), RECIPE, SHAPE)


def test_what_was_measured_moves_the_target_until_it_is_met() -> None:
    asked: list[float] = []

    def propose(aim: float) -> list[list[int]]:
        asked.append(aim)
        return [[round(100 * (1 - aim))]]

    def slower(recipe: Recipe) -> float:  # half of what the model says is saved
        return 1 - (1 - float(recipe.name)) / 2

    table = LatencyTable(RECIPE, 10.0, {}, slower)
    met = in_time(
        table, 0.8, propose, lambda counts: Recipe.from_dict({"version": 1, "name": f"{1 - counts[0] / 100}"})
    )
    assert len(asked) > 1 and all(0.8 * 0.97 < share <= 0.8 * 1.01 for share in met.values())


def test_a_latency_out_of_reach_says_how_near_it_came() -> None:
    table = LatencyTable(RECIPE, 10.0, {}, lambda recipe: 0.9)
    with pytest.raises(
        CalibrationError, match=r"5\.00 ms are out of reach: the nearest takes 9\.00 ms, dense 10\.00 ms"
    ):
        in_time(table, 0.5, lambda aim: [[1]], lambda counts: RECIPE)


def test_a_calibration_meets_a_latency(monkeypatch: pytest.MonkeyPatch) -> None:
    dense = source_cost(Conversion.read(chain(), RECIPE, SHAPE).flows.trace).gmacs
    by_clock(monkeypatch, lambda model: 4 + 6 * gmacs(model) / dense)
    table = measure_latency(chain(), RECIPE, SHAPE)
    images = torch.rand(24, *SHAPE[1:])
    found = octify.convert(chain(), calibration=images, target=8.0 / table.dense_ms, latency=table)
    assert 4 + 6 * gmacs(found) / dense == pytest.approx(8.0, rel=0.031)
    (budget,) = [step for step in found.octify_report.steps if step.name == "budget"]
    assert budget.note.endswith("ms, dense 10.00 ms")


def test_the_command_takes_one_target(tmp_path: Path) -> None:
    np.save(tmp_path / "images.npy", np.zeros((4, 3, 64, 64), np.float32))
    common = ["convert", "resnet18", "--calibrate", str(tmp_path / "images.npy"), "--target-latency", "5"]
    found = CliRunner().invoke(app, [*common, "--target", "0.7"])
    assert found.exit_code == 1 and "name one of them" in found.output
    found = CliRunner().invoke(app, ["convert", "resnet18", "--target-latency", "5"])
    assert found.exit_code == 1 and "add --calibrate" in found.output
