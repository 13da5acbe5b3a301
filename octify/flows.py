"""A trace and a recipe → what flows where: every value's axes and channel classes, tied by the operations' rules."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from typing import Any

from torch import Tensor, fx

from octify.functional import CONVOLUTIONS
from octify.graph import chain_of_views, has_hooks, nodes_in, tensors_of, value_of, writes_in_place
from octify.layout import Layout
from octify.modes import ModeCall
from octify.operators import Operator, check_operators, find_operator
from octify.recipe import Recipe, Settings
from octify.reparametrized import computed_by, settled
from octify.rules import rule_for
from octify.rules.base import Dense, Map, Op, Plain, Rule, maps_in
from octify.ties import Classes
from octify.trace import Trace

# What a rule may run into where a network uses an operation as none was seen to. The tests let it through.
FAULTS: tuple[type[Exception], ...] = (IndexError, KeyError, TypeError, ValueError, AttributeError)


def asks_for_change(settings: Settings) -> bool:
    """Whether a layer with these settings shall be anything but dense."""
    return find_operator(settings.operator).asks(settings)


class Flows:
    """What flows where: every rule's `flow` run over a trace.

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
            image = node.target not in CONVOLUTIONS and any(
                isinstance(v, Plain) and v.image for v in self._inputs(node)
            )
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
            value = self._flow(rule, op)
            if computes := self._computes(node, module):
                self.classes.note(f"plain from now on, with the weights that {computes} gives now")
        except Dense as refusal:
            self.dense[node] = str(refusal)
            self._want_dense(maps)
            if writes_in_place(node):  # to the source's tensor, which a merged copy is not
                for written in maps_in([self.values[source] for source in chain_of_views(node)]):
                    self.classes.pin(written.ids, f"{describe(node, module)} writes to it in place")
            return _plain(value_of(node))
        self._tie_calls(node, maps, maps_in(value))
        return value

    def _computes(self, node: fx.Node, module: Any) -> str:
        """What computes a layer's weights whenever it runs, if anything does."""
        if module is None:
            return ""
        call = self.trace.functions.get(str(node.target))
        return "the forward" if call is not None and call.computed else " ".join(computed_by(module))

    def _flow(self, rule: Rule, op: Op) -> Any:
        """What a rule says; a use that it does not foresee is left dense and named, as one without a rule."""
        try:
            return rule.flow(op, self.classes)
        except FAULTS as fault:
            raise Dense(f"its rule failed, please report this ({type(fault).__name__}: {fault})") from fault

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
        if bool(before[0]) != bool(reads):
            for found in (*before[0], *reads):
                self.classes.pin(found.ids, "its reader reads a dense map as well")
            self.calls[str(node.target)] = (before[0] or reads, before[1])
        for old, new in ((before[0], reads), (before[1], gives)):
            for first, second in zip(old, new, strict=False):
                if first is not second:
                    self.classes.tie(first.ids, second.ids)

    def _settings(self, node: fx.Node, module: Any) -> Settings:
        path = f"{self.prefix}{node.target}" if module is not None else ""
        settings = self.recipe.settings_for(path, type(module).__name__ if module is not None else "")
        self.settings[node.name] = settings
        return settings

    def layout(self, found: Map) -> Layout:
        """A map's layout, once the bits are chosen."""
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


def target_of(node: fx.Node) -> str:
    if isinstance(node.target, str):
        return node.target
    return getattr(node.target, "__name__", str(node.target))


def describe(node: fx.Node, module: object) -> str:
    """What a node is, for messages: the module's type, the function's name or the method's."""
    if isinstance(module, ModeCall):
        return f"function {module.extra_repr()}"
    if module is not None:
        return type(module).__name__
    return f"{'method ' if node.op == 'call_method' else 'function '}{target_of(node)}"
