"""Prints the paper's rows beside octify's, and writes them into the README between its markers."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.progress import track
from rich.table import Table

from tests.paper_nets.measure import Measured, measure
from tests.paper_nets.rows import rows

README = Path(__file__).parents[1] / "README.md"
BEGIN, END = "<!-- paper:begin -->", "<!-- paper:end -->"
HEADER = (
    "network", "alpha", "input", "parameters (M)", "GMACs, octify", "GMACs, due", "GFLOPs, paper", "of dense", "memory",
    "1 - ¾·alpha", "top-1, paper",
)  # fmt: skip


def cells(found: Measured) -> tuple[str, ...]:
    """One line of the table."""
    row = found.row
    digits = len(row.expected.partition(".")[2]) if row.expected else 3
    return (
        row.net,
        f"{row.alpha:g}",
        "x".join(map(str, row.shape[2:])),
        f"{found.parameters / 1e6:.3f}",
        f"{found.gmacs:.{digits}f}",
        row.gmacs or "-",
        row.paper or "-",
        f"{found.ratio:.3f}",
        f"{found.memory:.3f}",
        f"{1 - 0.75 * row.alpha:.3f}",
        row.top1 or "-",
    )


def notes(found: list[Measured]) -> list[str]:
    """Why some rows differ from their figures."""
    reasons: dict[str, list[str]] = {}
    for row in (item.row for item in found):
        if row.note:
            reasons.setdefault(row.note, []).append(f"{row.net} at {row.alpha:g}")
    return [f"{', '.join(names)}: {note}." for note, names in reasons.items()]


def markdown(found: list[Measured]) -> str:
    """The table and its notes for the README."""
    lines = [HEADER, ("---",) * 3 + ("--:",) * (len(HEADER) - 3), *map(cells, found)]
    return "\n".join(["| " + " | ".join(line) + " |" for line in lines] + ["", *(f"- {note}" for note in notes(found))])


def main() -> None:
    """Counts every row on the meta device."""
    console = Console()
    found = [measure(row) for row in track(rows(), "Counting", console=console, transient=True)]
    table = Table(*HEADER, title="The paper beside octify")
    for item in found:
        table.add_row(*cells(item))
    console.print(table)
    for note in notes(found):
        console.print(f"- {note}")
    if not README.is_file():
        return
    before, begin, rest = README.read_text(encoding="utf-8").partition(BEGIN)
    if begin and END in rest:
        README.write_text(f"{before}{BEGIN}\n{markdown(found)}\n{END}{rest.partition(END)[2]}", encoding="utf-8")


if __name__ == "__main__":
    main()
