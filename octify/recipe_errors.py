"""What is wrong with a recipe, in words: file, line, what was found, what was expected and what is nearest to it."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterable, Mapping
from typing import Any, cast

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from octify.errors import RecipeError
from octify.yaml_source import Source, Where

_EXPECTED = {
    "model_type": "expected keys and values",
    "dict_type": "expected keys and values",
    "tuple_type": "expected a list",
    "string_type": "expected text",
    "int_type": "expected a whole number",
    "string_too_short": "expected a pattern",
}


def explain(error: ValidationError, source: Source, keys: Mapping[str, Iterable[str]]) -> RecipeError:
    """One line for every fault; `keys` are the legal ones of the recipe ("") and of each of its parts."""
    faults: dict[Where, str] = {}
    for detail in error.errors(include_url=False):
        where = _existing(detail, source.data)
        faults.setdefault(where, f"{source.place(where)}: {_describe(detail, where, keys)}")
    ordered = sorted(faults, key=lambda where: source.lines.get(where, 0))
    return RecipeError("\n".join(faults[where] for where in ordered))


def closest(name: str, legal: Iterable[str]) -> str:
    """A line with the nearest legal names, or nothing."""
    near = difflib.get_close_matches(name, list(legal), n=3, cutoff=0.5)
    return f"\n  closest   {', '.join(near)}" if near else ""


def _existing(detail: ErrorDetails, data: Any) -> Where:
    """The part of an error's location that the text really has: unions and missing keys add steps of their own."""
    where = cast(Where, detail.get("ctx", {}).get("where", detail["loc"]))
    for count, step in enumerate(where):
        try:
            data = data[step]
        except (TypeError, LookupError):
            return where[:count]
    return where


def _describe(detail: ErrorDetails, where: Where, keys: Mapping[str, Iterable[str]]) -> str:
    kind, ctx, found = detail["type"], detail.get("ctx", {}), detail["input"]
    if kind == "extra_forbidden":
        legal = keys.get(str(where[0]) if len(where) > 1 else "", ())
        name = str(detail["loc"][-1])
        return f'unknown key "{name}"{closest(name, legal)}'
    if kind == "missing":
        return f"{detail['loc'][-1]} is missing: write {detail['loc'][-1]}: 1"
    expected = _EXPECTED.get(kind) or detail["msg"].replace("Input should be", "expected")
    if kind == "value_error":
        expected = str(ctx["error"])
    if "where" in ctx or (isinstance(found, dict) and kind == "value_error"):
        return expected
    shown = json.dumps(found, default=str)
    name = ".".join(str(step) for step in where) if where else "the recipe"
    return f"{name} is {shown if len(shown) <= 60 else shown[:57] + '...'}: {expected}{_nearest(found, ctx)}"


def _nearest(found: Any, ctx: Mapping[str, Any]) -> str:
    if isinstance(found, str):
        return closest(found, ctx.get("legal") or re.findall(r"'([^']*)'", str(ctx.get("expected", ""))))
    bounds = [ctx[bound] for bound in ("ge", "le") if bound in ctx]
    return f"\n  closest   {bounds[0]:g}" if bounds else ""
