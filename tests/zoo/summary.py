"""The census in a few lines: printed, and written into the README between its markers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from rich.console import Console
from rich.table import Table

from tests.zoo.row import COVERAGE, Row, read_rows

README = Path(__file__).parents[2] / "README.md"
BEGIN, END = "<!-- zoo:begin -->", "<!-- zoo:end -->"
CLOSE = 1e-4


def number(text: str) -> float | None:
    """A printed number, if it is one."""
    try:
        return float(text)
    except ValueError:
        return None


def depends_on_position(row: Row) -> bool:
    """Whether the source itself is uneven on a constant image, so that oracle 2 says nothing."""
    return "depends on position" in row.reason


def mixes(row: Row) -> bool:
    """Whether a network has an operation that mixes positions or channels without a convolution."""
    return bool(row.opaque)


def lines(rows: list[Row]) -> list[tuple[str, ...]]:
    """The table: what was asked, and how many of torchvision's and timm's networks do it."""
    asked: list[tuple[str, Callable[[Row], bool | None]]] = [
        ("converted", lambda r: r.converted == "yes"),
        ("runs at its default size", lambda r: r.runs_default == "yes"),
        (
            "runs at other sizes, where the source does",
            lambda r: None if r.runs_other in ("-", "") else r.runs_other == "yes",
        ),
        ("traced symbolically: any size", lambda r: r.traced in ("symbolic", "parts")),
        ("alpha 0: every output bit and key the same", lambda r: None if not r.oracle1 else r.oracle1 == "exact"),
        ("constant image: below 1e-4 of the dense net", _oracle2),
        ("train step reaches every parameter", lambda r: None if r.train_step in ("", "-") else r.train_step == "yes"),
        ("saved, loaded, equal", lambda r: None if r.save_load in ("", "-") else r.save_load == "equal"),
        ("at least 90 % of the eligible multiply-adds octave", lambda r: _share(r, 0.9)),
        ("the same, of nets without an opaque operation", lambda r: None if mixes(r) else _share(r, 0.9)),
        ("at least 50 %", lambda r: _share(r, 0.5)),
    ]
    return [(text, *(_counts(rows, library, ask) for library in ("torchvision", "timm"))) for text, ask in asked]


def _oracle2(row: Row) -> bool | None:
    error = number(row.oracle2)
    if not row.oracle2 or depends_on_position(row):
        return None
    return error is not None and error < CLOSE


def _share(row: Row, least: float) -> bool | None:
    share = number(row.octave_share)
    return None if share is None else share >= least


def _counts(rows: list[Row], library: str, ask: Callable[[Row], bool | None]) -> str:
    answers = [answer for row in rows if row.library == library and (answer := ask(row)) is not None]
    return f"{sum(answers)} of {len(answers)}"


def markdown(rows: list[Row]) -> str:
    """The table for the README."""
    table = [
        (f"{len(rows)} CNNs measured: alpha 0.25, default recipe, random weights", "torchvision", "timm"),
        ("---", "--:", "--:"),
        *lines(rows),
    ]
    return "\n".join("| " + " | ".join(line) + " |" for line in table)


def write_summary(rows: list[Row]) -> None:
    """Prints the table, and puts it into the README if that has the markers."""
    table = Table("at alpha 0.25", "torchvision", "timm", title=f"{len(rows)} CNNs")
    for line in lines(rows):
        table.add_row(*line)
    Console().print(table)
    text = README.read_text() if README.exists() else ""
    if BEGIN in text and END in text:
        before, _, rest = text.partition(BEGIN)
        README.write_text(f"{before}{BEGIN}\n{markdown(rows)}\n{END}{rest.partition(END)[2]}")


if __name__ == "__main__":
    write_summary(list(read_rows(COVERAGE).values()))
