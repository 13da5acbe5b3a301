"""What flows where → which layout every value gets, and why: names and numbers only."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, cast

from torch import fx

from octify.errors import ConversionError
from octify.flows import Flows, asks_for_change, makes_record, target_of
from octify.graph import nodes_in
from octify.layout import Layout
from octify.operators import transfer_notes
from octify.rules.base import Rule, maps_in
from octify.ties import Ranking

NO_OCTAVE = "nothing low on either side"


@dataclass(frozen=True)
class PlanOp:
    """The decision about one operation: what it reads and gives, how, and the reason."""

    name: str
    target: str
    type: str
    kind: str  # chooses, keeps, joins, splits, closes, opaque, plain
    form: str  # an operator's name (octave, ...) of what changes, else bands or dense
    reads: tuple[str, ...]
    gives: tuple[str, ...]
    reason: str = ""
    notes: tuple[str, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict[str, Any])
    source: str = ""


@dataclass(frozen=True)
class Plan:
    """What a conversion does, operation by operation; prints, goes into JSON and back."""

    model: str
    how: str
    ops: tuple[PlanOp, ...]
    notes: tuple[str, ...] = ()

    def __deepcopy__(self, memo: object) -> Plan:
        return self  # nothing in it changes

    def get(self, name: str) -> PlanOp | None:
        """The decision about a node; None of inputs and outputs."""
        return self._by_name.get(name)

    @property
    def _by_name(self) -> dict[str, PlanOp]:
        index = self.__dict__.get("_index")
        if index is None:
            index = {op.name: op for op in self.ops}
            object.__setattr__(self, "_index", index)
        return cast("dict[str, PlanOp]", index)

    @property
    def convolutions(self) -> list[PlanOp]:
        """The operations that choose (convolutions and pointwise linear layers), one per module."""
        return list({op.target: op for op in self.ops if op.kind == "chooses"}.values())

    @property
    def converted(self) -> list[PlanOp]:
        """The convolutions that change."""
        return [op for op in self.convolutions if op.form != "dense"]

    def reasons(self) -> dict[str, int]:
        """Why convolutions stay dense, with counts."""
        return dict(Counter(op.reason for op in self.convolutions if op.form == "dense").most_common())

    @property
    def headline(self) -> str:
        """How many convolutions change into what, and what of the weights does not carry over."""
        forms = Counter(op.form for op in self.converted)
        what = " and ".join(f"{count} {form}" for form, count in forms.items()) if len(forms) > 1 else ""
        what = f"changed, {what}" if what else next(iter(forms), "octave")
        lost = "".join(f"; {note}" for note in transfer_notes(forms))
        return f"{self.model}: {len(self.converted)} of {len(self.convolutions)} convolutions {what}{lost}"

    def to_dict(self) -> dict[str, Any]:
        """A tree of plain values for JSON."""
        return json.loads(json.dumps(asdict(self)))

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Plan:
        """The inverse of `to_dict`.

        Raises:
            KeyError, TypeError: the tree is not a plan's.
        """

        def entry(op: dict[str, Any]) -> PlanOp:
            lists = {name: tuple(op[name]) for name in ("reads", "gives", "notes")}
            return PlanOp(**cast("dict[str, Any]", {**op, **lists}))

        ops = tuple(entry(op) for op in data["ops"])
        return cls(data["model"], data["how"], ops, tuple(data["notes"]))

    def __str__(self) -> str:
        lines = [self.headline]
        lines += [f"  note: {note}" for note in self.notes]
        for op in self.ops:
            if op.kind == "plain":
                continue
            label = op.target if "." in op.target or op.kind == "chooses" else f"{op.name} ({op.target})"
            flow = f"{' '.join(op.reads) or '-'} -> {' '.join(op.gives) or '-'}"
            extra = "; ".join(text for text in (op.reason, *op.notes) if text)
            lines.append(f"  {label:<34} {op.type:<18} {op.form:<7} {flow}{'  # ' + extra if extra else ''}")
        return "\n".join(lines)


def make_plan(flows: Flows, ranking: Ranking | None = None) -> Plan:
    """Decides the layout of every value that flows through a network.

    `ranking` orders the channels that a writer makes (its module path → a score a channel, the lowest go low first);
    without it the last channels go low, as in the paper.

    Raises:
        ConversionError: `on_unsupported: error` and a layer that should be octave cannot be.
    """
    trace = flows.trace
    flows.classes.choose(ranking or {})
    ops = tuple(_decide(flows, node) for node in trace.nodes if node.op not in ("placeholder", "output", "get_attr"))
    plan = Plan(type(trace.model).__name__, trace.how, ops, (*trace.notes, *flows.classes.notes))
    if flows.recipe.on_unsupported == "error":
        _refuse_unsupported(plan, flows)
    return plan


def _refuse_unsupported(plan: Plan, flows: Flows) -> None:
    asked = {op.name for op in plan.convolutions if asks_for_change(flows.settings[op.name])}
    left = [op for op in plan.convolutions if op.name in asked and op.form == "dense"]
    if left:
        lines = "\n  ".join(f"{op.target}: {op.reason}" for op in left[:10])
        raise ConversionError(f"on_unsupported is error, and {len(left)} convolutions stay dense:\n  {lines}")


def _decide(flows: Flows, node: fx.Node) -> PlanOp:
    """The decision about one node, once the bits are chosen."""
    module = flows.trace.module_of(node)
    rule = flows.rules.get(node)
    reads = [
        flows.layout(found)
        for found in maps_in([flows.values[source] for source in nodes_in((node.args, node.kwargs))])
    ]
    gives = [flows.layout(found) for found in maps_in(flows.values[node])]
    has_maps = bool(reads or gives) or node in flows.dense or node in flows.taken
    kind = "plain" if not has_maps or makes_record(node) else "opaque" if rule is None else rule.kind
    form = _form(flows, node, rule, reads, gives)
    options: dict[str, Any] = {}
    notes = list(flows.classes.notes_of(node.name)) if form != "dense" else []
    if node in flows.taken:
        options = flows.taken[node].options(flows.ops[node], f"{flows.prefix}{node.target}")
    if rule is not None and form == "octave":
        options, more = rule.options(flows.ops[node], reads, gives)
        notes += more
    reason = flows.dense.get(node, "")
    if form == "dense" and not reason and kind == "chooses":
        reason = flows.classes.reason(node.name) or NO_OCTAVE
    return PlanOp(
        node.name,
        target_of(node),
        type(module).__name__ if module is not None else node.op.removeprefix("call_"),
        kind,
        form,
        tuple(map(str, reads)),
        tuple(map(str, gives)),
        reason,
        tuple(dict.fromkeys(notes)),
        options,
        flows.settings[node.name].source if node in flows.ops else "",
    )


def _form(flows: Flows, node: fx.Node, rule: Rule | None, reads: list[Layout], gives: list[Layout]) -> str:
    if node in flows.taken:
        return flows.taken[node].name
    if rule is None or node in flows.dense or node not in flows.ops or not flows.classes.splits:
        return "dense"
    if not rule.changes(flows.ops[node], reads, gives):
        return "dense"
    return "octave" if rule.kind == "chooses" else "bands"
