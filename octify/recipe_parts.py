"""What a recipe may say in each of its parts, checked key by key."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, PlainValidator, model_validator
from pydantic_core import PydanticCustomError

from octify.patterns import Pattern

ALPHA = "$alpha"  # stands for the recipe's parameter, which --alpha sets
KERNELS: Mapping[str, tuple[str, ...]] = {
    "octave": ("sharp", "fold", "paper"),
    "compconv": ("spatial", "all"),
    "keep": (),
}
MAX_PATTERN = 300  # characters

PathName = Literal["hh", "hl", "lh", "ll"]
Scalar = str | int | float | bool | None


def _check_alpha(value: Any) -> float | str:
    if value == ALPHA:
        return ALPHA
    expected = f"expected a number from 0 to 1, or {ALPHA}"
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise PydanticCustomError("alpha", "{expected}", {"expected": expected, "legal": [ALPHA]})
    if not 0 <= value <= 1:
        bound = {"le": 1} if value > 1 else {"ge": 0}
        raise PydanticCustomError("alpha", "{expected}", {"expected": expected, **bound})
    return float(value)


def _check_paths(paths: tuple[PathName, ...]) -> tuple[PathName, ...]:
    if len(set(paths)) != len(paths) or not {"hh", "ll"} <= set(paths):
        raise ValueError("expected hh and ll, and each path once")
    return paths


def _check_glob(glob: str) -> str:
    if "[" in glob and "]" not in glob[glob.rindex("[") :]:
        raise ValueError("its [ is never closed")
    return glob


def _check_regex(regex: str) -> str:
    try:
        re.compile(regex)
    except re.error as error:
        raise ValueError(f"it is no regular expression: {error}") from error
    return regex


def _check_operator(name: str) -> str:
    if not re.fullmatch(r"[a-z][a-z0-9_]{,40}", name):
        raise ValueError(f"expected the name of an operator, such as {', '.join(KERNELS)}")
    return name


def _check_layout(layout: str) -> str:
    if not re.fullmatch(r"([1-9]\d{,5}[hl])+", layout):
        raise ValueError("expected counts of high and low channels, such as 48h16l")
    return layout


Alpha = Annotated[float | str, PlainValidator(_check_alpha)]
Paths = Annotated[tuple[PathName, ...], Field(strict=False), AfterValidator(_check_paths)]
Glob = Annotated[str, Field(min_length=1, max_length=MAX_PATTERN), AfterValidator(_check_glob)]
Regex = Annotated[str, Field(min_length=1, max_length=MAX_PATTERN), AfterValidator(_check_regex)]
Name = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*$", max_length=40)]
Operator = Annotated[str, AfterValidator(_check_operator)]
LayoutText = Annotated[str, AfterValidator(_check_layout)]


class Part(BaseModel):
    """Frozen, with known keys only, and no value taken for another kind of value."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class Parameters(Part):
    """What the user of a recipe may set."""

    alpha: Annotated[float, Field(ge=0, le=1)] | None = None


class Choices(Part):
    """What defaults and rules can both say; None is not said."""

    alpha: Alpha | None = None
    operator: Operator | None = None
    kernels: Literal["sharp", "fold", "paper", "spatial", "all"] | None = None
    downsample: Literal["stride", "pool"] | None = None
    paths: Paths | None = None
    min_size: Annotated[int, Field(ge=1)] | None = None
    round_to: Annotated[int, Field(ge=1)] | None = None
    c0: Annotated[int, Field(ge=1)] | None = None
    options: dict[Name, Scalar] = {}

    @property
    def operator_options(self) -> dict[str, Scalar]:
        """The operator's own options, `c0` among them."""
        return self.options if self.c0 is None else {"c0": self.c0, **self.options}


class Defaults(Choices):
    """What holds for every layer without a rule."""

    stem: Literal["dense", "octave"] = "dense"


class Rule(Choices):
    """What holds for the modules that a pattern matches."""

    match: Glob | None = None
    type: Glob | None = None
    regex: Regex | None = None
    keep: Literal["dense"] | None = None
    layout: LayoutText | None = None
    input: Literal["split"] | None = None

    @model_validator(mode="after")
    def _check(self) -> Rule:
        if sum(pattern is not None for pattern in (self.match, self.type, self.regex)) != 1:
            raise ValueError("a rule has one of match, type and regex")
        if self.alpha is not None and self.layout is not None:
            raise ValueError("a layout already says which channels are low: leave out alpha or layout")
        said = self.model_fields_set - {"match", "type", "regex", "keep"}
        if self.keep and said:
            raise ValueError(f"keep: dense leaves a module as it is: leave out {' and '.join(sorted(said))}")
        return self

    @property
    def pattern(self) -> Pattern:
        """What the rule matches; messages quote it, such as `match "layer1.*"`."""
        if self.match is not None:
            return Pattern("match", self.match)
        if self.type is not None:
            return Pattern("type", self.type)
        return Pattern("regex", self.regex or "")
