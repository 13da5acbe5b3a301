"""Which layer gets which alpha and how: a YAML file, checked and frozen.

A rule's pattern is matched against a module's path and the paths of the modules that hold it, so that `layer1` and
`layer1.*` both mean everything in layer1. In a glob `*` also crosses dots. The first rule that matches a module
decides, alone: what it does not say comes from the defaults, not from later rules.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, PrivateAttr, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from octify.errors import RecipeError
from octify.patterns import Finder, closest_names
from octify.recipe_errors import closest, explain
from octify.recipe_parts import ALPHA, KERNELS, Choices, Defaults, Parameters, Part, PathName, Rule, Scalar
from octify.yaml_source import Source, Where, read_file, read_text


@dataclass(frozen=True)
class Settings:
    """What a recipe says of one module, with nothing left open.

    `alpha` is the share of low channels of the module's output; `layout` ("48h16l") stands above it. `keep`: the module
    stays as it is and reads a merged map. `stem`: it stays dense if it is the first convolution on the image.
    `split_input`: a depthwise convolution splits a dense input by its own alpha instead of giving dense maps as well.
    `source` is the `file:line` of the rule that decided, or "default", and `rule` its pattern.
    """

    alpha: float = 0.0
    operator: str = "octave"
    kernels: str = "sharp"
    downsample: str = "stride"
    paths: tuple[PathName, ...] = ("hh", "hl", "lh", "ll")
    min_size: int = 7
    round_to: int = 1
    keep: bool = False
    stem: bool = True
    layout: str | None = None
    split_input: bool = False
    options: Mapping[str, Scalar] = field(default_factory=dict[str, Scalar], hash=False)
    source: str = "default"
    rule: str = ""


class Recipe(Part):
    """A checked recipe.

    >>> recipe = Recipe.uniform(0.25)
    >>> recipe.settings_for("layer1.0.conv1", "Conv2d").alpha
    0.25
    >>> print(recipe.to_yaml(), end="")
    version: 1
    name: uniform
    defaults:
      alpha: 0.25
      kernels: sharp
    """

    version: Annotated[int, Field(ge=1, le=1)]
    name: str = ""
    description: str = ""
    parameters: Parameters = Parameters()
    defaults: Defaults = Defaults()
    layers: Annotated[tuple[Rule, ...], Field(strict=False)] = ()
    on_unsupported: Literal["dense", "error"] = "dense"
    _places: tuple[str, ...] = PrivateAttr(())

    @classmethod
    def uniform(cls, alpha: float, kernels: str = "sharp") -> Recipe:
        """The same alpha for every layer.

        Raises:
            RecipeError: alpha is not a number from 0 to 1, or there are no such kernels.
        """
        return cls.from_dict({"version": 1, "name": "uniform", "defaults": {"alpha": alpha, "kernels": kernels}})

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], name: str = "recipe") -> Recipe:
        """The inverse of `to_dict`; `name` is what messages call it.

        Raises:
            RecipeError: it is no recipe.
        """
        return cls.from_source(Source(name, dict(data), {}))

    @classmethod
    def from_yaml(cls, text: str, name: str = "recipe", alpha: float | None = None) -> Recipe:
        """Read a recipe from YAML text, with `alpha` in place of the parameter's value.

        Raises:
            RecipeError: it is no recipe, or none with a parameter alpha.
        """
        return cls.from_source(read_text(text, name), alpha)

    @classmethod
    def from_source(cls, source: Source, alpha: float | None = None) -> Recipe:
        """Check what was read, with `alpha` in place of the parameter's value.

        Raises:
            RecipeError: it is no recipe, or none with a parameter alpha.
        """
        data = source.data
        if not isinstance(data, dict):
            raise RecipeError(f"{source.place(())}: is empty or no mapping: expected version: 1, defaults: and layers:")
        if alpha is not None:
            source = replace(source, data={**data, "parameters": {"alpha": alpha}})
        try:
            recipe = cls.model_validate(source.data)
        except ValidationError as error:
            raise explain(error, source, _KEYS) from error
        if alpha is not None and not any(part.alpha == ALPHA for part in (recipe.defaults, *recipe.layers)):
            place = source.place(() if recipe.defaults.alpha is None else ("defaults", "alpha"))
            raise RecipeError(f"{place}: alpha is fixed here: write alpha: {ALPHA} where yours shall apply")
        recipe._places = tuple(source.place(("layers", index)) for index in range(len(recipe.layers)))
        return recipe

    @model_validator(mode="after")
    def _check(self) -> Recipe:
        parts: list[tuple[Where, Choices]] = [(("defaults",), self.defaults)]
        parts += [(("layers", index), rule) for index, rule in enumerate(self.layers)]
        for where, part in parts:
            if part.alpha == ALPHA and self.parameters.alpha is None:
                raise _misfit((*where, "alpha"), f"{ALPHA} has no value: write one, as in parameters: {{alpha: 0.25}}")
            operator = part.operator or self.defaults.operator or "octave"
            legal = KERNELS.get(operator)
            if part.kernels and legal is not None and part.kernels not in legal:
                raise _misfit((*where, "kernels"), f"operator {operator} has {' or '.join(legal) or 'no'} kernels")
        return self

    @property
    def alpha(self) -> float:
        """The parameter's value, else the defaults' alpha."""
        return self._number(self.defaults.alpha if self.parameters.alpha is None else self.parameters.alpha)

    def with_alpha(self, alpha: float) -> Recipe:
        """The same recipe with another value of its parameter.

        Raises:
            RecipeError: it has none, or alpha is not a number from 0 to 1.
        """
        return self._like(Recipe.from_source(Source(self.name or "recipe", self.to_dict(), {}), alpha))

    def with_defaults(self, **choices: Any) -> Recipe:
        """The same recipe with other defaults, such as `kernels="paper"`; rules still stand above them.

        Raises:
            RecipeError: there is no such default or value.
        """
        data = self.to_dict()
        said = data.get("defaults", {})
        if choices.get("operator", self.defaults.operator) != self.defaults.operator:
            said = {key: said[key] for key in said.keys() - {"kernels", "c0", "options"}}  # the other operator's own
        data["defaults"] = {**said, **choices}
        return self._like(Recipe.from_dict(data, self.name or "recipe"))

    def settings_for(self, path: str, type_name: str) -> Settings:
        """What holds for a module, by its path and the name of its class."""
        index = self._finder.first(path, type_name)
        base = self.defaults
        rule = Rule(match="*") if index is None else self.layers[index]
        base_operator = base.operator or "octave"
        operator = "keep" if rule.keep else rule.operator or base_operator
        kernels = _kernels(operator, rule, base)
        inherited = base.operator_options if operator == base_operator else {}
        return Settings(
            alpha=self._number(base.alpha if rule.alpha is None else rule.alpha),
            operator=operator,
            kernels=kernels,
            downsample=rule.downsample or base.downsample or ("pool" if kernels == "paper" else "stride"),
            paths=rule.paths or base.paths or Settings.paths,
            min_size=rule.min_size or base.min_size or Settings.min_size,
            round_to=rule.round_to or base.round_to or Settings.round_to,
            keep=operator == "keep",
            stem=base.stem == "dense" and rule.alpha is None and rule.layout is None,
            layout=rule.layout,
            split_input=rule.input == "split",
            options={**inherited, **rule.operator_options},
            source="default" if index is None else self.place(index),
            rule="" if index is None else str(rule.pattern),
        )

    def check_matches(self, modules: Iterable[tuple[str, str]], model: str = "the model") -> None:
        """Refuse rules that can have no effect on the modules (path, class name) that `settings_for` is asked about.

        Raises:
            RecipeError: a pattern matches none of them; with the closest names.
        """
        named = list(modules)
        found = {index for path, type_name in named for index in self._finder.all(path, type_name)}
        idle = [self._idle(index, named, model) for index in range(len(self.layers)) if index not in found]
        if idle:
            raise RecipeError("\n".join(idle))

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON, without what is left at its default."""
        return {"version": 1, **self.model_dump(mode="json", exclude_defaults=True)}

    def to_yaml(self) -> str:
        """The recipe as a file: one line per rule."""
        data = self.to_dict()
        layers = data.pop("layers", [])
        lines = [f"  - {_flow(rule)}\n" for rule in layers]
        head = yaml.safe_dump(data, sort_keys=False, allow_unicode=True, width=100)
        return head + ("layers:\n" + "".join(lines) if lines else "")

    def place(self, index: int) -> str:
        """`file:line` of a rule."""
        return self._places[index] if self._places else f"layers.{index}"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Recipe) and self.to_dict() == other.to_dict()

    def __hash__(self) -> int:
        return hash(json.dumps(self.to_dict(), sort_keys=True))

    @cached_property
    def _finder(self) -> Finder:
        return Finder([rule.pattern for rule in self.layers])

    def _number(self, alpha: float | str | None) -> float:
        value = self.parameters.alpha if isinstance(alpha, str) else alpha
        return value or 0.0

    def _like(self, other: Recipe) -> Recipe:
        other._places = self._places
        return other

    def _idle(self, index: int, modules: list[tuple[str, str]], model: str) -> str:
        pattern = self.layers[index].pattern
        near = ", ".join(closest_names(pattern, modules))
        hint = f"\n  closest   {near}" if near else ""
        return f"{self.place(index)}: {pattern} names no module of {model}.{hint}"


