"""The benchmark's figures as CSV, table, plot and README section."""

from __future__ import annotations

import csv
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
CSV, PLOT, README = HERE / "fidelity.csv", HERE / "fidelity.svg", HERE.parents[1] / "README.md"
BEGIN, END = "<!-- fidelity:begin -->", "<!-- fidelity:end -->"
COSTS = (0.8, 0.65, 0.5)


@dataclass(frozen=True)
class Result:
    """One measured point: cost is multiply-adds over dense, retained is accuracy over dense."""

    net: str
    seed: int
    samples: int
    step: str
    sweep: str
    asked: float
    cost: float
    dense: float
    accuracy: float
    retained: float
    agreement: float

    @property
    def key(self) -> tuple[str | float, ...]:
        """What one row of the file is about: measured again, it is replaced."""
        return (self.net, self.seed, self.samples, self.step, self.asked)


def read_results(file: Path = CSV) -> dict[tuple[str | float, ...], Result]:
    if not file.exists():
        return {}
    kinds = {"str": str, "int": int, "float": float}
    with file.open(newline="") as lines:
        rows = [
            Result(**{f.name: kinds[str(f.type)](row[f.name]) for f in fields(Result)}) for row in csv.DictReader(lines)
        ]
    return {row.key: row for row in rows}


def write_results(results: Iterable[Result], file: Path = CSV) -> None:
    file.parent.mkdir(exist_ok=True)
    rows = [{k: round(v, 4) if isinstance(v, float) else v for k, v in asdict(r).items()} for r in results]
    with file.open("w", newline="") as lines:
        writer = csv.DictWriter(lines, [f.name for f in fields(Result)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def retained_at(results: Sequence[Result], cost: float) -> list[float]:
    """One figure per seed for one net and step, linear between the measured costs; the dense net is a point too.

    A seed whose costs do not reach down to `cost` has no figure."""
    by_seed: dict[int, list[tuple[float, float]]] = defaultdict(lambda: [(1.0, 1.0)])
    for row in results:
        by_seed[row.seed].append((row.cost, row.retained))
    curves = [np.array(sorted(points)).T for points in by_seed.values()]
    return [float(np.interp(cost, x, y)) for x, y in curves if x[0] <= cost + 0.01]


def table(results: Sequence[Result]) -> str:
    """Markdown: retained accuracy, mean ± spread (half the range) over seeds, per net and step at three costs."""
    lines = [
        "| net (dense) | step | " + " | ".join(f"cost {c:g}" for c in COSTS) + " |",
        "|---|---|" + "--:|" * len(COSTS),
    ]
    for net in _ordered(r.net for r in results):
        mine = [r for r in results if r.net == net]
        dense = np.mean([*{r.seed: r.dense for r in mine}.values()])
        label = f"{net} ({dense:.3f})"
        for step in _ordered(r.step for r in mine):
            figures = [retained_at([r for r in mine if r.step == step], cost) for cost in COSTS]
            lines.append(f"| {label} | {step} | " + " | ".join(map(_mean, figures)) + " |")
            label = ""
    return "\n".join(lines)


def fewer(results: Iterable[Result], samples: int) -> list[str]:
    """A sentence for each other number of images: what the same points keep with those, against `samples`."""
    found: dict[int, list[tuple[Result, Result]]] = defaultdict(list)
    known = {row.key: row for row in results}
    for row in known.values():
        full = known.get((row.net, row.seed, samples, row.step, row.asked))
        if full and row.samples != samples:
            found[row.samples].append((row, full))
    return [
        f"With {count} images instead, the same {len(pairs)} points (alphas chosen) keep {np.mean(lost):.3f} less on "
        f"average, at worst {max(lost):.3f}."
        for count, pairs in sorted(found.items())
        for lost in [[full.retained - few.retained for few, full in pairs]]
    ]


def plot(results: Sequence[Result], file: Path = PLOT) -> None:
    """Retained accuracy against cost, a panel per net, a line per step: the seeds' mean, a band for their range."""
    from matplotlib.figure import Figure

    nets, steps = _ordered(r.net for r in results), _ordered(r.step for r in results)
    figure = Figure(figsize=(3.4 * len(nets), 4.6), layout="constrained")
    panels = figure.subplots(1, len(nets), sharey=True, squeeze=False)[0]
    for net, panel in zip(nets, panels, strict=True):
        for i, step in enumerate(steps):
            points = [r for r in results if r.net == net and r.step == step]
            if points:
                _draw(panel, points, step, i)
        panel.set(title=net, xlabel="multiply-adds / dense", xlim=(1.01, 0.45), ylim=(0, 1.02))
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("accuracy / dense")
    handles = {label: line for p in panels for line, label in zip(*p.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    file.parent.mkdir(exist_ok=True)
    figure.savefig(file, metadata={"Date": None})


def write_readme(text: str, file: Path = README) -> bool:
    """Put the table between the README's markers; False where it has none."""
    whole = file.read_text() if file.exists() else ""
    if BEGIN not in whole or END not in whole:
        return False
    before, rest = whole.split(BEGIN, 1)
    file.write_text(f"{before}{BEGIN}\n{text}\n{END}{rest.split(END, 1)[1]}")
    return True


def _draw(panel: object, points: Sequence[Result], step: str, i: int) -> None:
    by_asked: dict[float, list[Result]] = defaultdict(list)
    for point in points:
        by_asked[point.asked].append(point)
    groups = sorted(by_asked.values(), key=lambda g: -np.mean([p.cost for p in g]))
    x = [float(np.mean([p.cost for p in g])) for g in groups]
    y = [[p.retained for p in g] for g in groups]
    style = "--" if step.startswith("pruned") else "-"
    (line,) = panel.plot(x, [np.mean(v) for v in y], style, marker=".", label=step, color=f"C{i % 10}")  # type: ignore[attr-defined]
    panel.fill_between(x, [min(v) for v in y], [max(v) for v in y], color=line.get_color(), alpha=0.15)  # type: ignore[attr-defined]


def _mean(figures: Sequence[float]) -> str:
    if not figures:
        return "–"
    half = (max(figures) - min(figures)) / 2
    return f"{np.mean(figures):.3f}" + (f" ± {half:.3f}" if len(figures) > 1 else "")


def _ordered(names: Iterable[str]) -> list[str]:
    return [*dict.fromkeys(names)]
