"""How calibrations, comparisons on images and sensitivities are shown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from octify.calibrate.verdict import Verdict
from octify.report import conversion_report, names_table


def calibration_report(facts: Mapping[str, Any], weights: str = "") -> RenderableType:
    """A conversion's report with what each step of the calibration did."""
    found: Mapping[str, Any] = facts["calibration"]
    rows = [[step["name"], *_change(step), f"{step['seconds']:.1f}", step["note"]] for step in found["steps"]]
    table = names_table(rows, "step", "loss before", "loss after", "seconds", "")
    return Group(conversion_report(facts, weights), "", table, Text(found["verdict"], style="bold"))


def _change(step: Mapping[str, Any]) -> list[str]:
    return ["" if step[key] is None else f"{step[key]:.4f}" for key in ("before", "after")]


def verdict_report(verdict: Verdict) -> RenderableType:
    """A converted network beside its source, and the error layer by layer."""
    rows = [["loss (share of the outputs' variance)", f"{verdict.loss:.4f}"], ["cosine", f"{verdict.cosine:.4f}"]]
    rows += [] if verdict.agreement is None else [["equal decisions", f"{verdict.agreement:.2%}"]]
    rows += [] if verdict.kl is None else [["KL divergence (nats)", f"{verdict.kl:.4f}"]]
    for name, pair in (("top-1", verdict.top1), ("top-5", verdict.top5)):
        rows += [] if pair is None else [[f"{name} dense, octave", f"{pair[0]:.2%}, {pair[1]:.2%}"]]
    layers = [[error.layer, _share(error.high), _share(error.low)] for error in verdict.layers]
    head = Text(f"{verdict.images} images, outputs are {verdict.kind}", style="bold")
    table = names_table(layers, "layer", "error high", "error low")
    return Group(head, names_table(rows), "", "each layer behind the sum and activation that follow it", table)


def _share(error: float | None) -> str:
    return "" if error is None else f"{error:.4f}"


def sensitivity_report(rows: Sequence[Mapping[str, Any]]) -> RenderableType:
    """What each bundle of layers would lose at several alphas."""
    shares = list(rows[0]["loss"]) if rows else []
    lines = [[_names(row["layers"]), str(row["channels"]), *_losses(row["loss"])] for row in rows]
    return names_table(lines, "layers with one layout", "channels", *(f"loss at {share}" for share in shares))


def _names(layers: Sequence[str]) -> str:
    return ", ".join(layers[:3]) + (f" and {len(layers) - 3} more" if len(layers) > 3 else "")


def _losses(losses: Mapping[str, float]) -> list[str]:
    return [f"{loss:.5f}" for loss in losses.values()]
