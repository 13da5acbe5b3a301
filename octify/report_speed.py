"""What `octify bench` prints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text


def comparisons_table(facts: Mapping[str, Any]) -> Table:
    """One row a backend; quotient 1 means that the whole saving is real."""
    table = Table(
        "backend", "dense ms", "octave ms", "ratio", "multiply-adds", "quotient", "peak MiB", title=facts["model"]
    )
    for found in facts["comparisons"]:
        table.add_row(*row_of(found))
    return table


def row_of(found: Mapping[str, Any]) -> Sequence[str]:
    """A comparison's cells."""
    low, high = found["ratio_quartiles"]
    peaks = (found["dense_peak_mib"], found["octave_peak_mib"])
    return (
        found["backend"],
        _timing(found["dense"]),
        _timing(found["octave"]),
        f"{found['ratio']:.3f} ({low:.3f}-{high:.3f})",
        f"{found['mac_ratio']:.3f}",
        f"{found['quotient']:.3f}",
        " / ".join("-" if peak is None else f"{peak:.1f}" for peak in peaks),
    )


def _timing(found: Mapping[str, Any]) -> str:
    low, high = found["quartiles"]
    return f"{found['median']:.2f} ({low:.2f}-{high:.2f})"


def profiles_table(facts: Mapping[str, Any]) -> Group:
    """A table a backend, one row a kind of operation."""
    return Group(*(_profile_table(facts["model"], found) for found in facts["profiles"]))


def _profile_table(model: str, found: Mapping[str, Any]) -> Table:
    title = f"{model} in {found['backend']}: multiply-adds {found['mac_ratio']:.3f}"
    table = Table("operation", "dense", "ms", "octave", "ms", "ratio", title=title)
    for row in (*found["kinds"], found["total"]):
        table.add_row(*kind_cells(row))
    return table


def kind_cells(row: Mapping[str, Any]) -> Sequence[str]:
    """The cells of a kind of operation."""
    ratio = f"{row['octave_ms'] / row['dense_ms']:.3f}" if row["dense_ms"] else "-"
    times = (str(row["dense"]), f"{row['dense_ms']:.2f}", str(row["octave"]), f"{row['octave_ms']:.2f}")
    return (row["kind"], *times, ratio)


def bundles_table(facts: Mapping[str, Any]) -> Group:
    """One row a bundle, and below it the recipe that keeps what wins, line for line as a file of it."""
    table = Table("convolutions", "octave ms", "dense ms", "kept", title=facts["model"])
    for row in facts["bundles"]:
        names = row["convolutions"]
        label = names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"
        table.add_row(
            label, f"{row['octave_ms']:.2f}", f"{row['dense_ms']:.2f}", "octave" if row["octave"] else "dense"
        )
    kept = facts["output"] or "the recipe, to write to a file with -o"
    end = Text(f"dense {facts['dense_ms']:.2f} ms, this recipe {facts['octave_ms']:.2f} ms; {kept}:", style="bold")
    return Group(table, end, "", Text(facts["recipe"].rstrip(), no_wrap=True, overflow="ignore"))
