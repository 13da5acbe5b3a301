"""The benchmark's steps: what each one asks of `octify.convert`, all in this one place."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor, nn

import octify
from octify.errors import CalibrationError, ConversionError
from tests.fidelity.prune import IMPORTANCES, Importance, count_macs, prune_net, reestimate_norms

ALPHAS = (0.125, 0.25, 0.375, 0.5, 0.625, 0.75)
TARGETS = (0.9, 0.8, 0.7, 0.65, 0.6, 0.5)
C0S = (32, 128)
SWEEPS: dict[str, tuple[float, ...]] = {"alpha": ALPHAS, "target": TARGETS, "c0": C0S}

Sweep = Literal["alpha", "target", "c0"]
Wanted = Callable[[str, float], bool]


@dataclass(frozen=True)
class Step:
    """One curve of the plot; `options` go to octify.convert beside alpha, target or c0."""

    name: str
    sweep: Sweep
    options: dict[str, object] = field(default_factory=dict[str, object])
    calibrated: bool = True


ONLY_FIT = {"choose": False, "fit": True, "statistics": False}
FULL = {"choose": True, "fit": True, "statistics": "auto"}
STEPS: tuple[Step, ...] = (
    Step("paper slicing", "alpha", {"kernels": "paper"}, calibrated=False),
    Step("fold", "alpha", calibrated=False),
    Step("fold, norms re-estimated", "alpha", {"choose": False, "fit": False, "statistics": True}),
    Step("fitted", "alpha", ONLY_FIT),
    Step("fitted, channels chosen", "alpha", {**ONLY_FIT, "choose": True}),
    Step("fitted, alphas chosen", "target", FULL),
    Step("fitted, alphas chosen, distilled", "target", {**FULL, "distil": 60}),
    Step("compconv", "c0", {"operator": "compconv"}, calibrated=False),
    Step("compconv, fitted", "c0", {"operator": "compconv", **FULL}),
    Step("compconv, fitted, distilled", "c0", {"operator": "compconv", **FULL, "distil": 60}),
)


@dataclass(frozen=True)
class Point:
    """A converted or pruned net and its multiply-adds against the dense net's."""

    step: str
    sweep: Sweep
    asked: float
    net: nn.Module
    cost: float


def octave_points(net: nn.Module, calibration: list[Tensor], wanted: Wanted) -> Iterator[Point]:
    """Every wanted step at every alpha, target or c0; what a net does not allow is said and left out."""
    dense = count_macs(net)
    for step in STEPS:
        for asked in (p for p in SWEEPS[step.sweep] if wanted(step.name, p)):
            options = {**step.options, step.sweep: asked}
            if step.calibrated:
                options["calibration"] = calibration
            try:
                found = octify.convert(net, example_inputs=calibration[0][:1], **options)  # pyright: ignore[reportArgumentType]
            except (CalibrationError, ConversionError) as error:
                print(f"{step.name} at {asked:g}: {error}", flush=True)
                continue
            yield Point(step.name, step.sweep, asked, found.eval(), count_macs(found) / dense)


def pruned_points(name: str, net: nn.Module, calibration: list[Tensor], wanted: Wanted) -> Iterator[Point]:
    """Torch-Pruning at every target, as it is and with batch norm re-estimated; a net without batch norm once."""
    kinds: tuple[Importance, ...] = ("magnitude",) if name == "plain" else IMPORTANCES
    for kind in kinds:
        step, again = f"pruned by {kind}", f"pruned by {kind}, norms re-estimated"
        for target in (t for t in TARGETS if wanted(step, t)):
            pruned, cost = prune_net(net, kind, target)
            yield Point(step, "target", target, pruned, cost)
            if name != "plain":
                yield Point(again, "target", target, reestimate_norms(pruned, calibration), cost)
