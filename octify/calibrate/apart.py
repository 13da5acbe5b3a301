"""Which levers can be pulled in one network without meeting: those that share no layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import fx

from octify.calibrate.levers import Lever
from octify.calibrate.problems import can_fit
from octify.flows import Flows
from octify.rules.base import maps_in

MOST_GROUPS = 6
OUTPUTS = ""  # in the place of a layer's name


@dataclass(frozen=True)
class Apart:
    """Levers (by index) in groups, and by its name which levers each layer of the dense network meets.

    A layer meets a lever whose channels it reads or writes; the outputs (under `OUTPUTS`) meet what reaches them past
    all layers.
    """

    groups: list[list[int]]
    meets: dict[str, set[int]]


def find_apart(flows: Flows, levers: Sequence[Lever], most: int = MOST_GROUPS) -> Apart:
    """At most so many groups; only where these do not suffice (long concatenations) do levers of one group meet."""
    meets = _meetings(flows, levers)
    groups: list[list[int]] = []
    for index in range(len(levers)):
        rivals = set[int]().union(*(found for found in meets.values() if index in found))
        home = min(groups, key=lambda group: (len(rivals.intersection(group)), len(group)), default=list[int]())
        if not home or (len(groups) < most and not rivals.isdisjoint(home)):
            groups.append(home := [])
        home.append(index)
    return Apart(groups, meets)


def _meetings(flows: Flows, levers: Sequence[Lever]) -> dict[str, set[int]]:
    owner = {root: index for index, lever in enumerate(levers) for step in lever.steps for root in step}
    carried: dict[fx.Node, set[int]] = {}
    meets: dict[str, set[int]] = {}
    for node in flows.trace.nodes:
        own = _own(flows, node, owner)
        given = set[int]().union(*(carried[source] for source in node.all_input_nodes))
        layer = _is_layer(flows, node)
        if layer or node.op == "output":
            meets[node.name if layer else OUTPUTS] = own | given
        carried[node] = own if layer else own | given
    return meets


def _is_layer(flows: Flows, node: fx.Node) -> bool:
    rule, module = flows.rules.get(node), flows.trace.module_of(node)
    return (rule is not None and rule.kind == "chooses") or (module is not None and can_fit(module))


def _own(flows: Flows, node: fx.Node, owner: Mapping[int, int]) -> set[int]:
    """The levers of the channels that a node gives."""
    channels = {channel for found in maps_in([flows.values[node]]) for channel in found.ids.ravel().tolist()}
    roots = {flows.classes.find(channel) for channel in channels}
    return {owner[root] for root in roots if root in owner}
