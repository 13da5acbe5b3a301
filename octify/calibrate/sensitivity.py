"""What each lever costs: by networks in which many are pulled, and what the dense network's outputs feel of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any

from torch import Tensor, fx

from octify.calibrate.apart import Apart, find_apart
from octify.calibrate.budget import MOST, Curve
from octify.calibrate.data import Images, spreads_of
from octify.calibrate.felt import Felt
from octify.calibrate.levers import Lever
from octify.calibrate.probe import Probe, fit_probes
from octify.calibrate.store import MEMORY
from octify.calibrate.trials import TRIAL_ROWS, TRIAL_STRENGTH
from octify.calibrate.walk import walk_dense
from octify.flows import Flows
from octify.graph import tensors_of, value_of

SHARES = (0.25, 0.5, MOST)
DIRECTIONS = 4  # in which changes of the outputs are looked at
PASSES = 3  # sensitivities cost about so many passes of the dense network over all images
FEWEST, MOST_IMAGES = 12, 32
AT_ONCE = 8  # images whose gradients are held


def measure_curves(
    flows: Flows,
    images: Images,
    levers: Sequence[Lever],
    progress: Callable[[str], None] | None = None,
    shares: Sequence[float] = SHARES,
) -> list[Curve]:
    """The loss of each lever at some shares, alone: to first order, its layers fitted and nothing behind them."""
    apart = find_apart(flows, levers)
    steps = [sorted({max(1, int(share * len(lever.steps))) for share in shares}) for lever in levers]
    networks = [
        {index: steps[index][place] for index in group if place < len(steps[index])}
        for place in range(max(map(len, steps), default=0))
        for group in apart.groups
    ]
    networks = [pulled for pulled in networks if pulled]
    # A pass to fit and one to judge a network, the dense one's, and a backward pass is about two.
    passes = 2 * len(networks) + 2 + 2 * DIRECTIONS
    count = max(FEWEST, min(MOST_IMAGES, PASSES * images.count // passes))
    size = sum(tensor.nbytes for tensor in tensors_of(images.trace.model))
    at_once = max(1, MEMORY // max(size, 1))
    losses: dict[tuple[int, int], float] = {}
    for start in range(0, len(networks), at_once):
        losses |= _probe(flows, images, levers, apart, networks[start : start + at_once], count)
        if progress:
            progress(f"sensitivities {min(start + at_once, len(networks))}/{len(networks)}")
    return [_rising(own, [losses[index, step] for step in own]) for index, own in enumerate(steps)]


def _probe(
    flows: Flows,
    images: Images,
    levers: Sequence[Lever],
    apart: Apart,
    networks: Sequence[dict[int, int]],
    count: int,
) -> dict[tuple[int, int], float]:
    """The losses by lever and steps, fitted to `count` images and judged by as many others."""
    fit, judges = images.apart(count, count)
    source = walk_dense(images.trace, fit)
    probes = [Probe(flows, levers, pulled, source) for pulled in networks]
    spreads = spreads_of(fit_probes(source, probes, TRIAL_STRENGTH, TRIAL_ROWS))
    wholes = {stop.source for probe in probes for stop in probe.stops if stop.whole}
    size = max(1, min(AT_ONCE, MEMORY // _bytes(wholes)))
    sums: dict[tuple[int, int], float] = {key: 0.0 for pulled in networks for key in pulled.items()}
    parts = [
        tuple(value[at : at + size] for value in chunk) for chunk in judges for at in range(0, len(chunk[0]), size)
    ]
    for seed, part in enumerate(parts):
        felt = Felt(source, part, wholes, spreads, DIRECTIONS, seed)
        for probe in probes:
            for index, change in probe.judge(part, felt, apart).items():
                sums[index, probe.pulled[index]] += float(change.square().sum()) / DIRECTIONS
    judged = sum(len(part[0]) for part in parts)
    return {key: total / judged for key, total in sums.items()}


def _bytes(nodes: set[fx.Node]) -> int:
    """What values and gradients of some nodes take for one image."""
    values: list[Any] = [value_of(node) for node in nodes]
    numbers = sum(value.numel() // max(1, len(value)) for value in values if isinstance(value, Tensor))
    return max(1, numbers * 4 * (DIRECTIONS + 2))


def _rising(steps: Sequence[int], losses: Sequence[float]) -> Curve:
    """A curve that never falls: what falls again with more steps is noise."""
    return Curve(tuple(steps), tuple(accumulate(losses, max)))
