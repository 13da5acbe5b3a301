"""The calibration as a whole: which channels, how many where, kernels, statistics, distillation, verdict."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from octify.calibrate.budget import Curve, allocate, refuse_unreachable, uniform_counts
from octify.calibrate.clock import fit_seconds, in_words
from octify.calibrate.costs import CostModel
from octify.calibrate.data import Images, output_loss, read_images
from octify.calibrate.distil import BATCH, distil
from octify.calibrate.expect import Expected, expect
from octify.calibrate.fit import fit_kernels
from octify.calibrate.heap import kept_memory
from octify.calibrate.latency import LatencyModel, LatencyTable, in_time
from octify.calibrate.levers import Lever, find_levers, low_classes, recipe_with
from octify.calibrate.rank import channel_loss
from octify.calibrate.report import CalibrationReport, Step
from octify.calibrate.sensitivity import FEWEST, PASSES, measure_curves
from octify.calibrate.statistics import norms_of, run_model, try_norms
from octify.calibrate.trials import run_trials
from octify.calibrate.verdict import agreement
from octify.cost import model_cost, source_cost
from octify.errors import CalibrationError, CalibrationWarning
from octify.flows import Flows
from octify.module import OctaveModule

Progress = Callable[[str], None]
RANKING_IMAGES = 64
TRIAL_IMAGES, JUDGES = 48, 64
NORM_IMAGES = 256  # say what a channel's mean and variance are as well as more do
ENOUGH_JUDGES = 16  # images held back; fewer say too little of what is kept
MANY_IMAGES = 128  # more hardly help
QUICK = 0.3  # a trial's fits against the full ones
BIAS_ONLY = (1e9,)  # a ridge so strong that only biases move


@dataclass(frozen=True)
class Options:
    """What a calibration does: see `octify.convert`."""

    target: float | None = None
    max_loss: float | None = None
    samples: int | None = None
    choose: bool = True
    fit: bool = True
    statistics: bool | str = "auto"
    distil: int = 0
    seed: int = 0
    progress: Progress | None = None
    latency: LatencyTable | None = None


class Calibration:
    """One calibration at work: its images, its options and its report."""

    def __init__(self, flows: Flows, batches: Sequence[Any], options: Options) -> None:
        _refuse_senseless(options)
        self.flows, self.options = flows, options
        self.recipe = flows.recipe  # once run, the one that was chosen
        self.images: Images = read_images(flows.trace, batches, options.samples)
        held = sum(len(chunk[0]) for chunk in self.images.held)
        self.report = CalibrationReport(images=self.images.count, held_back=held)
        self.dense_macs = source_cost(flows.trace).gmacs
        self._trials: list[tuple[set[int], Expected]] = []  # which classes were low, and what that came to
        self._times: dict[tuple[int, ...], str] = {}  # what was measured of counts
        self._tell(f"calibrating on {self.images.count} images: {in_words(self._seconds())}")

    @kept_memory()
    def run(self, finish: Callable[[Flows], OctaveModule]) -> OctaveModule:
        """Chooses, rewrites by `finish`, fits and judges.

        Raises:
            CalibrationError: the images cannot be used, or the budget cannot be met.
            ConversionError: nothing would change.
        """
        low = self.choose_low()
        if self.options.fit and self._forecast(low) is None and self.report.held_back < ENOUGH_JUDGES:
            with self._step("trial"):
                self._try([low])
        self._warn(low)
        self.recipe = recipe_with(self.flows, low)
        converted = finish(self.flows.again(self.recipe))
        training = converted.training
        converted.eval()
        self.tune(converted)
        self._judge(converted, self._forecast(low))
        object.__setattr__(converted, "octify_report", self.report)
        return converted.train(training)

    def _seconds(self) -> float:
        """About how long all of it takes: passes of the dense network, layers to fit, steps of distillation."""
        options, count = self.options, self.images.count
        fits = fit_seconds(self.flows.trace, count) if options.fit or options.target else 0.0
        trials = (3.0 if options.target else 0.0) + (15.0 if options.max_loss else 0.0)
        images = 3.0 * options.fit * count + 1.5 * options.choose * min(RANKING_IMAGES, count)
        images += 2.0 * bool(options.statistics) * min(NORM_IMAGES, count)
        images += 2.0 * trials * min(TRIAL_IMAGES + JUDGES, count)
        images += 4.0 * options.distil * BATCH
        quick = QUICK * (trials + 3.0 * bool(options.choose and trials))
        passes = max(PASSES, 30 * FEWEST / count) * bool(options.choose and trials)
        return (options.fit + quick) * fits + (images / count + passes) * self.images.pass_seconds

    # Which channels, and how many where.

    def choose_low(self) -> set[int]:
        """The classes that go low."""
        options = self.options
        felt: dict[int, float] = {}
        if options.choose:
            with self._step("channels"):
                felt = channel_loss(self.flows, self.images.trace, self.images.some(RANKING_IMAGES))
        levers = find_levers(self.flows, felt)
        if not levers:
            return set()  # nothing can be octave, which the conversion says
        if options.target is None and options.max_loss is None:
            return low_classes(levers, [int(lever.alpha * len(lever.steps) + 1e-9) for lever in levers])
        place = (self.flows, levers, self.dense_macs * 1e9)
        cost = CostModel(*place) if options.latency is None else LatencyModel(*place, options.latency)
        with self._step("budget") as step:
            counts = self._counts(levers, cost)
            step.note = self._times.get(tuple(counts), "")
        self.report.alphas = {lever.name: count / len(lever.steps) for lever, count in zip(levers, counts, strict=True)}
        return low_classes(levers, counts)

    def _counts(self, levers: Sequence[Lever], cost: CostModel) -> list[int]:
        """The counts for the target, or for the lowest cost at which the loss stays below `max_loss`."""
        options = self.options
        refuse_unreachable(levers, cost, options.target or 1.0)
        curves = measure_curves(self.flows, self.images, levers, options.progress) if options.choose else []
        if options.max_loss is None:
            candidates = self._that_meet(levers, curves, cost, options.target or 1.0)
            return self._best(levers, candidates)[1] if len(candidates) > 1 else candidates[0]
        least = float(cost.ratio(np.array([len(lever.steps) for lever in levers]) * 0.8))
        low, high = max(least, options.target or 0.0), 1.0
        found: list[int] | None = None
        for _ in range(5):
            middle = (low + high) / 2
            loss, counts = self._best(levers, _candidates(levers, curves, cost, middle))
            if loss <= options.max_loss:
                high, found = middle, counts
            else:
                low = middle
        if found is None:
            raise CalibrationError(f"no conversion keeps the loss below max_loss {options.max_loss:g} on these images")
        return found

    def _that_meet(
        self, levers: Sequence[Lever], curves: Sequence[Curve], cost: CostModel, target: float
    ) -> list[list[int]]:
        """What meets the target; a latency is measured."""
        table = self.options.latency
        if table is None:
            return _candidates(levers, curves, cost, target)
        self._tell("latencies")
        met = in_time(
            table,
            target,
            lambda aim: _candidates(levers, curves, cost, aim),
            lambda counts: recipe_with(self.flows, low_classes(levers, counts)),
        )
        for counts, share in met.items():
            self._times[counts] = f"{share * table.dense_ms:.2f} ms, dense {table.dense_ms:.2f} ms"
        return [list(counts) for counts in met]

    def _best(self, levers: Sequence[Lever], candidates: Sequence[list[int]]) -> tuple[float, list[int]]:
        outcomes = self._try([low_classes(levers, counts) for counts in candidates])
        return min(zip([outcome.loss for outcome in outcomes], candidates, strict=True))

    def _try(self, trials: Sequence[set[int]]) -> list[Expected]:
        """What is expected of networks in which these classes are low."""
        found = run_trials(self.flows, self.images, trials, TRIAL_IMAGES, JUDGES)
        self._trials += zip(trials, found, strict=True)
        return found

    def _forecast(self, low: set[int]) -> Expected | None:
        """What a trial said of a choice, if there was one."""
        return next((expected for tried, expected in self._trials if tried == low), None)

    def _warn(self, low: set[int]) -> None:
        """Says before the long work what it will come to, and warns if that is little."""
        expected = self._forecast(low)
        if expected is None:
            return
        self._tell(f"a quick trial keeps {expected}")
        if expected.is_poor:
            more = f", and so do more images than {self.images.count}" if self.images.count < MANY_IMAGES else ""
            text = f"a quick trial loses much: {expected}; a higher target or a lower alpha keeps more{more}"
            warnings.warn(text, CalibrationWarning, stacklevel=2)

    # Kernels, statistics, distillation.

    @cached_property
    def dense(self) -> list[Any]:
        """What the dense network gives for the images held back."""
        return run_model(self.images.trace.model, self.images.held)

    def tune(self, converted: OctaveModule) -> None:
        """Changes the weights of a converted network (in eval mode) so that it follows the dense one."""
        options, images, dense = self.options, self.images, self.dense

        def loss() -> float:
            return output_loss(dense, run_model(converted, images.held))

        if options.fit:
            with self._step("kernels", loss):
                self.report.layers = fit_kernels(
                    images.trace, converted, images.fit, seed=options.seed, progress=options.progress
                )
        if options.statistics:
            self._statistics(converted)
        if options.distil:
            with self._step("distillation", loss) as step:
                told = distil(images, converted, options.distil, seed=options.seed, progress=options.progress)
                step.note = f"best of {told.steps} steps: {told.best_step}"

    def _statistics(self, converted: OctaveModule) -> None:
        with self._step("statistics") as step:
            if norms_of(converted):
                step.before, after = try_norms(converted, self.images.some(NORM_IMAGES), self.images.held, self.dense)
                step.after = min(step.before, after)
                step.note = "" if after < step.before else f"batch norm left: {after:.4f} re-estimated"
            elif not self.options.fit:
                fit_kernels(self.images.trace, converted, self.images.fit, strengths=BIAS_ONLY, seed=self.options.seed)
                step.note = "biases corrected"
            else:
                step.note = "no batch norm; biases are fitted with the kernels"

    # The report.

    def _judge(self, converted: OctaveModule, forecast: Expected | None) -> None:
        """What is kept on images held back; of few of them the trial's more judges say what to expect."""
        images, report = self.images, self.report
        octave = run_model(converted, images.held)
        report.loss, report.agreement = output_loss(self.dense, octave), agreement(self.dense, octave)
        report.cost = model_cost(converted, self.flows.trace.inputs).gmacs / self.dense_macs
        report.expected = forecast
        if forecast is None or forecast.judges < report.held_back or report.held_back >= ENOUGH_JUDGES:
            known = run_model(images.trace.model, images.some(RANKING_IMAGES // 2))
            report.expected = expect(known, self.dense, octave)

    def _tell(self, text: str) -> None:
        if self.options.progress:
            self.options.progress(text)

    @contextmanager
    def _step(self, name: str, loss: Callable[[], float] | None = None) -> Generator[Step, None, None]:
        self._tell(name)
        step = Step(name, loss() if loss else None, None, 0.0)
        start = time.perf_counter()
        yield step
        step.seconds = time.perf_counter() - start
        if loss:
            step.after = loss()
        self.report.steps.append(step)


def _refuse_senseless(options: Options) -> None:
    for name, value in (("target", options.target), ("max_loss", options.max_loss)):
        if not isinstance(value, int | float | None):  # pyright: ignore[reportUnnecessaryIsInstance] - users pass text
            raise CalibrationError(f"{name} is {value!r}: expected a number")
    if options.target is not None and not 0 < options.target <= 1:
        raise CalibrationError(
            f"target is {options.target:g}: expected a share of the dense cost, above 0 and at most 1"
        )
    if options.max_loss is not None and not options.max_loss >= 0:
        raise CalibrationError(
            f"max_loss is {options.max_loss:g}: expected a share of the outputs' variance, 0 or more"
        )


def _candidates(levers: Sequence[Lever], curves: Sequence[Curve], cost: CostModel, target: float) -> list[list[int]]:
    """One alpha for all; if curves say what each lever costs also what they find best, and what lies between."""
    even = uniform_counts(levers, cost, target)
    if not curves:
        return [even]
    chosen = allocate(levers, curves, cost, target)
    halfway = [(first + second) // 2 for first, second in zip(chosen, even, strict=True)]
    between = allocate(levers, curves, cost, target, halfway)
    return [list(counts) for counts in dict.fromkeys(map(tuple, (chosen, between, even)))]
