"""What a calibration did, step by step, in numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from octify.calibrate.expect import Expected
from octify.calibrate.least_squares import Fitted


@dataclass
class Step:
    """One step: the held-back images' loss before and after it, and the seconds it took.

    The loss is the outputs' squared error against the dense network, as a share of their variance.
    """

    name: str
    before: float | None
    after: float | None
    seconds: float
    note: str = ""


@dataclass
class CalibrationReport:
    """A calibration's steps, the fit of every layer, and the verdict on images held back.

    `agreement` is the share of held-back decisions (rows of logits, or pixels) equal to the dense network's; None where
    the outputs are no classes. `expected` is what that says of new images, or what more images said of a
    trial. `cost` counts multiply-adds against dense.
    """

    images: int = 0
    held_back: int = 0
    cost: float = 1.0
    loss: float = 0.0
    agreement: float | None = None
    expected: Expected | None = None
    steps: list[Step] = field(default_factory=list[Step])
    layers: list[Fitted] = field(default_factory=list[Fitted])
    alphas: dict[str, float] = field(default_factory=dict[str, float])

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {**asdict(self), "verdict": self.verdict}

    @property
    def verdict(self) -> str:
        """One line: what is expected on new images."""
        if self.expected is None:
            return f"loss {self.loss:.4f}"
        return f"expected on new images: {self.expected}; by {self.expected.judges} that nothing was fitted to"

    def __str__(self) -> str:
        head = f"calibrated on {self.images} images, {self.held_back} of them held back: cost {self.cost:.3f} of dense"
        lines = [head, f"  {self.verdict}"]
        for step in self.steps:
            change = "" if step.before is None else f"{step.before:.4f} -> {step.after:.4f}"
            lines.append(f"  {step.name:<14} {change:<18} {step.seconds:6.1f} s  {step.note}".rstrip())
        return "\n".join(lines)


def join_reports(parts: Sequence[tuple[str, CalibrationReport]]) -> CalibrationReport:
    """One report about parts of a model: each step and layer under its part's path, and the worst loss.

    `cost` is the mean over parts; what they cost in all is the conversion's own figure. What parts give are features,
    no decisions.
    """
    reports = [report for _, report in parts]
    return CalibrationReport(
        images=max(report.images for report in reports),
        held_back=max(report.held_back for report in reports),
        cost=sum(report.cost for report in reports) / len(reports),
        loss=max(report.loss for report in reports),
        expected=max((report.expected for report in reports if report.expected), key=lambda e: e.loss, default=None),
        steps=[replace(step, name=f"{path}: {step.name}") for path, report in parts for step in report.steps],
        layers=[replace(row, layer=f"{path}.{row.layer}") for path, report in parts for row in report.layers],
        alphas={f"{path}.{name}": alpha for path, report in parts for name, alpha in report.alphas.items()},
    )
