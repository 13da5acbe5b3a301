"""A model and a recipe → the octave model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from octify.check import check_graph
from octify.errors import ConversionError, ModelError, TraceError
from octify.module import OctaveModule
from octify.origin import Origin, set_origin
from octify.parts import Parts, find_parts, plan_parts, rewrite_parts
from octify.plan import Flows, Plan, make_plan
from octify.recipe import Recipe, load_recipe
from octify.rewrite import rewrite_graph
from octify.trace import Trace, trace_model
from octify.zoo import input_shape

Example = Tensor | Sequence[int] | Sequence[Any] | None


def convert(
    model: nn.Module,
    *,
    alpha: float | None = None,
    recipe: str | Recipe | None = None,
    example_inputs: Example = None,
    kernels: str | None = None,
) -> nn.Module:
    """Turns a CNN into an octave CNN with the same weights, as far as octave convolutions can express them.

    `alpha` is the share of low channels (0.25 unless the recipe says otherwise), `recipe` a Recipe, a file or a
    built-in name, `example_inputs` a tensor, a tuple of tensors or a shape (the model's own default, else
    1x3x224x224), `kernels` "fold" for trained weights or "paper" for training from scratch. The source stays as it is.
    The result is an OctaveModule (a GraphModule); of a model that does not trace as a whole (a detector), a copy whose
    largest traceable submodules are OctaveModules.

    Raises:
        RecipeError, ModelError, TraceError, ConversionError: see their messages; also when nothing would change.
    """
    chosen = choose_recipe(recipe, alpha, kernels)
    try:
        flows = read_flows(model, chosen, example_inputs)
    except TraceError as failure:
        return _convert_parts(model, chosen, example_of(model, example_inputs), failure)
    return finish(flows, make_plan(flows))


def _convert_parts(model: nn.Module, recipe: Recipe, example: tuple[Any, ...], failure: TraceError) -> nn.Module:
    parts = find_parts(model, example, recipe, failure)
    recipe.check_matches([module for _, flows in parts for module in flows.modules], type(model).__name__)
    return apply_parts(model, parts, plan_parts(model, parts), example)


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
        ConversionError: the plan changes nothing although the recipe asks for low channels.
    """
    refuse_nothing(flows, decided)
    return apply_plan(flows, decided)


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
    return converted


def plan(
    model: nn.Module,
    *,
    alpha: float | None = None,
    recipe: str | Recipe | None = None,
    example_inputs: Example = None,
    kernels: str | None = None,
) -> Plan:
    """Decides what `convert` would do, without rewriting.

    Raises:
        RecipeError, ModelError, TraceError: as `convert`.
    """
    chosen = choose_recipe(recipe, alpha, kernels)
    try:
        return make_plan(read_flows(model, chosen, example_inputs))
    except TraceError as failure:
        return plan_parts(model, find_parts(model, example_of(model, example_inputs), chosen, failure))


def plan_of(model: nn.Module) -> Plan:
    """The plan that a converted model carries.

    Raises:
        ModelError: the model was not made by octify.
    """
    found = getattr(model, "octify_plan", None)
    if not isinstance(found, Plan):
        raise ModelError(f"{type(model).__name__} carries no plan: it was not converted by octify")
    return found


def choose_recipe(recipe: str | Recipe | None, alpha: float | None, kernels: str | None) -> Recipe:
    """The recipe that the arguments of `convert` ask for.

    Raises:
        RecipeError: alpha is out of range, or the recipe is not one, or takes no alpha.
    """
    if recipe is None:
        return Recipe.uniform(0.25 if alpha is None else alpha, kernels or "fold")
    chosen = load_recipe(recipe, alpha) if not isinstance(recipe, Recipe) else recipe
    if isinstance(recipe, Recipe) and alpha is not None:
        chosen = recipe.with_alpha(alpha)
    return chosen if kernels is None else chosen.with_defaults(kernels=kernels)


def read_flows(model: nn.Module, recipe: Recipe, example_inputs: Example = None) -> Flows:
    """Traces the model and reads what flows where.

    Raises:
        RecipeError: a pattern of the recipe matches nothing.
        TraceError: the model cannot be traced.
    """
    flows = Flows(trace_model(model, example_of(model, example_inputs)), recipe)
    recipe.check_matches(flows.modules, type(model).__name__)
    return flows


def example_of(model: nn.Module, given: Example) -> tuple[Any, ...]:
    """The example inputs as meta tensors of the model's dtype.

    Raises:
        ModelError: what was given is no tensor, tuple of tensors or shape.
    """
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    if given is None:
        return tuple(torch.empty(1, *shape, device="meta", dtype=dtype) for shape in _default_shapes(model))
    if isinstance(given, Tensor):
        return (torch.empty_like(given, device="meta"),)
    if all(isinstance(size, int) for size in given) and len(given) >= 3:
        return (torch.empty(*given, device="meta", dtype=dtype),)  # pyright: ignore
    tensors = [value for value in given if isinstance(value, Tensor)]
    if tensors and len(tensors) == len(given):
        return tuple(torch.empty_like(value, device="meta") for value in tensors)
    raise ModelError(
        f"example_inputs is {given!r}: expected a tensor, a tuple of tensors or a shape such as 1x3x224x224"
    )


def _default_shapes(model: nn.Module) -> list[tuple[int, ...]]:
    shapes: Any = input_shape(model)
    return [tuple(shapes)] if isinstance(shapes[0], int) else [tuple(shape) for shape in shapes]


def refuse_nothing(flows: Flows, decided: Plan) -> None:
    """Refuses a conversion that asks for low channels and changes nothing.

    Raises:
        ConversionError: with the reasons and their counts.
    """
    if decided.converted or not any(settings.alpha > 0 for settings in flows.settings.values()):
        return
    total = len(decided.convolutions)
    reasons = "\n".join(f"  {count:4d}  {reason}" for reason, count in decided.reasons().items())
    raise ConversionError(
        f"0 of {total} convolutions converted: {decided.model} would stay as it is.\n{reasons or '  it has none'}"
    )


__all__ = ["Trace", "convert", "plan", "plan_of"]
