"""What can be chosen: per bundle of tied channels, how many go low, in the order in which their loss is felt least."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from octify.flows import Flows
from octify.layout import Layout
from octify.recipe import Recipe


@dataclass(frozen=True)
class Lever:
    """A bundle's channel classes in the order in which they go low; a step holds one class of every group."""

    writers: tuple[str, ...]
    steps: tuple[tuple[int, ...], ...]
    alpha: float  # what the recipe says

    @property
    def name(self) -> str:
        """The first writer's path, and how many others there are."""
        more = len(self.writers) - 1
        return self.writers[0] + (f" (+{more})" if more else "")


def find_levers(flows: Flows, felt: Mapping[int, float]) -> list[Lever]:
    """The bundles whose alpha may be chosen; `felt` scores channel classes, equal ones go from the last.

    Left out are bundles that the recipe gives alpha 0 or a layout, and those written by functions.
    """
    flows.classes.choose({})
    paths = {str(node.target) for node in flows.trace.nodes if node.op == "call_module"}
    fixed = {writer.module for writer in flows.classes.writers if writer.settings.layout is not None}
    levers: list[Lever] = []
    for bundle in flows.classes.bundles:
        if bundle.alpha == 0 or not paths.issuperset(bundle.writers) or fixed.intersection(bundle.writers):
            continue
        groups: dict[int, list[int]] = defaultdict(list)
        for member in bundle.members:
            groups[bundle.group.get(member, 0)].append(member)
        ordered = [sorted(group, key=lambda root: (felt.get(root, 0.0), -root)) for group in groups.values()]
        single = list(zip(*ordered, strict=True))
        width = max(1, bundle.round_to // len(ordered))
        steps = [sum(single[start : start + width], ()) for start in range(0, len(single) - width + 1, width)]
        if steps:
            levers.append(Lever(bundle.writers, tuple(steps), bundle.alpha))
    return levers


def low_classes(levers: Sequence[Lever], counts: Sequence[int]) -> set[int]:
    """The classes that are low when each lever has gone so many steps."""
    return {root for lever, count in zip(levers, counts, strict=True) for step in lever.steps[:count] for root in step}


def recipe_with(flows: Flows, low: set[int], name: str = "calibrated") -> Recipe:
    """The recipe that makes exactly these classes low: a layout for each layer that writes one, alpha 0 elsewhere.

    What the recipe at hand says besides alpha still holds.
    """
    source = flows.recipe.to_dict()
    own: list[dict[str, Any]] = [_without_alpha(rule) for rule in source.get("layers", [])]
    by_pattern = {str(part.pattern): said for part, said in zip(flows.recipe.layers, own, strict=True)}
    layers: dict[str, dict[str, Any]] = {}
    for writer in flows.classes.writers:
        layout = Layout.of(flows.classes.find(channel) in low for channel in writer.ids.tolist())
        if not layout.is_dense:
            said = by_pattern.get(flows.settings[writer.name].rule, {})
            kept = {key: value for key, value in said.items() if key not in ("match", "type", "regex")}
            path = f"{flows.prefix}{writer.module}"
            layers[path] = {"match": path, **kept, "layout": str(layout)}
    defaults = {**source.get("defaults", {}), "alpha": 0.0}
    kept = {key: source[key] for key in ("description", "on_unsupported") if key in source}
    return Recipe.from_dict(
        {"version": 1, "name": name, **kept, "defaults": defaults, "layers": [*layers.values(), *own]}, name
    )


def _without_alpha(rule: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in rule.items() if key not in ("alpha", "layout")}


def join_recipes(recipes: Sequence[Recipe]) -> Recipe:
    """One recipe out of several by `recipe_with`, of parts of one model: all their layouts, then what else they say."""
    said = [recipe.to_dict() for recipe in recipes]
    rules = [rule for recipe in said for rule in recipe.get("layers", [])]
    layouts = [rule for rule in rules if "layout" in rule]
    rest = [rule for rule in said[0].get("layers", []) if "layout" not in rule]
    return Recipe.from_dict({**said[0], "layers": [*layouts, *rest]}, recipes[0].name or "calibrated")
