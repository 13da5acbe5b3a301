"""What bench says adds up, and what it cannot do it says."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import octify
from octify.bench import Settings, bench, compare, only_faster, profile, reach_latency
from octify.bench.bundles import BundleTiming
from octify.bench.clock import Timing, interleave
from octify.bench.memory import peak_memory
from octify.cli import app
from octify.errors import BackendError, ConversionError
from octify.recipe import Recipe

SHAPE = (1, 3, 32, 32)
FILE = """
from torch import nn

def net():
    return nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 32, 3, padding=1),
                         nn.ReLU(), nn.Conv2d(32, 16, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
"""


def small() -> nn.Module:
    torch.manual_seed(0)
    space: dict[str, object] = {}
    exec(FILE, space)
    return space["net"]()  # type: ignore[operator]


def pair() -> tuple[nn.Module, nn.Module]:
    net = small()
    return net, octify.convert(net, alpha=0.5, example_inputs=SHAPE)


def chain() -> nn.Module:
    """Three bundles that look the same, and two at half the size."""
    convs = [layer for _ in range(3) for layer in (nn.Conv2d(16, 16, 3, padding=1), nn.ReLU())]
    last = [nn.Conv2d(16, 16, 3, 2, 1), nn.ReLU(), nn.Conv2d(16, 16, 1)]
    return nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), *convs, *last, nn.AdaptiveAvgPool2d(1))


def by_clock(monkeypatch: pytest.MonkeyPatch, cost: Callable[[nn.Module], float]) -> list[nn.Module]:
    """Puts an invented clock (ms) in place; returns the networks that were made ready to be measured."""
    made: list[nn.Module] = []

    def runner(model: nn.Module, inputs: object, settings: object) -> Callable[[], nn.Module]:
        made.append(model)
        return lambda: model

    monkeypatch.setattr("octify.bench.bundles.runner", runner)
    monkeypatch.setattr(
        "octify.bench.bundles.interleave", lambda calls, *_: [[cost(call()) / 1000] * 3 for call in calls]
    )
    return made


def low_channels(model: nn.Module) -> int:
    return sum(conv.out_layout.low for conv in model.modules() if isinstance(conv, octify.OctConv2d))


@pytest.mark.parametrize("options", [{}, {"optimized": False}, {"train": True}, {"dtype": "bfloat16"}])
def test_the_numbers_add_up(options: dict[str, object]) -> None:
    dense, octave = pair()
    (found,) = bench(dense, octave, SHAPE, rounds=4, batch=2, threads=1, **options)
    data = json.loads(json.dumps(found.to_dict()))
    assert data["ratio"] == pytest.approx(data["octave"]["median"] / data["dense"]["median"])
    assert data["quotient"] == pytest.approx(data["ratio"] / data["mac_ratio"])
    assert data["shapes"] == [[2, 3, 32, 32]] and data["settings"]["threads"] == 1
    for timing in (data["dense"], data["octave"]):
        low, high = timing["quartiles"]
        assert 0 < timing["least"] <= timing["median"] and low <= timing["median"] <= high
    assert 0.3 < data["mac_ratio"] < 1


def test_calls_take_turns_in_both_orders() -> None:
    seen: list[str] = []
    times = interleave([lambda: seen.append("a"), lambda: seen.append("b")], 3, 1, lambda call: call() or 0.001)
    assert "".join(seen) == "ab" + "ab" + "ba" + "ab" and [len(each) for each in times] == [3, 3]
    assert Timing.of([0.001, 0.003, 0.002]).median == pytest.approx(2.0)


def test_peak_memory_is_what_is_held_at_once() -> None:
    def work() -> None:
        a = torch.empty(2**20)  # 4 MiB
        del a
        b, c = torch.empty(2**19), torch.empty(2**20)
        del b, c

    assert peak_memory(work, torch.device("cpu")) == pytest.approx(6, abs=0.01)


def test_peak_memory_counts_what_a_form_keeps_between_calls() -> None:
    form = octify.optimize(
        nn.Sequential(*(nn.Conv2d(16, 16, 3, padding=1) for _ in range(3))), example_inputs=(1, 16, 128, 128)
    )
    x = torch.randn(1, 16, 128, 128)
    with torch.no_grad():
        form(x)
        assert peak_memory(lambda: form(x), torch.device("cpu")) >= 2  # an inner map and the output, 1 MiB each


@pytest.mark.parametrize("backend,module", [("onnxruntime", "onnxruntime"), ("openvino", "openvino")])
def test_a_backend_that_is_not_installed_says_how_to(
    monkeypatch: pytest.MonkeyPatch, backend: str, module: str
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(BackendError, match=rf"{module} is not installed: pip install octify\[export\]"):
        bench(*pair(), SHAPE, backends=["eager", backend])


@pytest.mark.parametrize(
    "options,message",
    [
        ({"backend": "tvm"}, "expected one of eager"),
        ({"dtype": "float7"}, "expected float32"),
        ({"backend": "onnxruntime", "train": True}, "in inference"),
        ({"device": "cuda"}, "no CUDA device"),
    ],
)
def test_what_cannot_be_measured_is_refused(options: dict[str, object], message: str) -> None:
    if options.get("device") == "cuda" and torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(BackendError, match=message):
        Settings(**options).checked()  # type: ignore[arg-type]


def test_the_runtimes_are_measured_too() -> None:
    dense, octave = pair()
    for backend in ("onnxruntime", "openvino"):
        found = compare(dense, octave, [torch.rand(SHAPE)], Settings(backend, threads=1), rounds=3)
        assert found.backend == backend and found.dense_peak_mib is None and found.dense.median > 0


def test_only_faster_keeps_octave_where_it_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a clock that likes low channels in the first bundle and dislikes them in the second."""
    net, recipe = small(), Recipe.from_dict({"version": 1, "defaults": {"alpha": 0.5}})

    def cost(model: nn.Module) -> float:
        convs = {name: module for name, module in model.named_modules() if isinstance(module, octify.OctConv2d)}
        low = {name for name, module in convs.items() if module.out_layout.low}
        return 10.0 - ("3" in low) + ("5" in low)

    by_clock(monkeypatch, cost)
    found = only_faster(net, recipe, SHAPE)
    kept = [bundle for bundle in found.bundles if bundle.octave]
    assert [bundle.convolutions[0] for bundle in kept] == ["3"] and all(
        isinstance(row, BundleTiming) for row in found.bundles
    )
    assert "measured on" in found.text and found.octave_ms < found.dense_ms
    again = Recipe.from_yaml(found.text)
    assert again == found.recipe
    assert octify.convert(net, recipe=again, example_inputs=SHAPE).get_submodule("3").out_layout.low == 16


def test_bundles_that_look_the_same_are_tried_together(monkeypatch: pytest.MonkeyPatch) -> None:
    made = by_clock(monkeypatch, lambda model: 100.0 - low_channels(model))
    found = only_faster(chain(), Recipe.uniform(0.5), SHAPE)
    assert [row.bundles for row in found.bundles] == [3, 1, 1] and all(row.octave for row in found.bundles)
    assert [low_channels(model) for model in made] == [40, 16, 32, 32, 0]


def test_what_is_not_clearly_faster_than_dense_stays_dense(monkeypatch: pytest.MonkeyPatch) -> None:
    by_clock(monkeypatch, lambda model: 10.0 - 0.002 * low_channels(model))
    found = only_faster(chain(), Recipe.uniform(0.5), SHAPE)
    assert not any(row.octave for row in found.bundles) and found.octave_ms == found.dense_ms
    assert not octify.plan(chain(), recipe=found.recipe, example_inputs=SHAPE).converted


@pytest.mark.parametrize("target,low", [(9.0, 2), (8.5, 4), (6.0, 8)])
def test_the_least_alpha_that_is_fast_enough_is_found(monkeypatch: pytest.MonkeyPatch, target: float, low: int) -> None:
    made = by_clock(monkeypatch, lambda model: 10.0 - 0.125 * low_channels(model))
    recipe = Recipe.from_dict({"version": 1, "parameters": {"alpha": 0.5}, "defaults": {"alpha": "$alpha"}})
    found = reach_latency(chain(), recipe, target, SHAPE)
    assert found.octave_ms <= target and len(made) <= 3 + 5
    assert octify.convert(chain(), recipe=found.recipe, example_inputs=SHAPE).get_submodule("1").out_layout.low == low


def test_only_faster_gives_the_dense_network_where_nothing_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    by_clock(monkeypatch, lambda model: 1.0 + sum(isinstance(each, octify.OctConv2d) for each in model.modules()))
    recipe = Recipe.from_dict({"version": 1, "parameters": {"alpha": 0.5}, "defaults": {"alpha": "$alpha"}})
    found = only_faster(small(), recipe, SHAPE)
    assert found.octave_ms == found.dense_ms and not any(bundle.octave for bundle in found.bundles)
    with pytest.raises(BackendError, match="ms here: the nearest takes"):
        reach_latency(small(), recipe, 0.5, SHAPE)


def test_nothing_to_measure_is_refused() -> None:
    with pytest.raises(ConversionError, match="nothing to measure"):
        only_faster(small(), Recipe.uniform(0.0), SHAPE)


@pytest.mark.parametrize(("backend", "convolution"), [("onnxruntime", "Conv"), ("openvino", "Convolution")])
def test_a_profile_counts_every_convolution(backend: str, convolution: str) -> None:
    pytest.importorskip(backend, reason="the runtime is not installed")
    (found,) = profile(*pair(), SHAPE, backends=[backend], threads=1, rounds=4)
    rows = {row.kind: row for row in found.kinds}
    paths = 1 + 2 + 4  # the image's stays dense, one gives bands, one reads and gives them
    assert (rows[convolution].dense, rows[convolution].octave) == (3, paths)
    assert found.total.octave == sum(row.octave for row in found.kinds)
    assert found.total.dense_ms == pytest.approx(sum(row.dense_ms for row in found.kinds))
    assert min(row.octave_ms for row in found.kinds) >= 0 < found.total.octave_ms
    assert found.mac_ratio == bench(*pair(), SHAPE, rounds=2)[0].mac_ratio


def test_a_backend_without_a_clock_of_its_own_is_refused() -> None:
    with pytest.raises(BackendError, match="eager does not time its operations: the backends that do are onnxruntime"):
        profile(*pair(), SHAPE, backends=["eager"])


def test_the_command_prints_what_it_measured(tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text(FILE)
    name = f"{tmp_path / 'net.py'}:net"
    common = [name, "--input-size", "3x32x32", "--alpha", "0.5", "--rounds", "2", "--threads", "1", "--json"]
    found = CliRunner().invoke(app, ["bench", *common])
    assert found.exit_code == 0, found.output
    (row,) = json.loads(found.stdout)["comparisons"]
    assert row["quotient"] == pytest.approx(row["ratio"] / row["mac_ratio"])
    found = CliRunner().invoke(app, ["bench", *common, "--backend", "onnxruntime", "--profile"])
    assert found.exit_code == 0, found.output
    (timed,) = json.loads(found.stdout)["profiles"]
    assert timed["total"]["octave"] == sum(row["octave"] for row in timed["kinds"])
    assert CliRunner().invoke(app, ["bench", *common, "--profile", "--layers"]).exit_code == 1
    recipe = tmp_path / "fast.yaml"
    found = CliRunner().invoke(app, ["bench", *common, "--only-faster", "-o", str(recipe)])
    assert found.exit_code == 0, found.output
    assert Recipe.from_yaml(recipe.read_text()).version == 1
    assert CliRunner().invoke(app, ["bench", *common, "--backend", "tvm"]).exit_code == 1
