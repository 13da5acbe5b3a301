"""The benchmark's steps: what each one asks of `octify.convert`, all in this one place."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor, nn

import octify
from tests.fidelity.prune import IMPORTANCES, Importance, count_macs, prune_net, reestimate_norms

ALPHAS = (0.125, 0.25, 0.375, 0.5, 0.625, 0.75)
TARGETS = (0.9, 0.8, 0.7, 0.65, 0.6, 0.5)

Sweep = Literal["alpha", "target"]


@dataclass(frozen=True)
class Step:
    """One curve of the plot; `options` go to octify.convert beside alpha or target."""

    name: str
    sweep: Sweep
    options: dict[str, object] = field(default_factory=dict[str, object])
    calibrated: bool = True


PLAIN_FIT = {"choose": False, "fit": True, "norms": False, "distil": 0}
STEPS: tuple[Step, ...] = (
    Step("paper slicing", "alpha", {"kernels": "paper"}, calibrated=False),
    Step("fold", "alpha", calibrated=False),
    Step("fold, norms re-estimated", "alpha", {**PLAIN_FIT, "fit": False, "norms": True}),
    Step("fitted", "alpha", PLAIN_FIT),
    Step("fitted, channels chosen", "alpha", {**PLAIN_FIT, "choose": True}),
    Step("fitted, alphas chosen", "target", {**PLAIN_FIT, "choose": True}),
    Step("fitted, alphas chosen, distilled", "target", {**PLAIN_FIT, "choose": True, "distil": 60}),
)


@dataclass(frozen=True)
class Point:
    """A converted or pruned net and its multiply-adds against the dense net's."""

    step: str
    sweep: Sweep
    asked: float
    net: nn.Module
    cost: float


def octave_points(net: nn.Module, calibration: list[Tensor], wanted: Callable[[str], bool]) -> Iterator[Point]:
    """Every wanted step at every alpha or target. A point whose alpha changes nothing is left out."""
    dense = count_macs(net)
    for step in STEPS:
        for asked in (ALPHAS if step.sweep == "alpha" else TARGETS) if wanted(step.name) else ():
            options = {**step.options, step.sweep: asked}
            if step.calibrated:
                options["calibration"] = calibration
            source = copy.deepcopy(net)
            found = octify.convert(source, example_inputs=calibration[0][:1], **options)  # pyright: ignore[reportArgumentType]
            yield Point(step.name, step.sweep, asked, found.eval(), count_macs(found) / dense)


def pruned_points(
    name: str, net: nn.Module, calibration: list[Tensor], wanted: Callable[[str], bool]
) -> Iterator[Point]:
    """Torch-Pruning at every target, as it is and with batch norm re-estimated; a net without batch norm once."""
    kinds: tuple[Importance, ...] = ("magnitude",) if name == "plain" else IMPORTANCES
    for kind in kinds:
        step, again = f"pruned by {kind}", f"pruned by {kind}, norms re-estimated"
        for target in TARGETS if wanted(step) else ():
            pruned, cost = prune_net(net, kind, target)
            yield Point(step, "target", target, pruned, cost)
            if name != "plain":
                yield Point(again, "target", target, reestimate_norms(pruned, calibration), cost)
