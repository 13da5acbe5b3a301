"""A plan as a recipe: one line per layer, to edit and feed back."""

from __future__ import annotations

import re
from typing import Any

from octify.conversion import Conversion
from octify.plan import Plan, PlanOp
from octify.recipe import Recipe, Settings

STEM = "the first convolution on the image"
FIELDS = ("kernels", "downsample", "min_size", "round_to")


def recipe_text_of(reading: Conversion, plan: Plan) -> str:
    """A recipe's text that gives the plan again, with each layer's layouts or the reason it stays dense beside it."""
    defaults = Recipe(version=1, parameters=reading.recipe.parameters, defaults=reading.recipe.defaults)
    base = defaults.settings_for("", "")
    said = {
        "version": 1,
        "name": reading.recipe.name or "plan",
        "defaults": {**_resolved(defaults), "alpha": base.alpha},
    }
    said["on_unsupported"] = reading.recipe.on_unsupported
    head = Recipe.from_dict(said).to_yaml()
    rules = _rules(reading, plan, base)
    lines = _lines(rules)
    if not _same(reading, plan, head + "layers:\n" + "\n".join(lines) + "\n"):
        rules = [(_with_layout(rule, op), op) for rule, op in rules]
        lines = _lines(rules)
    return f"# {plan.model}: what octify would do, layer by layer\n{head}layers:\n" + "\n".join(lines) + "\n"


def _resolved(defaults: Recipe) -> dict[str, Any]:
    return defaults.to_dict().get("defaults", {})


def _rules(reading: Conversion, plan: Plan, base: Settings) -> list[tuple[dict[str, Any], PlanOp]]:
    """A rule for every layer that chooses, and for every other that the recipe says something special of."""
    settings = {name: found for _, flows in reading.parts for name, found in _settings(reading, flows)}
    rules: list[tuple[dict[str, Any], PlanOp]] = []
    seen: set[str] = set()
    for op in plan.ops:
        found = settings.get(op.name)
        if found is None or op.target in seen or op.type in ("function", "method"):
            continue
        said = _said(op, found, base)
        if op.kind == "chooses" or said.keys() - {"alpha", "layout"}:  # alpha is for what chooses
            rules.append(({"match": _escape(op.target), **said}, op))
            seen.add(op.target)
    return rules


def _settings(reading: Conversion, flows: Any) -> list[tuple[str, Settings]]:
    prefix = next(path for path, own in reading.parts if own is flows)
    return [(f"{prefix}:{name}" if prefix else name, found) for name, found in flows.settings.items()]


def _said(op: PlanOp, found: Settings, base: Settings) -> dict[str, Any]:
    if found.keep:
        return {"keep": "dense"}
    said: dict[str, Any] = {"layout": found.layout} if found.layout else {"alpha": found.alpha}
    said |= {name: getattr(found, name) for name in FIELDS if getattr(found, name) != getattr(base, name)}
    if found.operator != base.operator:
        said["operator"] = found.operator
    if found.paths != base.paths:
        said["paths"] = list(found.paths)
    if dict(found.options) != dict(base.options):
        said["options"] = dict(found.options)
    return said


def _escape(path: str) -> str:
    return "".join(f"[{sign}]" if sign in "*?[" else sign for sign in path)


def _with_layout(rule: dict[str, Any], op: PlanOp) -> dict[str, Any]:
    """The layout itself, where alpha alone does not say which channels are low."""
    if op.form != "octave" or len(op.gives) != 1 or "l" not in op.gives[0]:
        return rule
    return {"layout": op.gives[0], **{key: value for key, value in rule.items() if key not in ("alpha", "layout")}}


def _lines(rules: list[tuple[dict[str, Any], PlanOp]]) -> list[str]:
    texts = [Recipe.from_dict({"version": 1, "layers": [rule]}).to_yaml().splitlines()[-1] for rule, _ in rules]
    # The stem is dense because no rule names it: its line is there to be uncommented.
    texts = [f"  # {text.strip()}" if op.reason == STEM else text for text, (_, op) in zip(texts, rules, strict=True)]
    width = max(map(len, texts), default=0)
    return [f"{text:<{width}}  # {_comment(op)}" for text, (_, op) in zip(texts, rules, strict=True)]


def _comment(op: PlanOp) -> str:
    if op.form == "dense":
        return f"dense: {op.reason}" if op.reason else "dense"
    return describe_flow(op)


def describe_flow(op: PlanOp) -> str:
    """What an operation reads and gives: `64h -> 48h16l`."""
    reads, gives = (" ".join(shorten(layout) for layout in side) or "-" for side in (op.reads, op.gives))
    return f"{reads} -> {gives}"


def shorten(layout: str) -> str:
    """A layout's text for reading, not for parsing.

    >>> shorten("48h16l"), shorten("3h1l" * 32), shorten("88h8l24h8l24h8l24h8l24h8l")
    ('48h16l', '32x(3h1l)', '184h40l')
    """
    runs = re.findall(r"\d+[hl]", layout)
    if len(runs) <= 6:
        return layout
    for period in range(2, len(runs) // 2 + 1):
        if runs == runs[:period] * (len(runs) // period):
            return f"{len(runs) // period}x({''.join(runs[:period])})"
    return "".join(f"{sum(int(run[:-1]) for run in runs if run[-1] == band)}{band}" for band in "hl")


def _same(reading: Conversion, plan: Plan, text: str) -> bool:
    """Whether a recipe's text gives the plan again."""
    again = Conversion.read(reading.model, Recipe.from_yaml(text), reading.example).plan()
    return [_decision(op) for op in again.ops] == [_decision(op) for op in plan.ops]


def _decision(op: PlanOp) -> tuple[Any, ...]:
    return op.name, op.form, op.reads, op.gives, dict(op.options)
