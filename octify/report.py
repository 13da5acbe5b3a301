"""Facts as tables in a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from octify.check import Check
from octify.plan import Plan, PlanOp
from octify.plan_recipe import describe_flow

UNITS = {
    "parameters": ("parameters", ""),
    "gmacs": ("multiply-adds", " G"),
    "activation_mib": ("activation memory", " MiB"),
}
PLAIN = 72  # columns for a reason


def conversion_report(facts: Mapping[str, Any], weights: str = "") -> RenderableType:
    """What `octify convert` prints: the conversion, what it costs before and after, and the checks."""
    parts: list[RenderableType] = [_head(facts, weights), "", _convolutions(facts), "", _costs(facts)]
    if facts.get("checks"):
        parts += ["", checks_table([Check(**check) for check in facts["checks"]])]
    return Group(*parts, "", _end(facts))


def plan_report(facts: Mapping[str, Any], plan: Plan) -> RenderableType:
    """What `octify plan` prints: a line per operation, and what it comes to."""
    notes = [Text(f"note: {note}") for note in plan.notes]
    return Group(_head(facts), "", plan_table(plan), *notes, "", _convolutions(facts), "", _costs(facts))


def _head(facts: Mapping[str, Any], weights: str = "") -> Text:
    sizes = facts["input_size"]
    shape = "x".join(map(str, sizes)) if sizes and isinstance(sizes[0], int) else str(sizes)
    lost = facts.get("transfer", [])
    alpha = "" if lost and not facts["convolutions"]["octave"] else f", {_alpha(facts)}"
    line = Text.assemble((facts["source"], "bold"), f" at {shape}, recipe {facts['recipe']}{alpha}")
    line.append(f", {weights}" if weights else "")
    for note in lost:
        line.append(f"; {note}", style="yellow")
    return line


def _alpha(facts: Mapping[str, Any]) -> str:
    """The recipe's alpha, unless it stands in the rules for layers alone."""
    return f"alpha {facts['alpha']:g}" if facts["alpha"] or not facts["convolutions"]["octave"] else "alpha by layer"


def _counted(found: Mapping[str, Any]) -> str:
    """`16 of 53 octave`, `12 octave and 4 compconv of 53`."""
    operators = found.get("operators", {"octave": found["octave"]})
    if len(operators) > 1:
        return " and ".join(f"{count} {name}" for name, count in operators.items()) + f" of {found['total']}"
    name, count = next(iter(operators.items()), ("octave", 0))
    return f"{count} of {found['total']} {name}"


def _convolutions(facts: Mapping[str, Any]) -> Table:
    found, adapters = facts["convolutions"], facts["adapters"]
    table = _plain_table()
    table.add_row("convolutions", _counted(found))
    for reason, count in found["reasons"].items():
        table.add_row("", Text(f"{count} dense: {reason}", style="dim"))
    split, merge = adapters["split"], adapters["merge"]
    table.add_row("adapters", f"{split} split, {merge} merge" if split + merge else "none")
    return table


def _costs(facts: Mapping[str, Any]) -> Table:
    table = _plain_table("", "before", "after", "ratio")
    for key, (name, unit) in UNITS.items():
        before, after = facts[key]["before"], facts[key]["after"]
        numbers = [f"{value:,}" if isinstance(value, int) else f"{value:,.3f}{unit}" for value in (before, after)]
        table.add_row(name, *numbers, f"{after / before:.3f}" if before else "-")
    return table


def checks_table(checks: Sequence[Check]) -> Table:
    """A line per check, with what was measured."""
    table = _plain_table("check", "", "measured")
    for check in checks:
        mark = Text("ok", style="green") if check.passed else Text("FAILED", style="bold red")
        value = check.value if isinstance(check.value, str) else f"{check.value:.2g}"
        table.add_row(check.name, mark, value)
    return table


def _end(facts: Mapping[str, Any]) -> Text:
    if facts.get("output"):
        return Text(f"written to {facts['output']} in {facts['seconds']} s")
    return Text(f"{facts['seconds']} s; nothing written: -o FILE.safetensors keeps the result")


def plan_table(plan: Plan) -> Table:
    """A line per operation on maps."""
    table = _plain_table("operation", "kind", "form", "layouts", "why")
    for op in plan.ops:
        if op.kind != "plain":
            table.add_row(_name(op), op.type, _form(op), describe_flow(op), Text("; ".join(_why(op)), style="dim"))
    return table


def _name(op: PlanOp) -> str:
    return f"{op.target} ({op.name})" if op.type in ("function", "method") else op.target


def _form(op: PlanOp) -> Text:
    return Text(op.form, style={"dense": "dim", "bands": "cyan"}.get(op.form, "green"))


def _why(op: PlanOp) -> list[str]:
    return [text for text in (op.reason, *op.notes) if text]


def checkpoint_report(facts: Mapping[str, Any]) -> RenderableType:
    """What `octify inspect` prints."""
    table = _plain_table()
    found = facts["convolutions"]
    table.add_row("source", facts["source"] or f"{facts['class']} (a network of your own)")
    table.add_row("input", ", ".join("x".join(map(str, shape)) for shape in facts["input_size"]))
    table.add_row("recipe", f"{facts['recipe'].get('name', '-')}, {_alpha(facts)}")
    table.add_row("convolutions", _counted(found))
    for reason, count in found["reasons"].items():
        table.add_row("", Text(f"{count} dense: {reason}", style="dim"))
    table.add_row("tensors", f"{facts['tensors']} with {facts['numbers']:,} numbers, {facts['dtype']}")
    table.add_row("file", f"{facts['bytes'] / 1e6:,.1f} MB, made by {facts['made_by']}")
    return Group(Text(facts["file"], style="bold"), "", table)


def names_table(rows: Sequence[Sequence[str]], *titles: str) -> Table:
    """Rows of names."""
    table = _plain_table(*titles)
    for row in rows:
        table.add_row(*row)
    return table


def tables(facts: Mapping[str, Sequence[Mapping[str, str]]]) -> RenderableType:
    """A table for every list of rows, one below the other."""
    found: list[RenderableType] = []
    for rows in facts.values():
        found += [names_table([list(row.values()) for row in rows], *rows[0]), ""]
    return Group(*found[:-1])


def _plain_table(*titles: str) -> Table:
    table = Table(box=None, show_header=bool(titles), pad_edge=False, padding=(0, 3, 0, 0), header_style="bold")
    for index, title in enumerate(titles):
        numbers = title in ("before", "after", "ratio")
        table.add_column(title, justify="right" if numbers else "left", no_wrap=index == 0)
    return table


def show(renderable: RenderableType) -> None:
    """Prints to standard output; wide tables are not folded where the output is no terminal."""
    console = Console(highlight=False, soft_wrap=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=200, no_color=True)
    console.print(Padding(renderable, 0, expand=False))
