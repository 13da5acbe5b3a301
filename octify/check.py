"""The invariants of a converted graph, each with a name."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from octify.errors import CheckError
from octify.flows import Flows
from octify.layers import Merge, Split
from octify.module import OctaveModule
from octify.plan import Plan


@dataclass(frozen=True)
class Check:
    """One check's result; `value` is what was measured."""

    name: str
    passed: bool
    value: float | int | str


def structure_checks(converted: OctaveModule, flows: Flows, plan: Plan) -> list[Check]:
    """What can be said without running the model."""
    graph = converted.graph
    merged_split = sum(
        _is(converted, node, Split) and any(_is(converted, source, Merge) for source in node.all_input_nodes)
        for node in graph.nodes
    )
    idle_splits = sum(
        _is(converted, node, Split)
        and all(_is(converted, reader, Merge) for item in node.users for reader in item.users)
        for node in graph.nodes
    )
    idle = {str(node.target) for node in flows.trace.nodes if node.op == "call_module" and not node.users}
    dangling = sum(not n.users and n.op == "call_module" and str(n.target) not in idle for n in graph.nodes)
    return [
        Check("no merge followed by a split", merged_split == 0, merged_split),
        Check("no split whose only use is a merge", idle_splits == 0, idle_splits),
        Check("every module call is used", dangling == 0, dangling),
    ]


def check_graph(converted: OctaveModule, flows: Flows, plan: Plan) -> list[Check]:
    """Runs the structural checks.

    Raises:
        CheckError: one failed; a fault of octify's.
    """
    checks = structure_checks(converted, flows, plan)
    failed = [check for check in checks if not check.passed]
    if failed:
        lines = "; ".join(f"{check.name}: {check.value}" for check in failed)
        raise CheckError(f"the converted {plan.model} breaks an invariant: {lines}. Please report this.")
    return checks


def _is(converted: OctaveModule, node: fx.Node, kind: type) -> bool:
    return node.op == "call_module" and isinstance(converted.get_submodule(str(node.target)), kind)
