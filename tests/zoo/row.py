"""One line of the census and the file that holds them."""

from __future__ import annotations

import csv
from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import Path

COVERAGE = Path(__file__).with_name("coverage.csv")
OTHERS = Path(__file__).with_name("others.csv")
LARGE = 50e6  # parameters of networks whose memory is wanted back at once
TOO_LARGE = "not run for want of memory"  # why the oracles say nothing of a row


@dataclass
class Row:
    """What the census found of a network; "" is not known, "-" does not apply, ratios are printed numbers."""

    library: str
    name: str
    family: str = ""
    convolution_share: str = ""  # of all multiply-adds
    spatial_convolutions: str = ""
    converted: str = ""
    traced: str = ""
    runs_default: str = ""
    runs_other: str = ""
    parameters: str = ""
    parameters_octave: str = ""
    mac_ratio: str = ""
    ideal_ratio: str = ""
    octave_share: str = ""  # of the eligible multiply-adds
    splits: str = ""
    merges: str = ""
    oracle1: str = ""
    oracle2: str = ""
    train_step: str = ""
    save_load: str = ""
    seconds: str = ""
    opaque: str = ""
    reason: str = ""

    @property
    def key(self) -> str:
        """The name in full."""
        return f"{self.library}:{self.name}"

    @property
    def is_cnn(self) -> bool:
        """At least half of the multiply-adds in convolutions, and at least four spatial ones."""
        return float(self.convolution_share or 0) >= 0.5 and int(self.spatial_convolutions or 0) >= 4

    @property
    def is_whole(self) -> bool:
        """Whether nothing was left out for want of time or memory."""
        return not self.reason.startswith("census:") and "oracles: not run" not in self.reason

    def say(self, step: str, why: str) -> None:
        """Adds a reason."""
        text = f"{step}: {why}".replace("\n", " ")[:400]
        self.reason = f"{self.reason}; {text}" if self.reason else text


def read_rows(path: Path) -> dict[str, Row]:
    """The rows of a file by full name; none if there is no file."""
    if not path.exists():
        return {}
    with path.open(newline="") as file:
        rows = [Row(**line) for line in csv.DictReader(file)]
    return {row.key: row for row in rows}


def write_rows(path: Path, rows: Iterable[Row]) -> None:
    """Writes rows in the order of their names."""
    names = [field.name for field in fields(Row)]
    fresh = path.with_suffix(".new")
    with fresh.open("w", newline="") as file:
        writer = csv.DictWriter(file, names, lineterminator="\n")
        writer.writeheader()
        writer.writerows(vars(row) for row in sorted(rows, key=lambda row: (row.library != "torchvision", row.name)))
    fresh.replace(path)
