"""Octave only where it wins on this machine: every bundle of tied convolutions is measured octave and dense."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import date
from typing import Any

import torch
from torch import Tensor, nn

from octify.bench.clock import Progress, clock_of, interleave
from octify.bench.compare import machine_of, random_inputs
from octify.bench.runners import Settings, runner, threads
from octify.conversion import Conversion
from octify.convert import Example
from octify.errors import BackendError, ConversionError
from octify.recipe import Recipe

MARGIN = 0.99  # what dense must win for a bundle to go back to it, and in three pairs of four it must win at all
ALPHAS = (0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875)


@dataclass(frozen=True)
class BundleTiming:
    """One bundle: its convolutions, the network's ms with it octave and with it dense, and which was kept."""

    convolutions: tuple[str, ...]
    octave_ms: float
    dense_ms: float
    octave: bool


@dataclass(frozen=True)
class Faster:
    """The recipe that keeps what wins, as text too, with the machine in it; and what was measured."""

    recipe: Recipe
    text: str
    bundles: tuple[BundleTiming, ...]
    dense_ms: float
    octave_ms: float


def only_faster(
    model: nn.Module,
    recipe: Recipe,
    example_inputs: Example = None,
    settings: Settings | None = None,
    rounds: int = 10,
    progress: Progress | None = None,
) -> Faster:
    """Starts from the recipe's network and puts every bundle back to dense that is clearly faster so.

    What is left is measured against the recipe's network and the dense one once more: the fastest of the three it is.

    Raises:
        BackendError: the backend is not installed, or cannot run the network.
        ConversionError: the recipe converts nothing.
    """
    search = _Search(model, recipe, example_inputs, (settings or Settings()).checked(), rounds)
    with threads(search.settings.threads):
        return search.run(progress)


def reach_latency(
    model: nn.Module,
    recipe: Recipe,
    target_ms: float,
    example_inputs: Example = None,
    settings: Settings | None = None,
    rounds: int = 10,
    progress: Progress | None = None,
) -> Faster:
    """The smallest alpha whose network runs within `target_ms`, octave only where that wins.

    Raises:
        BackendError: no alpha gets there; the message says how near the nearest comes.
        RecipeError: the recipe takes no alpha.
    """
    best = float("inf")
    for alpha in ALPHAS:
        found = only_faster(model, recipe.with_alpha(alpha), example_inputs, settings, rounds, progress)
        if min(found.octave_ms, found.dense_ms) <= target_ms:
            return found
        best = min(best, found.octave_ms)
    raise BackendError(f"no alpha up to {ALPHAS[-1]} reaches {target_ms:g} ms here: the nearest takes {best:.1f} ms")


class _Search:
    def __init__(
        self, model: nn.Module, recipe: Recipe, example_inputs: Example, settings: Settings, rounds: int
    ) -> None:
        self.model, self.recipe, self.settings, self.rounds = model, recipe, settings, rounds
        reading = Conversion.read(model, recipe, example_inputs)
        decided = reading.plan()
        self.example = reading.example
        octave = {op.target for op in decided.converted}
        groups = [
            [f"{path}.{name}" if path else name for name in bundle.writers]
            for path, flows in reading.parts
            for bundle in flows.classes.bundles
            if bundle.alpha > 0
        ]
        self.bundles = [tuple(group) for group in groups if octave.intersection(group)]
        if not self.bundles:
            raise ConversionError("the recipe converts nothing: there is nothing to measure")
        self.inputs: Sequence[Tensor] = random_inputs(model, self.example)

    def run(self, progress: Progress | None) -> Faster:
        dense: list[str] = []
        rows: list[BundleTiming] = []
        start = current = self._runner(dense)
        for index, bundle in enumerate(self.bundles):
            if progress:
                progress(f"bundle {index + 1} of {len(self.bundles)}: {bundle[0]}")
            candidate = self._runner([*dense, *bundle])
            times = self._times([current, candidate])
            octave_ms, dense_ms = map(_ms, times)
            keep = not _clearly_faster(times[1], times[0])
            rows.append(BundleTiming(bundle, octave_ms, dense_ms, keep))
            if not keep:
                dense, current = [*dense, *bundle], candidate
        everything = [name for bundle in self.bundles for name in bundle]
        choices = [everything, dense, []]
        medians = [*map(_ms, self._times([self._runner(None), current, start]))]
        best = medians.index(min(medians))
        recipe = self._recipe(choices[best])
        kept = [replace(row, octave=row.convolutions[0] not in choices[best]) for row in rows]
        return Faster(recipe, self._text(recipe, medians[0], medians[best]), tuple(kept), medians[0], medians[best])

    def _recipe(self, dense: Sequence[str]) -> Recipe:
        data = self.recipe.to_dict()
        data["layers"] = [{"match": path, "alpha": 0.0} for path in dense] + list(data.get("layers", []))
        return Recipe.from_dict(data, self.recipe.name or "recipe")

    def _runner(self, dense: Sequence[str] | None) -> Any:
        """The network with these convolutions dense; None: all of them."""
        recipe = Recipe.uniform(0.0) if dense is None else self._recipe(dense)
        reading = Conversion.read(self.model, recipe, self.example)
        return runner(reading.apply(reading.plan()), self.inputs, self.settings)

    def _times(self, calls: list[Any]) -> list[list[float]]:
        return interleave(calls, self.rounds, 2, clock_of(torch.device(self.settings.device)))

    def _text(self, recipe: Recipe, dense_ms: float, octave_ms: float) -> str:
        machine = machine_of(torch.device(self.settings.device), self.settings.threads)
        shape = ", ".join("x".join(map(str, value.shape)) for value in self.inputs)
        return (
            f"# Octave only where it was faster, measured on {date.today()}: {machine['processor']}, "
            f"{machine['threads']} thread(s), torch {machine['torch']},\n"
            f"# {self.settings.backend}, {self.settings.dtype}, input {shape}: "
            f"dense {dense_ms:.2f} ms, this recipe {octave_ms:.2f} ms.\n{recipe.to_yaml()}"
        )


def _ms(seconds: list[float]) -> float:
    return 1000 * statistics.median(seconds)


def _clearly_faster(one: list[float], other: list[float]) -> bool:
    """Pair by pair, so that what slows the machine down for a while slows both."""
    ratios = sorted(a / b for a, b in zip(one, other, strict=True))
    return statistics.median(ratios) < MARGIN and ratios[3 * len(ratios) // 4] < 1
