"""Operators: what can take a convolution's place. The octave convolution is one, CompConv another, yours a third.

An operator with `bands` chooses channel layouts, and the rules of its operations say how: that is octave. Every other
reads and gives dense maps: a split input is merged before it, and what it gives joins bands through a split.
Which operator a layer gets is the recipe's choice; an operator may decline a layer, with the reason.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, cast

from torch import nn

from octify.compconv import MAX_DEPTH, Conv, depth_for, unit_channels
from octify.compweights import from_conv, kind_for
from octify.errors import ConversionError, RecipeError
from octify.recipe import Recipe, Settings
from octify.recipe_errors import closest
from octify.rules.base import Op, Plain

FORMS = ("dense", "bands")  # what a plan calls operations without an operator


class Operator:
    """How layers are replaced by another kind of layer; `make` is what a subclass must have.

    `name` is what recipes say, `summary` one line for people. `transfer` says what becomes of trained weights, if they
    do not carry over exactly. `takes` names the options that a recipe may give.
    """

    name: ClassVar[str]
    summary: ClassVar[str] = ""
    transfer: ClassVar[str] = ""
    takes: ClassVar[tuple[str, ...]] = ()
    bands: ClassVar[bool] = False

    def check(self, options: Mapping[str, Any]) -> None:
        """Refuses a recipe's options.

        Raises:
            ConversionError: says which and why.
        """
        for name in options:
            if name not in self.takes:
                known = ", ".join(self.takes) or "none"
                raise ConversionError(f"operator {self.name} has no option {name}: expected {known}")

    def asks(self, settings: Settings) -> bool:
        """Whether these settings ask for a change at all."""
        return True

    def refuse(self, op: Op) -> str:
        """Why this layer stays as it is; empty if the operator takes it.

        `op.module` is a convolution or what a rule counts as one (a transposed one, a linear layer on a map).
        """
        return ""

    def options(self, op: Op, path: str) -> dict[str, Any]:
        """What the plan records of a layer that is taken, by names and plain values; a file holds nothing else."""
        return dict(op.settings.options)

    def make(self, module: nn.Module, **options: Any) -> nn.Module:
        """The layer that takes the place of `module` (on any device, meta too), which stays as it is."""
        raise NotImplementedError


class Octave(Operator):
    """Layouts and weights are the business of `octify.rules`."""

    name = "octave"
    summary = "some channels at half the resolution (Chen et al. 2019)"
    bands = True

    def asks(self, settings: Settings) -> bool:
        """Whether any channel shall be low."""
        return settings.alpha > 0 or bool(settings.layout and "l" in settings.layout)


class Keep(Operator):
    """Nothing is replaced."""

    name = "keep"
    summary = "the layer as it is"

    def asks(self, settings: Settings) -> bool:
        """Never."""
        return False

    def refuse(self, op: Op) -> str:
        """Always."""
        return "kept dense by the recipe"


class Compact(Operator):
    """`octify.compconv`: depth from `c0` and the layer's input channels, draws from the layer's path."""

    name = "compconv"
    summary = "most channels made from a small unit and copies (Zhang et al. 2021)"
    transfer = "no exact transfer of weights to compconv: drawn with the layers' variance, calibrate or train"
    takes = ("c0", "depth", "shuffle_groups")

    def check(self, options: Mapping[str, Any]) -> None:
        """`c0` and `shuffle_groups` from 1, `depth` from 0 to 3."""
        super().check(options)
        bounds = {"c0": (1, None), "depth": (0, MAX_DEPTH), "shuffle_groups": (1, None)}
        for name, value in options.items():
            least, most = bounds[name]
            number = isinstance(value, int) and not isinstance(value, bool)
            if not number or value < least or (most is not None and value > most):
                expected = f"{least} to {most}" if most is not None else f"{least} or more"
                raise ConversionError(f"{name} is {value!r}: expected {expected}")

    def asks(self, settings: Settings) -> bool:
        """Whether the depth is not 0."""
        return settings.options.get("depth") != 0

    def refuse(self, op: Op) -> str:
        """Groups, the first convolution on the image, 1x1 kernels without request, too few output channels."""
        conv: Any = op.module
        if kind_for(conv) is None:
            return f"compconv takes Conv1d, Conv2d and Conv3d, not {type(conv).__name__}"
        if conv.groups > 1:
            return "compconv has no groups"
        source = op.argument(0, "input")
        if isinstance(source, Plain) and source.image and op.dense_stem:
            return "the first convolution on the image"
        depth = _depth(op)
        if depth == 0:
            return "depth 0"
        if max(conv.kernel_size) == 1:
            if op.settings.kernels != "all":
                return "1x1 (kernels: all takes it)"
            if max(op.shape[2:], default=1) == 1:
                return "1x1 on a map of one position"
        try:
            unit_channels(conv.out_channels, depth)
        except ConversionError as error:
            return str(error)
        groups = int(cast(int, op.settings.options.get("shuffle_groups", 2)))
        if groups > conv.out_channels:
            return f"shuffle_groups {groups} of {conv.out_channels} output channels"
        return ""

    def options(self, op: Op, path: str) -> dict[str, Any]:
        """The depth, and a seed from the path so that no two layers share their draws."""
        given = op.settings.options
        more = {"shuffle_groups": given["shuffle_groups"]} if "shuffle_groups" in given else {}
        return {"depth": _depth(op), "seed": zlib.crc32(path.encode()), **more}

    def make(self, module: nn.Module, **options: Any) -> nn.Module:
        """A CompConv of the convolution's shape."""
        return from_conv(module, **options)


