"""The census in a few lines: printed, and written into the README between its markers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from rich.console import Console
from rich.table import Table

from octify.trace import SIZED
from tests.zoo.row import COVERAGE, OTHERS, Row, read_rows

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
    """Whether oracle 2 says nothing: the source is uneven on a constant image, or magnifies rounding itself there."""
    return "depends on position" in row.reason or "the source itself moves" in row.reason


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
        ("traced with open sizes", lambda r: r.traced in (*SIZED, "parts")),
        ("alpha 0: every output bit and key the same", lambda r: None if not r.oracle1 else r.oracle1 == "exact"),
        ("constant image: below 1e-4 of the dense net", _oracle2),
        ("train step reaches every parameter", lambda r: None if r.train_step in ("", "-") else r.train_step == "yes"),
        ("saved, loaded, equal", lambda r: None if r.save_load in ("", "-") else r.save_load == "equal"),
        ("at least 90 % of the eligible multiply-adds octave", lambda r: _share(r, 0.9)),
        ("the same, of nets without an opaque operation", lambda r: None if mixes(r) else _share(r, 0.9)),
        ("at least 50 %", lambda r: _share(r, 0.5)),
        ("no adapter at all", lambda r: None if not r.splits else int(r.splits) + int(r.merges) == 0),
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


# What is listed by name, and how the census calls that step where it says why.
LISTED = {
    "not converted": ("census", lambda r: r.converted == "yes"),
    "not at other sizes": ("another size", lambda r: r.runs_other != "no"),
    "alpha 0 differs": ("oracle 1", lambda r: r.oracle1 in ("exact", "")),
    "constant image differs": ("oracle 2", lambda r: not r.oracle2 or (number(r.oracle2) or 1) < CLOSE),
    "a train step misses parameters": ("train step", lambda r: r.train_step != "no"),
    "not loaded equal": ("save and load", lambda r: r.save_load in ("equal", "", "-")),
    "less than 90 % octave": ("share", lambda r: _share(r, 0.9) is not False),
    "oracles not run": ("oracles", lambda r: "oracles: not run" not in r.reason),
}  # fmt: skip


def exceptions(rows: list[Row]) -> list[str]:
    """A line for each family and column in which a network is not green: how many, and why."""
    found: dict[tuple[str, str], list[Row]] = {}
    for what, (_, green) in LISTED.items():
        for row in rows:
            if not green(row):
                found.setdefault((what, row.family), []).append(row)
    return [f"- {what}: {_named(some)}: {_why(some[0], LISTED[what][0])}" for (what, _), some in found.items()]


def _named(rows: list[Row]) -> str:
    names = [row.name for row in rows]
    return ", ".join(names) if len(names) < 4 else f"{names[0]} … {names[-1]} ({len(names)})"


def _why(row: Row, step: str) -> str:
    said = [part.partition(": ")[2] for part in row.reason.split("; ") if part.startswith(f"{step}: ")]
    return said[0].split(": convert with")[0] if said else "no reason given"


def markdown(rows: list[Row]) -> str:
    """The table for the README."""
    table = [
        (f"{len(rows)} CNNs measured: alpha 0.25, default recipe, random weights", "torchvision", "timm"),
        ("---", "--:", "--:"),
        *lines(rows),
    ]
    hours = sum(number(row.seconds) or 0 for row in (*rows, *read_rows(OTHERS).values())) / 3600
    told = f"{hours:.1f} hours of one core in all. Not green, by family:"
    return "\n".join(["| " + " | ".join(line) + " |" for line in table] + ["", told, "", *exceptions(rows)])


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
