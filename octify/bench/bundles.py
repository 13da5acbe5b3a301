"""Octave only where it wins on this machine: bundles of tied convolutions are measured octave and dense."""

from __future__ import annotations

import statistics
from bisect import bisect_left
from collections import defaultdict
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
from octify.flows import Flows
from octify.graph import shape_of, value_of
from octify.recipe import Recipe

MARGIN = 0.99  # what the other must win to be taken, and in three pairs of four it must win at all
ALPHAS = (0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875)


@dataclass(frozen=True)
class BundleTiming:
    """Bundles that look the same: their convolutions, the network's ms with them octave and dense, and what was kept.

    `bundles` is how many they are.
    """

    convolutions: tuple[str, ...]
    octave_ms: float
    dense_ms: float
    octave: bool
    bundles: int = 1


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
    """Starts from the recipe's network and puts back to dense what is clearly faster so.

    Bundles whose convolutions look the same are tried together. What is left is measured against the recipe's network
    and the dense one once more: the faster of the two it is, or the dense network where neither clearly beats it.

    Raises:
        BackendError: the backend is not installed, or cannot run the network.
        ConversionError: the recipe converts nothing.
    """
    chosen = (settings or Settings()).checked()
    search = Search(Conversion.read(model, recipe, example_inputs), chosen, rounds)
    with threads(chosen.threads):
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
    chosen = (settings or Settings()).checked()
    reading = Conversion.read(model, recipe, example_inputs)

    def reaches(alpha: float) -> bool:
        if progress:
            progress(f"alpha {alpha:g}")
        return search_at(alpha).latency() <= target_ms

    def search_at(alpha: float) -> Search:
        return Search(reading.again(recipe.with_alpha(alpha)), chosen, rounds)

    with threads(chosen.threads):
        least = bisect_left(ALPHAS, True, key=reaches)
        alpha = ALPHAS[min(least, len(ALPHAS) - 1)]  # where none does, one with less of it octave still may
        found = search_at(alpha).run(progress)
    nearest = min(found.octave_ms, found.dense_ms)
    if nearest > target_ms:
        raise BackendError(
            f"no alpha up to {alpha:g} reaches {target_ms:g} ms here: the nearest takes {nearest:.1f} ms"
        )
    return found


class Search:
    """Networks of one model that differ in what is dense, measured against each other; bundles in groups of a look."""

    def __init__(self, reading: Conversion, settings: Settings, rounds: int) -> None:
        self.reading, self.recipe, self.settings, self.rounds = reading, reading.recipe, settings, rounds
        octave = {op.target for op in reading.plan().converted}
        alike: dict[Any, list[tuple[str, ...]]] = defaultdict(list)
        for path, flows in reading.parts:
            for bundle in flows.classes.bundles:
                names = tuple(f"{path}.{name}" if path else name for name in bundle.writers)
                if bundle.alpha > 0 and octave.intersection(names):
                    look = frozenset(look_of(flows, name) for name in bundle.writers)
                    alike[path, bundle.alpha, look].append(names)
        self.groups = list(alike.values())
        if not self.groups:
            raise ConversionError("the recipe converts nothing: there is nothing to measure")
        self.inputs: Sequence[Tensor] = random_inputs(reading.model, reading.example)

    def latency(self) -> float:
        """The recipe's own network in ms."""
        return median_ms(*self.times([self.runner([])]))

    def run(self, progress: Progress | None) -> Faster:
        rows, start, current = self.sift(progress)
        dense = [name for row in rows if not row.octave for name in row.convolutions]
        return self._verdict(rows, {"none": self.runner(None), "chosen": current, "all": start}, dense)

    def sift(self, progress: Progress | None) -> tuple[list[BundleTiming], Any, Any]:
        """Row by row, each measured with the losers before it dense; the whole recipe's network and what is left."""
        dense: list[str] = []
        rows: list[BundleTiming] = []
        start = current = self.runner(dense)
        for index, bundles in enumerate(self.groups):
            names = [name for bundle in bundles for name in bundle]
            if progress:
                progress(f"{index + 1} of {len(self.groups)}: {names[0]}")
            candidate = self.runner([*dense, *names])
            times = self.times([current, candidate])
            keep = not _clearly_faster(times[1], times[0])
            octave_ms, dense_ms = map(median_ms, times)
            rows.append(BundleTiming(tuple(names), octave_ms, dense_ms, keep, len(bundles)))
            if not keep:
                dense, current = [*dense, *names], candidate
        return rows, start, current

    def _verdict(self, rows: list[BundleTiming], runners: dict[str, Any], dense: list[str]) -> Faster:
        """The faster of what was chosen and the whole recipe, if it clearly beats the dense network."""
        everything = [name for row in rows for name in row.convolutions]
        left_dense = {"none": everything, "chosen": dense, "all": []}
        times = dict(zip(runners, self.times(list(runners.values())), strict=True))
        best = min(("chosen", "all"), key=lambda name: median_ms(times[name]))
        if not _clearly_faster(times[best], times["none"]):
            best = "none"
        recipe = self.with_dense(left_dense[best])
        kept = [replace(row, octave=row.convolutions[0] not in left_dense[best]) for row in rows]
        dense_ms, octave_ms = median_ms(times["none"]), median_ms(times[best])
        return Faster(recipe, self._text(recipe, dense_ms, octave_ms), tuple(kept), dense_ms, octave_ms)

    def with_dense(self, dense: Sequence[str]) -> Recipe:
        """The recipe with these convolutions dense."""
        data = self.recipe.to_dict()
        data["layers"] = [{"match": path, "alpha": 0.0} for path in dense] + list(data.get("layers", []))
        return Recipe.from_dict(data, self.recipe.name or "recipe")

    def runner(self, dense: Sequence[str] | None) -> Any:
        """The network with these convolutions dense; None: all of them."""
        return self.runner_of(Recipe.uniform(0.0) if dense is None else self.with_dense(dense))

    def runner_of(self, recipe: Recipe) -> Any:
        """The network under another recipe."""
        reading = self.reading.again(recipe)
        return runner(reading.apply(reading.plan()), self.inputs, self.settings)

    def times(self, calls: list[Any]) -> list[list[float]]:
        """Seconds of each, measured in turn."""
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


def look_of(flows: Flows, writer: str) -> tuple[Any, ...]:
    """What tells how fast a writer is, besides how many channels it reads: its geometry and the map that it gives."""
    calls = flows.by_target.get(writer, [])
    if not calls:
        return (writer,)  # no module: alike to nothing
    module = flows.trace.module_of(calls[0])
    geometry = [getattr(module, name, None) for name in ("kernel_size", "stride", "dilation", "groups")]
    return (type(module), *geometry, *(shape_of(value_of(call)) for call in calls))


def median_ms(seconds: list[float]) -> float:
    return 1000 * statistics.median(seconds)


def _clearly_faster(one: list[float], other: list[float]) -> bool:
    """Pair by pair, so that what slows the machine down for a while slows both."""
    ratios = sorted(a / b for a, b in zip(one, other, strict=True))
    return statistics.median(ratios) < MARGIN and ratios[3 * len(ratios) // 4] < 1
