"""A model and a recipe → the octave model."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from octify.branches import Branches, takes_branches
from octify.calibrate.data import Batches, example_of_batches, take_batches
from octify.calibrate.latency import LatencyTable
from octify.calibrate.parts import calibrate_parts
from octify.calibrate.report import CalibrationReport
from octify.calibrate.run import Calibration, Options
from octify.check import check_graph
from octify.errors import CalibrationError, ConversionError, ModelError, RecipeError, TraceError
from octify.flows import Flows, asks_for_change
from octify.graph import paused_collection, set_module
from octify.module import OctaveModule
from octify.operators import check_operators, find_operator
from octify.origin import Origin, origin_of, set_origin
from octify.parts import Parts, convolutions, find_parts, plan_parts, rewrite_parts, within
from octify.plan import Plan, make_plan
from octify.recipe import Recipe, load_recipe
from octify.rewrite import rewrite_graph
from octify.trace import SIZED, WAYS, Trace, required_inputs, trace_model
from octify.zoo import input_shape

Example = Tensor | Sequence[int] | Sequence[Any] | None


def convert(
    model: nn.Module,
    *,
    alpha: float | None = None,
    recipe: str | Recipe | None = None,
    example_inputs: Example = None,
    kernels: str | None = None,
    operator: str | None = None,
    c0: int | None = None,
    calibration: Batches | None = None,
    target: float | None = None,
    latency: LatencyTable | None = None,
    max_loss: float | None = None,
    samples: int | None = 512,
    choose: bool = True,
    fit: bool = True,
    statistics: bool | str = "auto",
    distil: int = 0,
    seed: int = 0,
    progress: Callable[[str], None] | None = None,
) -> nn.Module:
    """Turns a CNN into an octave CNN with the same weights, as far as octave convolutions can express them.

    `alpha` is the share of low channels (0.25 unless the recipe says otherwise), `recipe` a Recipe, a file or a
    built-in name, `example_inputs` a tensor, a tuple of tensors or a shape (the model's own default, else
    1x3x224x224), `kernels` "sharp" (or "fold") for trained weights, "paper" for training from scratch. The source
    stays as it is.
    `operator` is what takes the convolutions' places: "octave", "compconv" (with its `c0`; kernels "spatial" or "all")
    or a registered one.
    The result is an OctaveModule (a GraphModule); of a model that does not trace as a whole (a detector), a copy whose
    largest traceable submodules are OctaveModules.

    `calibration` is images without labels (a tensor or batches, of which `samples` are used) by which the network keeps
    what it knows: they say which channels go low (`choose`) and, for a `target` (multiply-adds against dense, or time
    with a `latency` by `octify.bench.measure_latency`, whose recipe is taken) or a `max_loss` (squared error of the
    outputs, as a share of their variance), how many of which layer; they fit the kernels (`fit`), judge batch norm's
    `statistics`, and are distilled on for `distil` steps. `octify_report` of the result tells what each step did. The
    same images and `seed` give the same bytes, unless times chose.

    Raises:
        RecipeError, ModelError, TraceError, ConversionError: see their messages; also when nothing would change.
        CalibrationError: the images cannot be used, or the target cannot be met.
    """
    chosen = choose_recipe(recipe, alpha, kernels, operator, c0) if latency is None else latency.recipe
    if calibration is not None:
        options = Options(target, max_loss, samples, choose, fit, statistics, distil, seed, progress, latency)
        batches = take_batches(calibration, samples)
        given = example_of_batches(batches, required_inputs(model)) if example_inputs is None else example_inputs
        example = example_of(model, given)
        try:
            flows = read_flows(model, chosen, example)
        except TraceError as failure:
            parts = find_parts(model, example, chosen, failure)
            return calibrate_by_parts(model, parts, batches, options, example)[0]
        return Calibration(flows, batches, options).run(lambda found: finish(found, make_plan(found)))
    if target is not None or max_loss is not None or distil:
        raise CalibrationError("target, max_loss and distil need calibration images: pass calibration=")
    example = example_of(model, example_inputs)
    parts, whole = read_model(model, chosen, example)
    if not whole:
        return apply_parts(model, parts, plan_parts(model, parts), example)
    return finish(parts[0][1], make_plan(parts[0][1]))


def calibrate_by_parts(
    model: nn.Module, parts: Parts, batches: Sequence[Any], options: Options, example: tuple[Any, ...]
) -> tuple[nn.Module, Parts, CalibrationReport]:
    """Converts the parts of a model that does not trace as a whole by what the images give to each.

    Returns the model, what flows in its parts now, and what was done.

    Raises:
        CalibrationError: the images cannot be used, or the budget cannot be met.
    """
    paths = [module for _, flows in parts for module in flows.modules]
    parts[0][1].recipe.check_matches(paths, type(model).__name__)
    done, chosen, report = calibrate_parts(
        model, parts, batches, options, lambda flows: finish(flows, make_plan(flows)), len(example)
    )
    converted = apply_parts(model, chosen, plan_parts(model, chosen), example)
    for path, part in done.items():
        set_module(converted, path, part)
    object.__setattr__(converted, "octify_report", report)
    return converted, chosen, report


def apply_parts(model: nn.Module, parts: Parts, decided: Plan, example: tuple[Any, ...]) -> nn.Module:
    """Rewrites the parts of a model that does not trace as a whole; the result carries its plan, recipe and origin."""
    converted = rewrite_parts(model, parts, decided)
    object.__setattr__(converted, "octify_plan", decided)
    object.__setattr__(converted, "octify_recipe", parts[0][1].recipe)
    set_origin(converted, Origin.of(model, example))
    return converted


def finish(flows: Flows, decided: Plan) -> OctaveModule:
    """Rewrites and checks.

    Raises:
        ConversionError: the plan changes nothing although the recipe asks for a change.
    """
    refuse_nothing(flows, decided)
    return apply_plan(flows, decided)


@paused_collection()
def apply_plan(flows: Flows, decided: Plan) -> OctaveModule:
    """Rewrites and checks; the result carries its plan, recipe and origin.

    Raises:
        CheckError: the rewritten graph breaks an invariant.
    """
    converted = rewrite_graph(flows, decided)
    object.__setattr__(converted, "octify_plan", decided)
    object.__setattr__(converted, "octify_recipe", flows.recipe)
    set_origin(converted, Origin.of(flows.trace.model, flows.trace.inputs))
    check_graph(converted, flows, decided)
    if takes_branches(flows.trace.graph):
        converted.follow_branches(Branches(flows, decided))
    return converted


def plan(
    model: nn.Module,
    *,
    alpha: float | None = None,
    recipe: str | Recipe | None = None,
    example_inputs: Example = None,
    kernels: str | None = None,
    operator: str | None = None,
    c0: int | None = None,
) -> Plan:
    """Decides what `convert` would do, without rewriting.

    Raises:
        RecipeError, ModelError, TraceError: as `convert`.
    """
    chosen = choose_recipe(recipe, alpha, kernels, operator, c0)
    parts, whole = read_model(model, chosen, example_of(model, example_inputs))
    return make_plan(parts[0][1]) if whole else plan_parts(model, parts)


def plan_of(model: nn.Module) -> Plan:
    """The plan that a converted model carries.

    Raises:
        ModelError: the model was not made by octify.
    """
    found = getattr(model, "octify_plan", None)
    if not isinstance(found, Plan):
        raise ModelError(f"{type(model).__name__} carries no plan: it was not converted by octify")
    return found


def choose_recipe(
    recipe: str | Recipe | None,
    alpha: float | None,
    kernels: str | None,
    operator: str | None = None,
    c0: int | None = None,
) -> Recipe:
    """The recipe that the arguments of `convert` ask for.

    Raises:
        RecipeError: alpha is out of range, or the recipe is not one, or takes no alpha; there is no such operator, or
            it does not take these arguments.
    """
    asked: dict[str, Any] = {"operator": operator, "kernels": kernels, "c0": c0}
    said = {name: value for name, value in asked.items() if value is not None}
    if recipe is not None:
        chosen = load_recipe(recipe, alpha) if not isinstance(recipe, Recipe) else recipe
        if isinstance(recipe, Recipe) and alpha is not None:
            chosen = recipe.with_alpha(alpha)
        chosen = chosen.with_defaults(**said) if said else chosen
    elif find_operator(operator or "octave").bands:
        usual = {"alpha": 0.25 if alpha is None else alpha, "kernels": "sharp"}
        chosen = Recipe.from_dict({"version": 1, "name": "uniform", "defaults": {**usual, **said}})
    elif alpha is not None:
        raise RecipeError(f"operator {operator} has no alpha, found {alpha:g}: leave it out")
    else:
        chosen = Recipe.from_dict({"version": 1, "name": operator, "defaults": said})
    check_operators(chosen)
    return chosen


def read_model(model: nn.Module, recipe: Recipe, example: tuple[Any, ...]) -> tuple[Parts, bool]:
    """What flows in the whole model (its path is "") or in each part, and whether it is the whole.

    Parts that run at any size are better than a whole at one size, if they hold every convolution.

    Raises:
        RecipeError: a pattern of the recipe matches nothing.
        ModelError, TraceError: the model does not run on the example, or cannot be traced.
    """
    try:
        return [("", read_flows(model, recipe, example, SIZED))], True
    except TraceError as failure:
        parts = _parts_of_all(model, recipe, example, failure)
    if not parts:
        try:
            return [("", read_flows(model, recipe, example))], True
        except TraceError as failure:
            parts = find_parts(model, example, recipe, failure)
    recipe.check_matches([module for _, flows in parts for module in flows.modules], type(model).__name__)
    return parts, False


def _parts_of_all(model: nn.Module, recipe: Recipe, example: tuple[Any, ...], failure: TraceError) -> Parts:
    """The parts, if no convolution is outside of them; else none."""
    with contextlib.suppress(TraceError, ModelError):
        parts = find_parts(model, example, recipe, failure)
        return parts if all(within(path, [part for part, _ in parts]) for path in convolutions(model)) else ()
    return ()


@paused_collection()
def read_flows(model: nn.Module, recipe: Recipe, example_inputs: Example = None, ways: tuple[str, ...] = WAYS) -> Flows:
    """Traces the model as a whole, in one of some `ways`, and reads what flows where.

    Raises:
        RecipeError: a pattern of the recipe matches nothing.
        TraceError: the model cannot be traced.
    """
    flows = Flows(trace_model(model, example_of(model, example_inputs), ways), recipe)
    recipe.check_matches(flows.modules, type(model).__name__)
    return flows


def example_of(model: nn.Module, given: Example) -> tuple[Any, ...]:
    """The example inputs as meta tensors of the model's dtype: those given, or converted at, or its default ones.

    Raises:
        ModelError: the model is none; what was given is no tensor, tuple of tensors or shape.
    """
    refuse_no_module(model)
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    if given is None and (origin := origin_of(model)):
        given = origin.example()
    if given is None:
        return tuple(torch.empty(1, *shape, device="meta", dtype=dtype) for shape in _default_shapes(model))
    listed = isinstance(given, (tuple, list))
    if listed and len(given) >= 3 and all(isinstance(size, int) for size in given):
        return (torch.empty(*given, device="meta", dtype=dtype),)  # pyright: ignore
    values = given if listed else (given,)
    tensors = [value for value in values if isinstance(value, Tensor)]
    if tensors and len(tensors) == len(values):
        types = [dtype if value.is_floating_point() else value.dtype for value in tensors]
        return tuple(torch.empty_like(v, device="meta", dtype=kind) for v, kind in zip(tensors, types, strict=True))
    raise ModelError(
        f"example_inputs is {_outline(given)}: expected a tensor, a tuple of tensors or a shape such as 1x3x224x224.\n"
        "  A network that takes lists or dictionaries: put a module around it that takes their tensors one by one."
    )


def refuse_no_module(model: object) -> None:
    """Refuses functions, classes and whatever else users pass for a network.

    Raises:
        ModelError: it is none.
    """
    if not isinstance(model, nn.Module):
        raise ModelError(f"{_outline(model)} is no network: expected a torch.nn.Module")


def _outline(given: object) -> str:
    """A value for messages, tensors by their shapes.

    >>> _outline({"clip": torch.zeros(1, 3), "names": ["a"]})
    "{'clip': 1x3, 'names': ['a']}"
    """
    if isinstance(given, Tensor):
        return "x".join(map(str, given.shape))
    if isinstance(given, dict):
        return "{" + ", ".join(f"{key!r}: {_outline(value)}" for key, value in cast("Any", given).items()) + "}"
    if isinstance(given, (list, tuple)):
        inner = ", ".join(_outline(value) for value in cast("list[object]", given))
        return f"[{inner}]" if isinstance(given, list) else f"({inner})"
    return repr(given)


def _default_shapes(model: nn.Module) -> list[tuple[int, ...]]:
    shapes: Any = input_shape(model)
    return [tuple(shapes)] if isinstance(shapes[0], int) else [tuple(shape) for shape in shapes]


def refuse_nothing(flows: Flows, decided: Plan) -> None:
    """Refuses a conversion that asks for a change and changes nothing.

    Raises:
        ConversionError: with the reasons and their counts.
    """
    if decided.converted or not any(asks_for_change(settings) for settings in flows.settings.values()):
        return
    total = len(decided.convolutions)
    reasons = "\n".join(f"  {count:4d}  {reason}" for reason, count in decided.reasons().items())
    raise ConversionError(
        f"0 of {total} convolutions converted: {decided.model} would stay as it is.\n{reasons or '  it has none'}"
    )


__all__ = ["Trace", "convert", "plan", "plan_of"]