def load_recipe(name: str | Path, alpha: float | None = None) -> Recipe:
    """Read a recipe file, or one of octify's own by its name, such as `resnet`.

    `alpha` takes the place of the recipe's parameter, wherever it says `alpha: $alpha`.

    Raises:
        RecipeError: there is none, it is no recipe, or `alpha` is given and the recipe has no such parameter.
    """
    path = Path(name)
    if path.is_file():
        return Recipe.from_source(read_file(path), alpha)
    own = str(name).removesuffix(".yaml")
    names = builtin_recipes()
    if own not in names:
        raise RecipeError(
            f'"{name}" is neither a file nor a recipe of octify\'s.{closest(own, names) or _listed(names)}'
        )
    return Recipe.from_source(read_file(_home() / f"{own}.yaml", f"recipes/{own}.yaml"), alpha)


def builtin_recipes() -> list[str]:
    """The names of octify's own recipes, sorted."""
    home = _home()
    return sorted(path.relative_to(home).with_suffix("").as_posix() for path in home.rglob("*.yaml"))


def recipe_text(name: str) -> str:
    """The text of one of octify's own recipes.

    Raises:
        RecipeError: there is none of that name.
    """
    names = builtin_recipes()
    if name not in names:
        raise RecipeError(f'octify has no recipe "{name}".{closest(name, names) or _listed(names)}')
    return (_home() / f"{name}.yaml").read_text(encoding="utf-8")


