"""Calibration of models that do not trace as a whole: each part by what it is given when the model sees the images."""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# (tensor and array methods that come without complete types)

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from octify.calibrate.data import collect_inputs
from octify.calibrate.levers import join_recipes
from octify.calibrate.report import CalibrationReport, join_reports
from octify.calibrate.run import Calibration, Options
from octify.calibrate.verdict import Verdict, compare
from octify.errors import CalibrationError
from octify.flows import Flows
from octify.graph import sharing_copy
from octify.module import OctaveModule
from octify.parts import Parts, run_on
from octify.recipe import Recipe


def calibrate_parts(
    model: nn.Module,
    parts: Parts,
    batches: Sequence[Any],
    options: Options,
    finish: Callable[[Flows], OctaveModule],
    inputs: int = 1,
) -> tuple[dict[str, OctaveModule], Parts, CalibrationReport]:
    """Converts each part by the images that reach it: the parts, what flows in them now, and one report.

    A part that is given lists of maps (a detector's head) is left out: it is converted without images.

    Raises:
        CalibrationError: the images cannot be used, or the budget cannot be met.
    """
    given = record_parts(model, [path for path, _ in parts], batches, inputs)
    done: dict[str, OctaveModule] = {}
    recipes: list[Recipe] = []
    reports: list[tuple[str, CalibrationReport]] = []
    for path, flows in parts:
        if path not in given:
            continue
        calibration = Calibration(flows, given[path], replace(options, progress=_named(options, path)))
        done[path] = calibration.run(finish)
        recipes.append(calibration.recipe)
        reports.append((path, calibration.report))
    recipe = join_recipes(recipes)
    chosen = [(path, flows.again(recipe)) for path, flows in parts]
    return done, chosen, join_reports(reports)


def record_parts(
    model: nn.Module, paths: Sequence[str], batches: Sequence[Any], wanted: int = 1
) -> dict[str, list[tuple[Tensor, ...]]]:
    """What each submodule is given first, batch by batch, when a model in eval mode runs on the images.

    Submodules that are given anything but tensors are left out. `wanted` is how many inputs the model takes.

    Raises:
        CalibrationError: a batch holds no tensors, or does not reach a part.
    """
    watched = sharing_copy(model).eval()
    device = next((tensor.device for tensor in model.parameters()), torch.device("cpu"))
    found: dict[str, list[tuple[Tensor, ...]]] = {path: [] for path in paths}
    others: set[str] = set()
    for count, inputs in enumerate(collect_inputs(batches, wanted), start=1):

        def hook(path: str, enough: int = count) -> Any:
            def record(_: nn.Module, args: tuple[Any, ...]) -> None:
                if not all(isinstance(value, Tensor) for value in args):
                    others.add(path)
                elif len(found[path]) < enough:
                    found[path].append(tuple(value.detach().clone() for value in args))

            return record

        with torch.no_grad(), ExitStack() as stack:
            for path in paths:
                stack.callback(watched.get_submodule(path).register_forward_pre_hook(hook(path)).remove)
            run_on(watched, [value.to(device) for value in inputs])
        for path in paths:
            if len(found[path]) < count and path not in others:
                raise CalibrationError(f"{path} is not run on calibration batch {count}: there is nothing to fit it to")
    return {path: batches for path, batches in found.items() if path not in others}


def compare_parts(
    source: nn.Module, converted: nn.Module, paths: Sequence[str], batches: Sequence[Any], inputs: int = 1
) -> Verdict:
    """Measures the converted parts of a model by what the images give to each; the worst part's figures stand.

    Raises:
        CalibrationError: the images cannot be used.
    """
    given = record_parts(source, paths, batches, inputs)
    found = [
        (path, compare(source.get_submodule(path), converted.get_submodule(path), given[path], kind="features"))
        for path in given
    ]
    worst = max((verdict for _, verdict in found), key=lambda verdict: verdict.loss)
    layers = [replace(row, layer=f"{path}.{row.layer}") for path, verdict in found for row in verdict.layers]
    return replace(worst, layers=layers)


def _named(options: Options, path: str) -> Callable[[str], None] | None:
    tell = options.progress
    return None if tell is None else lambda text: tell(f"{path}: {text}")
