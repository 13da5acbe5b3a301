"""A conversion between its steps: what was read, the plan, and the result, of a whole model or of its parts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from octify.convert import Example, apply_parts, apply_plan, example_of, read_model, refuse_nothing
from octify.flows import Flows
from octify.module import OctaveModule
from octify.parts import Parts, plan_parts
from octify.plan import Plan, make_plan
from octify.recipe import Recipe


@dataclass(frozen=True)
class Conversion:
    """A model that was traced, and the recipe for it; `parts` holds what flows in the whole ("") or in each part."""

    model: nn.Module
    recipe: Recipe
    example: tuple[Any, ...]
    parts: Parts
    whole: bool

    @classmethod
    def read(cls, model: nn.Module, recipe: Recipe, example_inputs: Example = None) -> Conversion:
        """Traces a model, in parts if it does not trace as a whole.

        Raises:
            RecipeError, ModelError, TraceError: as `octify.convert`.
        """
        example = example_of(model, example_inputs)
        parts, whole = read_model(model, recipe, example)
        return cls(model, recipe, example, parts, whole)

    def again(self, recipe: Recipe) -> Conversion:
        """The same traces under another recipe."""
        parts = [(path, flows.again(recipe)) for path, flows in self.parts]
        return Conversion(self.model, recipe, self.example, parts, self.whole)

    def as_planned(self, plan: Plan) -> Conversion:
        """Without parts that a plan does not have: a detector finds more where it enlarges its images more."""
        if self.whole:
            return self
        planned = {op.name.partition(":")[0] for op in plan.ops}
        return replace(self, parts=[(path, flows) for path, flows in self.parts if path in planned])

    @property
    def flows(self) -> Flows:
        """What flows in the whole model, or in its first part."""
        return self.parts[0][1]

    def plan(self) -> Plan:
        """Decides.

        Raises:
            ConversionError: `on_unsupported: error` and a layer that should be octave cannot be.
        """
        return make_plan(self.flows) if self.whole else plan_parts(self.model, self.parts)

    def names(self) -> list[str]:
        """The names of all operations, as the plan has them."""
        return [f"{path}:{node.name}" if path else node.name for path, node in self._nodes()]

    def _nodes(self) -> Iterator[tuple[str, Any]]:
        for path, flows in self.parts:
            for node in flows.trace.nodes:
                if node.op not in ("placeholder", "output", "get_attr"):
                    yield path, node

    def apply(self, plan: Plan) -> nn.Module:
        """Rewrites by a plan and checks.

        Raises:
            CheckError: the result breaks an invariant.
        """
        if self.whole:
            return apply_plan(self.flows, plan)
        return apply_parts(self.model, self.parts, plan, self.example)

    def run(self) -> nn.Module:
        """Plans and rewrites.

        Raises:
            ConversionError: nothing would change although the recipe asks for low channels.
        """
        decided = self.plan()
        refuse_nothing(self.flows, decided)
        return self.apply(decided)

    def pairs(self, converted: nn.Module) -> list[tuple[Flows, OctaveModule]]:
        """What flows in the source beside the converted module, for the whole or each part."""
        found = [(flows, converted.get_submodule(path)) for path, flows in self.parts]
        return [(flows, module) for flows, module in found if isinstance(module, OctaveModule)]