def _listed(names: list[str]) -> str:
    return f"\n  there are   {', '.join(names)}"


def _home() -> Path:
    """Where the recipes lie: inside an installed package, beside the package in a checkout."""
    package = Path(__file__).resolve().parent
    inside = package / "recipes"
    return inside if inside.is_dir() else package.parent / "recipes"


_KEYS: Mapping[str, Iterable[str]] = {
    "": Recipe.model_fields,
    "parameters": Parameters.model_fields,
    "defaults": Defaults.model_fields,
    "layers": Rule.model_fields,
}


def _misfit(where: Where, problem: str) -> PydanticCustomError:
    return PydanticCustomError("misfit", "{problem}", {"problem": problem, "where": where})


def _kernels(operator: str, rule: Rule, base: Defaults) -> str:
    """The rule's kernels, else the defaults' where the operator has them, else the operator's first."""
    legal = KERNELS.get(operator)
    said = [kernels for kernels in (rule.kernels, base.kernels) if kernels and (legal is None or kernels in legal)]
    return said[0] if said else (*(legal or ()), "sharp")[0]


def _flow(rule: Mapping[str, Any]) -> str:
    """A rule on one line, its pattern first."""
    first = {key: rule[key] for key in ("match", "type", "regex") if key in rule}
    text: str = yaml.safe_dump(
        {**first, **rule}, default_flow_style=True, sort_keys=False, allow_unicode=True, width=1e6
    )
    return text.strip()
