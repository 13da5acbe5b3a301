"""What each lever costs: the network with that one lever pulled, fitted, against the dense one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate

from octify.calibrate.budget import MOST, Curve
from octify.calibrate.data import Images, output_loss
from octify.calibrate.fit import fit_kernels
from octify.calibrate.levers import Lever, low_classes, recipe_with
from octify.plan import Flows, make_plan
from octify.rewrite import rewrite_graph

SHARES = (0.25, 0.5, MOST)
PASSES = 3  # sensitivities cost about so many passes of the dense network over all images
FEWEST = 16  # images
TRIAL_STRENGTH = (0.01,)


def trial_loss(flows: Flows, images: Images, low: set[int], count: int) -> float:
    """The loss of the fitted network in which exactly these classes are low, on `count` images."""
    chosen = flows.again(recipe_with(flows, low))
    converted = rewrite_graph(chosen, make_plan(chosen)).eval()
    done = fit_kernels(images.trace, converted, images.some(count), strengths=TRIAL_STRENGTH, dense_too=False)
    return output_loss(done.dense, done.octave)


def measure_curves(
    flows: Flows,
    images: Images,
    levers: Sequence[Lever],
    progress: Callable[[str], None] | None = None,
    shares: Sequence[float] = SHARES,
) -> list[Curve]:
    """The loss of each lever at some shares; more levers get fewer images, within bounds."""
    trials = max(1, len(levers) * len(shares))
    count = max(FEWEST, min(128, PASSES * images.count // (2 * trials)))
    curves: list[Curve] = []
    for index, lever in enumerate(levers):
        steps = sorted({max(1, int(share * len(lever.steps))) for share in shares})
        losses = [trial_loss(flows, images, low_classes([lever], [step]), count) for step in steps]
        curves.append(_rising(steps, losses))
        if progress:
            progress(f"sensitivity {index + 1}/{len(levers)} {lever.name}")
    return curves


def _rising(steps: Sequence[int], losses: Sequence[float]) -> Curve:
    """A curve that never falls: what falls again with more steps is noise."""
    return Curve(tuple(steps), tuple(accumulate(losses, max)))
