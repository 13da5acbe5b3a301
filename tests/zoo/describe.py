"""A plan in the words of the census: how much is octave, what is not and why, how many adapters there are."""

from __future__ import annotations

from torch import nn

from octify.layers import Merge, Split
from octify.module import OctaveModule
from octify.plan import Plan
from tests.zoo.count import Call

STEM = "the first convolution on the image"


def stems(decided: Plan) -> list[str]:
    """The convolutions on the image."""
    return [op.target for op in decided.ops if op.reason == STEM]


def octave_targets(decided: Plan) -> set[str]:
    """The convolutions that are octave now."""
    return {op.target for op in decided.ops if op.kind == "chooses" and op.form != "dense"}


def adapters(converted: nn.Module) -> tuple[int, int]:
    """How many splits and how many merges the graphs call."""
    graphs = [module.graph for module in converted.modules() if isinstance(module, OctaveModule)]
    kinds = [type(_called(converted, node)) for graph in graphs for node in graph.nodes]
    return kinds.count(Split), kinds.count(Merge)


def _called(model: nn.Module, node: object) -> nn.Module | None:
    """The adapter that a node calls; adapters live at the top of the part whose graph has the node."""
    op, target = getattr(node, "op", ""), str(getattr(node, "target", ""))
    if op != "call_module" or "octify_" not in target:
        return None
    owner = getattr(node, "graph").owning_module or model  # noqa: B009 - a node of torch.fx
    return owner.get_submodule(target)


def opaque(decided: Plan) -> str:
    """What stays dense between a merge and a split although maps flow through it."""
    found = {
        op.target if op.type in ("function", "method") else op.type
        for op in decided.ops
        if op.kind == "opaque" and op.reads
    }
    return " ".join(sorted(found))


def why_dense(decided: Plan, left: list[Call]) -> str:
    """The reasons why eligible convolutions are dense, the three that cost most first."""
    reasons: dict[str, int] = {}
    known = {op.target: op.reason or "keeps its layout" for op in decided.ops}
    known |= {op.target: "reads tokens, not a map" for op in decided.ops if op.kind == "plain"}
    for call in left:
        why = known.get(call.path, "inside an opaque operation or an untraced part")
        reasons[why] = reasons.get(why, 0) + call.macs
    total = sum(reasons.values())
    return ", ".join(f"{why} ({cost / total:.0%})" for why, cost in sorted(reasons.items(), key=lambda i: -i[1])[:3])


def listed(reasons: dict[str, int]) -> str:
    """Three reasons with their counts."""
    return ", ".join(f"{why} ({times})" for why, times in list(reasons.items())[:3])
