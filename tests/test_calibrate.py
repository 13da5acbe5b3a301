"""Calibration: each step's property, on nets of a few channels."""

from __future__ import annotations

import copy
import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from timm.layers.conv2d_same import Conv2dSame
from torch import Tensor, nn

import octify
from octify.calibrate import least_squares, run
from octify.calibrate import trials as trials_module
from octify.calibrate.budget import Curve
from octify.calibrate.data import output_loss, read_images
from octify.calibrate.fit import fit_kernels
from octify.calibrate.levers import find_levers, low_classes, recipe_with
from octify.calibrate.problems import DENSE, TRANSPOSED, problems_of
from octify.calibrate.rank import channel_loss
from octify.calibrate.solve import Sums, choose, solve
from octify.calibrate.source import load_source, prepare_for
from octify.calibrate.statistics import run_model
from octify.calibrate.trials import fit_of_trial, run_trials
from octify.calibrate.verdict import compare
from octify.calibrate.walk import walk_dense, walk_octave
from octify.convert import choose_recipe, finish, plan_of, read_flows
from octify.errors import CalibrationError
from octify.flows import Flows
from octify.layout import Layout
from octify.linear import OctLinear
from octify.module import OctaveModule
from octify.plan import Plan, make_plan

SIZE = 32


class Residual(nn.Module):
    """A stem, two blocks over one stream, a depthwise one among them, and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.first = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 24, 3, padding=1)
        self.conv1, self.norm1 = nn.Conv2d(24, 24, 3, padding=1, bias=False), nn.BatchNorm2d(24)
        self.expand, self.norm2 = nn.Conv2d(24, 48, 1, bias=False), nn.BatchNorm2d(48)
        self.depthwise, self.norm3 = nn.Conv2d(48, 48, 3, padding=1, groups=48, bias=False), nn.BatchNorm2d(48)
        self.project, self.norm4 = nn.Conv2d(48, 24, 1, bias=False), nn.BatchNorm2d(24)
        self.last = nn.Conv2d(24, 12, 3, stride=2, padding=1)
        self.fc = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.first(torch.relu(self.stem(x))))
        x = x + torch.relu(self.norm1(self.conv1(x)))
        y = torch.relu(self.norm2(self.expand(x)))
        y = torch.relu(self.norm3(self.depthwise(y)))
        x = x + self.norm4(self.project(y))
        return self.fc(torch.relu(self.last(x)).mean((2, 3)))


def pictures(count: int = 20, seed: int = 0) -> Tensor:
    noise = torch.randn(count, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(seed))
    return 2 * nn.functional.avg_pool2d(noise, 3, 1, 1)


@pytest.fixture(scope="module")
def net() -> nn.Module:
    torch.manual_seed(0)
    made = Residual()
    with torch.no_grad():
        made(pictures(16, 9))
    return made.eval()


def prepared(net: nn.Module, alpha: float = 0.5) -> tuple[Flows, OctaveModule]:
    flows = read_flows(net, choose_recipe(None, alpha, None), (1, 3, SIZE, SIZE))
    return flows, finish(flows, make_plan(flows)).eval()


def logit_error(net: nn.Module, converted: nn.Module, x: Tensor) -> float:
    with torch.no_grad():
        y = net(x)
        return float((converted.eval()(x) - y).square().sum() / (y - y.mean(0)).square().sum())


# ---- least squares ---------------------------------------------------------------------------------------------------

GEOMETRIES = [
    (nn.Conv2d(8, 12, 3, padding=1), (9, 11)),
    (nn.Conv2d(8, 12, 3, stride=2, padding=1, bias=False), (10, 9)),
    (nn.Conv2d(8, 8, 5, padding=2, groups=2), (8, 8)),
    (nn.Conv2d(8, 8, 3, padding=1, groups=8), (9, 8)),
    (nn.Conv2d(8, 12, 1, stride=2), (9, 9)),
    (nn.Conv2d(8, 12, 3, padding=2, dilation=2, padding_mode="reflect"), (10, 12)),
    (nn.Conv1d(8, 12, 3, padding=1), (17,)),
    (nn.Conv3d(8, 8, 3, padding=1), (3, 8, 7)),
    (nn.ConvTranspose2d(8, 12, 2, stride=2), (9, 11)),
    (nn.ConvTranspose2d(8, 8, 4, stride=2, padding=1, groups=2, bias=False), (8, 9)),
    (nn.ConvTranspose2d(8, 12, 3, stride=2, padding=1, output_padding=1), (7, 8)),
    (nn.ConvTranspose2d(8, 8, 3, stride=3, padding=1, groups=8), (6, 5)),
    (nn.ConvTranspose1d(8, 12, 3), (11,)),
]


@pytest.mark.parametrize("case", range(len(GEOMETRIES)))
def test_rows_times_weight_are_what_the_layer_computes(case: int) -> None:
    conv, size = GEOMETRIES[case]
    kind: Any = (TRANSPOSED if conv.transposed else DENSE)[type(conv)]
    groups = conv.groups if conv.groups < 8 else 1
    low = Layout(Layout.last(8 // groups, 8 // groups // 2).bits * groups)
    out = low if conv.groups > 1 else Layout.last(conv.out_channels, 4)
    layer = kind.from_conv(conv, low, out)
    full = torch.randn(3, 8, *size, generator=torch.Generator().manual_seed(case))
    bands = octify.Split(low, min(2, len(size)))(full)
    with torch.no_grad():
        given = layer(*bands)
        # With the layer's own bands as targets, the residual of its own weight is nothing.
        target = octify.Merge(out, min(2, len(size)))(given)
    dice = torch.Generator().manual_seed(0)
    for problem, wanted in zip(problems_of(layer), given, strict=True):
        rows = problem.rows(bands, target, 10_000, dice)
        weight = problem.weight()
        computed = torch.einsum("npgu,guo->npgo", rows.x.double(), weight)
        if problem.bias is not None:
            computed = computed + problem.bias.detach().double().reshape(weight.shape[0], -1)
        assert rows.x.shape[1] == wanted[0, 0].numel()
        # An odd map's merge and split are no identity in its last row: compare with the band itself.
        expected = wanted.double().flatten(2).transpose(1, 2).reshape(computed.shape)
        assert torch.allclose(computed, expected, atol=1e-5), (case, problem.band)


def test_rows_of_an_octave_linear_layer_are_what_it_computes() -> None:
    layouts = Layout.parse("3h2l3h"), Layout.parse("2h4l")
    layer = OctLinear.from_linear(nn.Linear(8, 6), *layouts)
    high, low = octify.Split(layouts[0])(torch.randn(2, 8, 6, 8))
    bands = high.movedim(1, -1), low.movedim(1, -1)
    with torch.no_grad():
        given = layer(*bands)
        target = octify.Merge(layouts[1])(*(band.movedim(-1, 1) for band in given)).movedim(1, -1)
    for problem, wanted in zip(problems_of(layer), given, strict=True):
        rows = problem.rows(bands, target, 10_000, torch.Generator())
        assert problem.bias is not None
        computed = (rows.x.double() @ problem.weight()[0] + problem.bias.double())[:, :, 0]
        assert torch.allclose(computed, wanted.double().flatten(1, 2), atol=1e-5)
        assert torch.allclose(rows.y[:, :, 0], wanted.flatten(1, 2), atol=1e-5)


def test_reading_and_placing_a_weight_is_the_identity() -> None:
    for conv, _ in (*GEOMETRIES[:4], *GEOMETRIES[8:12]):
        kind: Any = (TRANSPOSED if conv.transposed else DENSE)[type(conv)]
        layout = Layout.parse("2h2l2h2l")
        out = layout if conv.out_channels == 8 else Layout.last(12, 4)
        layer = kind.from_conv(conv, layout, out)
        before = {name: value.clone() for name, value in layer.state_dict().items()}
        for problem in problems_of(layer):
            problem.place(problem.weight())
        assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())


def test_dense_layers_are_problems_too() -> None:
    same = Conv2dSame(6, 4, 3, stride=2)
    for layer, size in (
        (same, (9, 8)),
        (nn.ConvTranspose2d(6, 4, 3, stride=2, groups=2), (5, 6)),
        (nn.Linear(6, 4), ()),
    ):
        x = torch.randn(2, 6, *size)
        with torch.no_grad():
            y = layer(x)
        (problem,) = problems_of(layer)
        rows = problem.rows((x,), y, 10_000, torch.Generator())
        assert problem.bias is not None
        computed = torch.einsum("npgu,guo->npgo", rows.x.double(), problem.weight()).flatten(2) + problem.bias.double()
        assert torch.allclose(computed, rows.y.flatten(2).double(), atol=1e-5), type(layer)
        assert rows.y.numel() == y.numel()


def test_what_is_too_wide_is_solved_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    dice = torch.Generator().manual_seed(0)
    layer, source = nn.Linear(40, 6), nn.Linear(40, 6)
    x = [torch.randn(50, 7, 40, generator=dice) @ torch.randn(40, 40, generator=dice) for _ in range(2)]
    with torch.no_grad():
        y = [source(part) for part in x]
    errors: dict[int, list[float]] = {}
    for bound in (41**2, 20**2, 6_144**2):
        monkeypatch.setattr(least_squares, "MOST_NUMBERS", bound)
        mine = copy.deepcopy(layer)
        found = least_squares.fit_problem(problems_of(mine)[0], None, "fc", [(p,) for p in x], y, (1e-3,), dice)
        with torch.no_grad():
            wrong = sum(float((mine(p) - t).square().sum()) for p, t in zip(x, y, strict=True))
        share = wrong / sum(float(t.square().sum()) for t in y)
        assert found.after == pytest.approx(share, rel=1e-3, abs=1e-6)
        errors[bound] = [found.before, found.after]
    assert [len(least_squares.blocks_of(1, 41, 1)), errors[41**2]] == [1, pytest.approx(errors[6_144**2])]
    monkeypatch.setattr(least_squares, "MOST_NUMBERS", 20**2)
    parts = least_squares.blocks_of(1, 41, 1)
    assert len(parts) == 3 and all(40 in part for part in parts)
    assert sorted({int(i) for part in parts for i in part}) == list(range(41))
    assert errors[20**2][1] < 0.5 * errors[20**2][0]


def test_ridge_of_nothing_finds_the_weight_and_of_much_keeps_the_prior() -> None:
    dice = torch.Generator().manual_seed(0)
    x = torch.randn(200, 2, 6, generator=dice, dtype=torch.float64)
    truth = torch.randn(2, 6, 3, generator=dice, dtype=torch.float64)
    sums = Sums.zeros(2, 6, 3, x.device)
    sums.add(x, torch.einsum("rgu,guo->rgo", x, truth))
    prior = torch.zeros_like(truth)
    assert torch.allclose(solve(sums, prior, 1e-12, 0), truth, atol=1e-8)
    assert torch.allclose(solve(sums, prior, 1e12, 0), prior, atol=1e-8)
    weight, strength = choose(sums, sums, truth, 0, (0.1,))
    assert strength is None and torch.equal(weight, truth), "what is right already stays"


def test_fitting_never_does_worse_than_the_fold_on_its_own_images(net: nn.Module) -> None:
    x = pictures()
    flows, folded = prepared(net)
    images = read_images(flows.trace, [x], None)
    fitted = copy.deepcopy(folded)
    done = fit_kernels(images.trace, fitted, images.fit)
    assert {layer.layer for layer in done} >= {"first", "conv1", "expand", "depthwise", "project", "last", "fc"}
    assert all(layer.after <= layer.before * (1 + 1e-9) for layer in done)
    assert logit_error(net, fitted, x) < 0.5 * logit_error(net, folded, x)


def test_the_source_stays_as_it_was(net: nn.Module) -> None:
    before = {name: value.clone() for name, value in net.state_dict().items()}
    octify.convert(net, alpha=0.5, calibration=pictures(), distil=2)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert not net.training


def test_the_same_seed_and_images_give_the_same_bytes(net: nn.Module) -> None:
    made = [octify.convert(net, calibration=pictures(8), target=0.75, distil=2, seed=4).state_dict() for _ in range(2)]
    assert made[0].keys() == made[1].keys()
    assert all(torch.equal(made[0][name], made[1][name]) for name in made[0])


# ---- which channels --------------------------------------------------------------------------------------------------


def low_of(net: nn.Module, x: Tensor) -> set[int]:
    flows = read_flows(net, choose_recipe(None, 0.5, None), (1, 3, SIZE, SIZE))
    images = read_images(flows.trace, [x], None)
    levers = find_levers(flows, channel_loss(flows, images.trace, images.fit))
    low = low_classes(levers, [len(lever.steps) // 2 for lever in levers])
    writer = next(writer for writer in flows.classes.writers if writer.module == "expand")
    return {index for index, channel in enumerate(writer.ids.tolist()) if flows.classes.find(channel) in low}


def test_the_choice_is_the_same_for_permuted_channels(net: nn.Module) -> None:
    order = torch.randperm(48, generator=torch.Generator().manual_seed(3))
    permuted = copy.deepcopy(net)
    with torch.no_grad():
        norms = [f"norm{i}.{part}" for i in (2, 3) for part in ("weight", "bias")]
        for name in ("expand.weight", "depthwise.weight", *norms):
            permuted.get_parameter(name).copy_(net.get_parameter(name)[order])
        for name in (f"norm{i}.running_{p}" for i in (2, 3) for p in ("mean", "var")):
            permuted.get_buffer(name).copy_(net.get_buffer(name)[order])
        permuted.get_parameter("project.weight").copy_(net.get_parameter("project.weight")[:, order])
    x = pictures()
    plain, moved = low_of(net, x), low_of(permuted, x)
    assert {int(order[index]) for index in moved} == plain


def test_ties_go_to_the_last_channels(net: nn.Module) -> None:
    flows = read_flows(net, choose_recipe(None, 0.25, None), (1, 3, SIZE, SIZE))
    levers = find_levers(flows, {})
    low = low_classes(levers, [len(lever.steps) // 4 for lever in levers])
    chosen = Flows(flows.trace, recipe_with(flows, low))
    paper = make_plan(flows)
    assert [(op.reads, op.gives) for op in make_plan(chosen).ops] == [(op.reads, op.gives) for op in paper.ops]


def test_a_bundles_choice_reaches_all_its_members(net: nn.Module) -> None:
    plan: Plan = plan_of(octify.convert(net, alpha=0.5, calibration=pictures()))
    gives = {op.target: op.gives for op in plan.convolutions}
    assert gives["expand"] == gives["depthwise"]
    assert gives["expand"] != (str(Layout.last(48, 24)),), "this net's smoothest channels are not the last"


# ---- how many, where -------------------------------------------------------------------------------------------------


def test_curves_go_through_what_was_measured_and_rise() -> None:
    curve = Curve((4, 8, 14), (0.1, 0.3, 2.0))
    assert [curve.at(count) for count in (0, 4, 8, 14)] == pytest.approx([0.0, 0.1, 0.3, 2.0])
    values = [curve.at(count) for count in np.linspace(0, 16, 33)]
    assert all(later >= earlier for earlier, later in itertools.pairwise(values))


@pytest.mark.parametrize(("count", "fit", "judges"), [(8, 5, 3), (33, 22, 11), (90, 48, 42), (200, 48, 96)])
def test_no_image_both_fits_and_judges(net: nn.Module, count: int, fit: int, judges: int) -> None:
    x = torch.arange(count).float()[:, None, None, None].expand(count, 3, SIZE, SIZE)
    images = read_images(prepared(net)[0].trace, [x], None)
    found = [[int(value) for chunk in part for value in chunk[0][:, 0, 0, 0]] for part in images.apart(48, 96)]
    assert (len(found[0]), len(found[1])) == (fit, judges)
    assert len({*found[0], *found[1]}) == fit + judges


def test_trials_side_by_side_are_the_fits_of_those_networks_alone(
    net: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    flows, _ = prepared(net)
    images = read_images(flows.trace, [pictures(40)], None)
    levers = find_levers(flows, {})
    halves = [low_classes([lever], [len(lever.steps) // 2]) for lever in levers]
    trials = [set[int](), *halves, low_classes(levers, [len(lever.steps) // 3 for lever in levers])]
    chunks, judges = images.apart(20, 12)
    alone: list[float] = []
    for low in trials:
        chosen = flows.again(recipe_with(flows, low))
        converted = finish(chosen, make_plan(chosen)).eval() if low else copy.deepcopy(net)
        if isinstance(converted, OctaveModule):
            source, octave = walk_dense(images.trace, chunks), walk_octave(converted, chunks)
            work = fit_of_trial(source, octave, converted, len(chunks))
            while work.wanted:
                work.fit_next(source)
        alone.append(output_loss(run_model(net, judges), run_model(converted, judges)))
    together = run_trials(flows, images, trials, 20, 12)
    monkeypatch.setattr(trials_module, "MEMORY", 0)  # for one network at a time
    assert together == run_trials(flows, images, trials, 20, 12)
    assert [found.loss for found in together] == pytest.approx(alone, rel=1e-6)
    assert alone[0] == 0 and len(set(alone)) == len(alone)


@pytest.mark.parametrize("target", [0.9, 0.75, 0.6])
@pytest.mark.parametrize("pick", [True, False])
def test_a_budget_is_met_within_a_hundredth(net: nn.Module, target: float, pick: bool) -> None:
    x = pictures(8)
    report = octify.convert(net, calibration=x, target=target, choose=pick, fit=False).octify_report
    assert target - 0.01 <= report.cost <= target  # pyright: ignore


def test_a_budget_is_out_of_reach(net: nn.Module) -> None:
    with pytest.raises(CalibrationError, match="out of reach"):
        octify.convert(net, calibration=pictures(), target=0.1)


def test_a_larger_loss_allows_a_lower_cost(net: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[float] = []
    best = run.Calibration._best

    def told(*args: Any) -> Any:
        found = best(*args)
        tried.append(found[0])
        return found

    monkeypatch.setattr(run.Calibration, "_best", told)

    def cost_of(most: float) -> float:
        report = octify.convert(net, calibration=pictures(8), max_loss=most, fit=False, statistics=False).octify_report
        return report.cost  # pyright: ignore

    lowest = cost_of(1e9)
    middle = tried[0]
    assert lowest < cost_of(0.99 * middle) < 1
    assert len(tried) == 10 and min(tried[5:]) < middle
    with pytest.raises(CalibrationError, match="no conversion keeps the loss below"):
        octify.convert(net, calibration=pictures(8), max_loss=1e-12)


@pytest.mark.parametrize("senseless", [{"target": 0.0}, {"target": 1.5}, {"max_loss": -1.0}, {"target": math.nan}])
def test_a_senseless_budget_is_refused(net: nn.Module, senseless: dict[str, float]) -> None:
    with pytest.raises(CalibrationError, match="expected a share of"):
        octify.convert(net, calibration=pictures(8), **senseless)


def test_the_recipe_gives_the_same_plan_again(net: nn.Module) -> None:
    converted = octify.convert(net, calibration=pictures(), target=0.7)
    recipe = octify.Recipe.from_yaml(converted.octify_recipe.to_yaml())  # pyright: ignore
    again = octify.plan(net, recipe=recipe, example_inputs=(1, 3, SIZE, SIZE))
    facts = [[(op.name, op.form, op.reads, op.gives) for op in plan.ops] for plan in (again, plan_of(converted))]
    assert facts[0] == facts[1]


# ---- statistics, distillation, verdict -------------------------------------------------------------------------------


def test_no_step_hurts_on_the_images_held_back(net: nn.Module) -> None:
    report = octify.convert(net, alpha=0.5, calibration=pictures(40), fit=False, distil=12).octify_report
    losses = [(step.before, step.after) for step in report.steps if step.before is not None]  # pyright: ignore
    assert losses and all(after <= before for before, after in losses)
    assert report.loss == pytest.approx(losses[-1][1])  # pyright: ignore


def test_the_verdict_of_a_network_on_itself(net: nn.Module) -> None:
    x = pictures(12)
    with torch.no_grad():
        labels = net(x).argmax(1)
    verdict = compare(net, octify.convert(net, alpha=0.0), x, labels)
    assert (verdict.kind, verdict.agreement, verdict.loss, verdict.top1) == ("classes", 1.0, 0.0, (1.0, 1.0))
    worse = compare(net, octify.convert(net, alpha=0.5), x, labels)
    assert worse.loss > 0 and worse.kl is not None and worse.kl > 0
    assert [layer.layer for layer in worse.layers] == ["first", "conv1", "expand", "depthwise", "project", "last"]


def test_pixels_and_features_are_measured_as_what_they_are(net: nn.Module) -> None:
    body = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 4, 1))
    verdict = compare(body, octify.convert(body, alpha=0.5, example_inputs=(1, 3, SIZE, SIZE)), pictures(4))
    assert verdict.kind == "pixels" and verdict.agreement is not None and verdict.agreement < 1
    volume = nn.Sequential(nn.Conv1d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv1d(8, 8, 3, padding=1), nn.Conv1d(8, 4, 1))
    x = torch.randn(4, 3, 64)
    features = compare(volume, octify.convert(volume, alpha=0.5, example_inputs=(1, 3, 64)), x)
    assert features.kind == "features" and features.agreement is None and features.loss > 0


def test_a_layer_is_compared_behind_its_activation() -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 4, 1))
    dead = net[2].bias  # type: ignore
    with torch.no_grad():
        dead[:1], dead[-1:] = -100.0, -100.0  # type: ignore
    converted = octify.convert(net.eval(), alpha=0.5, example_inputs=(1, 3, SIZE, SIZE))
    before = compare(net, converted, pictures(4)).layers
    with torch.no_grad():
        for name in ("high", "low"):
            getattr(converted.get_submodule("2"), f"bias_{name[0]}")[{"high": 0, "low": -1}[name]] += 50.0
    after = compare(net, converted, pictures(4)).layers
    assert after == before and [layer.layer for layer in after] == ["2", "4"]
    assert after[0].low and after[1].high


# ---- bad input -------------------------------------------------------------------------------------------------------


def test_bad_images_are_refused(net: nn.Module) -> None:
    spoilt = pictures()
    spoilt[3] = float("nan")
    cases = {
        "at least": pictures(2),
        "not finite": spoilt,
        "expected 3x": torch.randn(8, 1, SIZE, SIZE),
        "calibration batch": [{"x": 1}],
    }
    for message, batches in cases.items():
        with pytest.raises(CalibrationError, match=message):
            octify.convert(net, calibration=batches, example_inputs=(1, 3, SIZE, SIZE))  # pyright: ignore
    with pytest.raises(CalibrationError, match="need calibration images"):
        octify.convert(net, target=0.8)


def test_nan_activations_are_named(net: nn.Module) -> None:
    broken = copy.deepcopy(net)
    with torch.no_grad():
        broken.get_parameter("conv1.weight")[0] = float("inf")
    with pytest.raises(CalibrationError, match="not finite"):
        octify.convert(broken, calibration=pictures())


def test_sources(tmp_path: Path) -> None:
    from PIL import Image

    for name in ("b", "a"):
        (tmp_path / "tree" / name).mkdir(parents=True)
        for index in range(3):
            Image.fromarray(np.full((20, 24, 3), 100, np.uint8)).save(tmp_path / "tree" / name / f"{index}.png")
    numbers = {"mean": (0.5,) * 3, "std": (0.25,) * 3}
    found = load_source(str(tmp_path / "tree"), None, samples=4, size=(16, 16), **numbers)  # pyright: ignore
    assert found.labels is not None and found.labels.tolist() == [0, 0, 1, 1]
    assert torch.cat(found.batches).shape == (4, 3, 16, 16)
    assert torch.allclose(found.batches[0], torch.tensor((100 / 255 - 0.5) / 0.25))
    np.save(tmp_path / "x.npy", np.zeros((5, 3, 8, 8), np.float32))
    torch.save({"images": torch.zeros(5, 3, 8, 8), "labels": torch.arange(5)}, tmp_path / "x.pt")
    assert torch.cat(load_source(str(tmp_path / "x.npy"), None).batches).shape == (5, 3, 8, 8)
    assert load_source(str(tmp_path / "x.pt"), None, samples=3).labels is not None
    batch = "(torch.zeros(2, 3, 8, 8), torch.ones(2))"
    (tmp_path / "give.py").write_text(f"import torch\ndef give():\n    return [{batch}]\n")
    assert load_source(f"{tmp_path / 'give.py'}:give", None).batches[0].shape == (2, 3, 8, 8)


def test_bad_sources_are_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "x.png").write_bytes(b"no image")
    (tmp_path / "x.npy").write_bytes(b"no array")
    np.save(tmp_path / "pickle.npy", np.array([{}], dtype=object))
    numbers = {"mean": (0.5,) * 3, "std": (0.25,) * 3, "size": (8, 8)}
    cases = {"empty": "no images", "bad": "cannot be read", "x.npy": "cannot be read", "pickle.npy": "cannot be read"}
    for name, message in cases.items():
        with pytest.raises(CalibrationError, match=message):
            load_source(str(tmp_path / name), None, **numbers)  # pyright: ignore
    with pytest.raises(CalibrationError, match="no such folder"):
        load_source(str(tmp_path / "nowhere"), None)
    with pytest.raises(CalibrationError, match="preprocessing is unknown: add --std, --size"):
        prepare_for(None, (0.5,), None, None)