def _depth(op: Op) -> int:
    given = op.settings.options
    if "depth" in given:
        return int(cast(int, given["depth"]))
    return depth_for(cast(Conv, op.module).in_channels, int(cast(int, given.get("c0", 128))))


_OPERATORS: dict[str, Operator] = {}


def register(operator: Operator, *, replace: bool = False) -> None:
    """Makes an operator known to recipes, under its name.

    Raises:
        ValueError: there is one of that name and `replace` is not set, or the name is one of the plan's own words.
    """
    if operator.name in FORMS:
        raise ValueError(f"{operator.name} is a word of the plan's: name the operator otherwise")
    if operator.name in _OPERATORS and not replace:
        raise ValueError(f"there is an operator {operator.name} already: {type(_OPERATORS[operator.name]).__name__}")
    _OPERATORS[operator.name] = operator


def list_operators() -> list[Operator]:
    """All operators, octify's own first."""
    return list(_OPERATORS.values())


def find_operator(name: str) -> Operator:
    """The operator of a name.

    Raises:
        RecipeError: there is none.
    """
    if name not in _OPERATORS:
        hint = closest(name, _OPERATORS) or f"\n  there are   {', '.join(_OPERATORS)}"
        raise RecipeError(f"there is no operator {name}: register it first (octify.operators.register){hint}")
    return _OPERATORS[name]


def check_operators(recipe: Recipe) -> None:
    """Refuses operators that are not registered, and options that theirs does not take.

    Raises:
        RecipeError: with the rule's place.
    """
    base = recipe.defaults.operator or Octave.name
    parts = [("defaults", recipe.defaults), *((recipe.place(at), rule) for at, rule in enumerate(recipe.layers))]
    for place, part in parts:
        name = part.operator or base
        try:
            find_operator(name).check(part.operator_options)
        except (RecipeError, ConversionError) as error:
            raise RecipeError(f"{place}: {error}") from error


def transfer_notes(forms: Iterable[str]) -> list[str]:
    """What a plan with operations of these forms has to say of trained weights."""
    used = set(forms)
    return [operator.transfer for operator in list_operators() if operator.name in used and operator.transfer]


for _operator in (Octave(), Compact(), Keep()):
    register(_operator)
