"""Trials: whole networks, quickly fitted, against the dense one."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from typing import Any, cast

from torch import Tensor, fx, nn

from octify.calibrate.data import Images
from octify.calibrate.expect import Expected, expect
from octify.calibrate.fit import FitWork
from octify.calibrate.least_squares import ROWS_PER_UNKNOWN
from octify.calibrate.levers import recipe_with
from octify.calibrate.store import MEMORY, Store
from octify.calibrate.walk import Chunk, Walk, walk_dense
from octify.flows import Flows
from octify.graph import shape_of, tensors_of, value_of
from octify.module import OctaveModule
from octify.plan import make_plan
from octify.rewrite import rewrite_graph
from octify.trace import Trace

TRIAL_STRENGTH, TRIAL_ROWS = (0.01,), 0.25
DONE = (sys.maxsize, True)  # the place of a trial that has no more to do
REPAIRED = 576  # unknowns: what dense layers of so many can make up for behind a lever is not its cost


def run_trials(
    flows: Flows,
    images: Images,
    trials: Sequence[set[int]],
    count: int,
    judges: int,
) -> list[Expected]:
    """What is expected of networks in each of which exactly these classes are low, fitted to `count` images.

    `judges` others judge them: on the few images that they are fitted to they look better than they are.
    The dense network runs once for as many of them as memory may hold, and each only from where it begins to differ.
    """
    chunks = images.apart(count, judges)
    size = sum(tensor.nbytes for tensor in tensors_of(images.trace.model))
    at_once = max(1, min(len(trials), MEMORY // max(size, 1)))
    found: list[Expected] = []
    for start in range(0, len(trials), at_once):
        found += _side_by_side(flows, images.trace, *chunks, trials[start : start + at_once])
    return found


def _side_by_side(
    flows: Flows, trace: Trace, fit: Sequence[Chunk], judges: Sequence[Chunk], trials: Sequence[set[int]]
) -> list[Expected]:
    source, store = walk_dense(trace, [*fit, *judges]), Store()
    made = [_Trial(flows, low, source, store, len(fit)) for low in trials]
    while (trial := min(made, key=lambda trial: trial.place)).place < DONE:
        trial.advance()
    dense = source.run()
    known, judged = dense[: len(fit)], dense[len(fit) :]
    return [expect(known, judged, (trial.outputs or dense)[len(fit) :]) for trial in made]


class _Trial:
    """One octave network beside the dense one."""

    def __init__(self, flows: Flows, low: set[int], source: Walk, store: Store, chunks: int) -> None:
        self.outputs: list[Any] = []
        self.source, self.store, self.chunks = source, store, chunks
        self._flows = flows.again(recipe_with(flows, low))
        self._plan = make_plan(self._flows)
        self._index = {node: index for index, node in enumerate(source.nodes)}
        self._work: FitWork | None = None
        changed = {op.name for op in self._plan.ops if op.form != "dense"}
        first = next((index for index, node in enumerate(source.nodes) if node.name in changed), None)
        # When its turn comes: at which node of the dense network, and whether that must have run.
        self.place: tuple[int, bool] = DONE if first is None else (first, False)

    def advance(self) -> None:
        """Begins, or fits one layer; behind the last one runs to the end."""
        work = self._work
        if work is None:
            self.source.run_before(self.source.nodes[self.place[0]])
            converted = rewrite_graph(self._flows, self._plan).eval()
            octave = self.source.fork(converted, converted.graph, self.store)
            work = self._work = fit_of_trial(self.source, octave, converted, self.chunks)
        else:
            work.fit_next(self.source)
        self.place = (self._index[work.wanted], True) if work.wanted else DONE
        if self.place == DONE:
            self.outputs, self._work = work.octave.run(), None


def fit_of_trial(source: Walk, octave: Walk, converted: OctaveModule, chunks: int) -> FitWork:
    """How the layers of a trial are fitted, to the first chunks: quickly."""
    images = sum(len(chunk[0]) for chunk in source.chunks[:chunks])

    def repairs(node: fx.Node, module: nn.Module) -> bool:
        weight, shape = cast(Tensor, module.weight), shape_of(value_of(node)) or (1, 1)
        outputs = cast(int, getattr(module, "out_channels", None) or getattr(module, "out_features", 1))
        unknowns = weight.numel() // outputs
        return unknowns <= REPAIRED and images * math.prod(shape[1:]) // outputs >= ROWS_PER_UNKNOWN * unknowns

    return FitWork(source, octave, converted, TRIAL_STRENGTH, repairs=repairs, rows=TRIAL_ROWS, chunks=chunks)
