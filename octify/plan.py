"""A trace and a recipe → which layout every value gets, and why: names and numbers only."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, cast

from torch import Tensor, fx

from octify.errors import ConversionError
from octify.functional import KINDS
from octify.graph import chain_of_views, has_hooks, nodes_in, tensors_of, value_of, writes_in_place
from octify.layout import Layout
from octify.modes import ModeCall
from octify.operators import Operator, check_operators, find_operator, transfer_notes
from octify.recipe import Recipe, Settings
from octify.reparametrized import computed_by, settled
from octify.rules import rule_for
from octify.rules.base import Dense, Map, Op, Plain, Rule, maps_in
from octify.ties import Classes, Ranking
from octify.trace import Trace

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
    ops = tuple(flows.decide(node) for node in trace.nodes if node.op not in ("placeholder", "output", "get_attr"))
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


def asks_for_change(settings: Settings) -> bool:
    """Whether a layer with these settings shall be anything but dense."""
    return find_operator(settings.operator).asks(settings)


class Flows:
    """What flows where: every rule's `flow` run over a trace, and the decisions read off the chosen bits afterwards.

    `values` holds a map (or a tuple of maps, or a plain value) per node: axes and channel classes, no choices.
    """

    def __init__(self, trace: Trace, recipe: Recipe, prefix: str = "", image: bool = True) -> None:
        self.trace = trace
        self.prefix = prefix
        self.image = image  # whether the inputs are images; a part of a model may be given features
        self.recipe = recipe
        self.values: dict[fx.Node, Any] = {}
        self.rules: dict[fx.Node, Rule | None] = {}
        self.dense: dict[fx.Node, str] = {}
        self.taken: dict[fx.Node, Operator] = {}  # by an operator on dense maps
        self.refusals: dict[str, str] = {}
        self.settings: dict[str, Settings] = {}
        self.ops: dict[fx.Node, Op] = {}
        self.calls: dict[str, tuple[list[Map], list[Map]]] = {}
        self.classes = Classes()
        self.by_target: dict[str, list[fx.Node]] = defaultdict(list)
        for node in trace.nodes:
            if node.op == "call_module" and _has_weights(trace.module_of(node)):
                self.by_target[str(node.target)].append(node)
        self.lent = {str(node.target).rpartition(".")[0] for node in trace.nodes if node.op == "get_attr"}
        check_operators(recipe)
        for node in trace.nodes:
            self.values[node] = self._value(node)

    def again(self, recipe: Recipe) -> Flows:
        """The same trace under another recipe."""
        return Flows(self.trace, recipe, self.prefix, self.image)

    @property
    def modules(self) -> list[tuple[str, str]]:
        """Path and class name of every module that the recipe is asked about."""
        called = {str(node.target): node for node in self.trace.nodes if node.op == "call_module"}
        return [(f"{self.prefix}{path}", type(self.trace.module_of(node)).__name__) for path, node in called.items()]

    def _value(self, node: fx.Node) -> Any:
        if node.op == "placeholder":
            return _plain(value_of(node), image=self.image)
        if node.op == "get_attr":
            return _plain(value_of(node))
        if node.op == "output":
            self._want_dense([self.values[source] for source in nodes_in(node.args)])
            return None
        module = self.trace.module_of(node)
        settings = self._settings(node, module)
        stem = self.recipe.defaults.stem == "dense" and settings.source == "default"
        plain = settled(module) if module is not None else None
        op = Op(node, plain, self.values, self._as_largest(node, settings), stem)
        rule = rule_for(node, plain)
        if rule is not None and not rule.applies(op):
            rule = None
        self.rules[node] = rule
        maps = op.maps
        if makes_record(node):
            self._want_dense(maps)
            return _plain(value_of(node))
        if not maps and (rule is None or rule.kind != "chooses"):
            image = node.target not in KINDS and any(isinstance(v, Plain) and v.image for v in self._inputs(node))
            return _plain(value_of(node), image=image)
        self.ops[node] = op
        self.classes.begin(node.name, str(node.target) if module is not None else None, settings)
        try:
            if settings.keep and rule is not None:
                raise Dense("kept dense by the recipe")
            if plain is not None and (has_hooks(plain) or (plain is not module and rule and rule.kind != "chooses")):
                raise Dense("it has hooks, which expect the source's maps and weights")
            if module is not None and str(node.target) in self.lent:
                raise Dense("its weights are read elsewhere too")
            if rule is None:
                raise Dense(f"no rule for {describe(node, module)}")
            operator = find_operator(settings.operator)
            if rule.kind == "chooses" and module is not None and not operator.bands:
                return self._take(op, operator)
            value = rule.flow(op, self.classes)
            if plain is not module:
                self.classes.note(f"plain from now on, with the weights that {' '.join(computed_by(module))} gives now")  # pyright: ignore
        except Dense as refusal:
            self.dense[node] = str(refusal)
            self._want_dense(maps)
            if writes_in_place(node):  # to the source's tensor, which a merged copy is not
                for written in maps_in([self.values[source] for source in chain_of_views(node)]):
                    self.classes.pin(written.ids, f"{describe(node, module)} writes to it in place")
            return _plain(value_of(node))
        self._tie_calls(node, maps, maps_in(value))
        return value

    def _as_largest(self, node: fx.Node, settings: Settings) -> Settings:
        """Weights used on maps of several sizes (a head on a pyramid) have one layout: the largest map decides."""
        calls = self.by_target.get(str(node.target), []) if node.op == "call_module" else []
        sizes = [_size(call) for call in calls]
        return replace(settings, min_size=1) if sizes and _size(node) < max(sizes) else settings

    def _take(self, op: Op, operator: Operator) -> Any:
        """A layer for an operator on dense maps; all calls of one module go the way of the first."""
        target = str(op.node.target)
        if target not in self.refusals:
            self.refusals[target] = operator.refuse(op)
        if self.refusals[target]:
            raise Dense(self.refusals[target])
        self.taken[op.node] = operator
        self._want_dense(op.maps)
        return _plain(value_of(op.node))

    def _inputs(self, node: fx.Node) -> list[Any]:
        return [self.values[source] for source in node.all_input_nodes]

    def _want_dense(self, values: list[Any]) -> None:
        for found in maps_in(values):
            self.classes.want_dense(found.ids)

    def _tie_calls(self, node: fx.Node, reads: list[Map], gives: list[Map]) -> None:
        """A module called twice has one set of weights, so all its calls share their layouts."""
        module = self.trace.module_of(node)
        if module is None or not _has_weights(module):
            return
        before = self.calls.setdefault(str(node.target), (reads, gives))
        for old, new in ((before[0], reads), (before[1], gives)):
            for first, second in zip(old, new, strict=False):
                if first is not second:
                    self.classes.tie(first.ids, second.ids)

    def _settings(self, node: fx.Node, module: Any) -> Settings:
        path = f"{self.prefix}{node.target}" if module is not None else ""
        settings = self.recipe.settings_for(path, type(module).__name__ if module is not None else "")
        self.settings[node.name] = settings
        return settings

    def decide(self, node: fx.Node) -> PlanOp:
        """The decision about one node, once the bits are chosen."""
        module = self.trace.module_of(node)
        rule = self.rules.get(node)
        reads = [
            self._layout(found)
            for found in maps_in([self.values[source] for source in nodes_in((node.args, node.kwargs))])
        ]
        gives = [self._layout(found) for found in maps_in(self.values[node])]
        has_maps = bool(reads or gives) or node in self.dense or node in self.taken
        kind = "plain" if not has_maps or makes_record(node) else "opaque" if rule is None else rule.kind
        form = self._form(node, rule, reads, gives)
        options: dict[str, Any] = {}
        notes = list(self.classes.notes_of(node.name)) if form != "dense" else []
        if node in self.taken:
            options = self.taken[node].options(self.ops[node], f"{self.prefix}{node.target}")
        if rule is not None and form == "octave":
            options, more = rule.options(self.ops[node], reads, gives)
            notes += more
        reason = self.dense.get(node, "")
        if form == "dense" and not reason and kind == "chooses":
            reason = self.classes.reason(node.name) or NO_OCTAVE
        return PlanOp(
            node.name,
            _target(node),
            type(module).__name__ if module is not None else node.op.removeprefix("call_"),
            kind,
            form,
            tuple(map(str, reads)),
            tuple(map(str, gives)),
            reason,
            tuple(dict.fromkeys(notes)),
            options,
            self.settings[node.name].source if node in self.ops else "",
        )

    def _form(self, node: fx.Node, rule: Rule | None, reads: list[Layout], gives: list[Layout]) -> str:
        if node in self.taken:
            return self.taken[node].name
        if rule is None or node in self.dense or node not in self.ops or not self.classes.splits:
            return "dense"
        if not rule.changes(self.ops[node], reads, gives):
            return "dense"
        return "octave" if rule.kind == "chooses" else "bands"

    def _layout(self, found: Map) -> Layout:
        return self.classes.layout(found.ids)


def _has_weights(module: Any) -> bool:
    return any(True for _ in tensors_of(module))


def makes_record(node: fx.Node) -> bool:
    """Whether a node only puts values into a dataclass or a dictionary of a kind of its own."""
    return node.op == "call_function" and isinstance(node.target, type)


def _size(node: fx.Node) -> int:
    """How many elements a node's tensor has."""
    value = value_of(node)
    return value.numel() if isinstance(value, Tensor) else 0


def _plain(value: Any, *, image: bool = False) -> Any:
    if isinstance(value, Tensor):
        return Plain(tuple(value.shape), image and value.dim() > 2)  # a vector is none
    if isinstance(value, (tuple, list)):
        return type(value)(_plain(item, image=image) for item in value) if type(value) in (tuple, list) else value  # pyright: ignore
    return value


def _target(node: fx.Node) -> str:
    if isinstance(node.target, str):
        return node.target
    return getattr(node.target, "__name__", str(node.target))


def describe(node: fx.Node, module: object) -> str:
    """What a node is, for messages: the module's type, the function's name or the method's."""
    if isinstance(module, ModeCall):
        return f"function {module.extra_repr()}"
    if module is not None:
        return type(module).__name__
    return f"{'method ' if node.op == 'call_method' else 'function '}{_target(node)}"
