"""Train and eval traces of one model → one graph that serves both modes."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any, cast

import torch
from torch import fx, nn

from octify.graph import map_nodes, set_module, writes_in_place
from octify.ops import same_branch_


class ModeCall(nn.Module):
    """Calls a function whose boolean arguments say whether the module is training (`F.dropout(x, training=...)`)."""

    def __init__(self, function: Any, positions: tuple[int, ...], names: tuple[str, ...]) -> None:
        super().__init__()
        self.function = function
        self.positions = positions
        self.names = names

    def extra_repr(self) -> str:
        """The function's name."""
        return getattr(self.function, "__name__", str(self.function))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The function's result with the mode in its place."""
        given = [self.training if index in self.positions else value for index, value in enumerate(args)]
        named = {name: self.training if name in self.names else value for name, value in kwargs.items()}
        return self.function(*given, **named)


def join_modes(train: fx.Graph, evaluate: fx.Graph, model: nn.Module) -> tuple[fx.Graph, bool]:
    """Gives the train graph with whatever the eval graph adds, and whether the two return or write different things.

    Where they differ, the output node's argument is the pair (train output, eval output), and what only one mode writes
    says so. Functions that differ only by a boolean argument become `ModeCall` modules under `model`, in a child named
    `octify_modes`.
    """
    partner: dict[fx.Node, fx.Node] = {}
    flags: dict[fx.Node, list[int | str]] = {}
    available = [node for node in train.nodes if node.op != "output"]
    start = 0
    added: list[fx.Node] = []
    output = _output(train)
    for node in evaluate.nodes:
        if node.op == "output":
            continue
        found = _find(node, available, start, partner)
        if found is None:
            with train.inserting_before(output):
                partner[node] = train.node_copy(node, lambda source: partner[source])
            added.append(partner[node])
            continue
        index, differing = found
        partner[node] = available[index]
        start = index + 1
        if differing:
            flags[available[index]] = differing
    _use_mode_calls(train, flags, model)
    wanted = map_nodes(_output(evaluate).args[0], lambda source: partner[source])
    once = _mark(set(available).difference(partner.values()), "train") + _mark(added, "eval")
    if _same(output.args[0], wanted) and not once:
        return train, False
    output.args = ((output.args[0], wanted),)  # pyright: ignore
    return train, True


def _mark(nodes: Iterable[fx.Node], mode: str) -> int:
    """Says of what writes that only one mode does; returns how many there are."""
    found = [node for node in nodes if writes_in_place(node) and node.target is not same_branch_]
    for node in found:
        node.meta["mode"] = mode
    return len(found)


def _output(graph: fx.Graph) -> fx.Node:
    return next(node for node in reversed(graph.nodes) if node.op == "output")


def _same(first: object, second: object) -> bool:
    return first is second or (not isinstance(first, fx.Node) and type(first) is type(second) and first == second)


def _find(
    node: fx.Node, available: list[fx.Node], start: int, partner: dict[fx.Node, fx.Node]
) -> tuple[int, list[int | str]] | None:
    args = cast("tuple[Any, ...]", map_nodes(node.args, lambda source: partner[source]))
    kwargs = cast("dict[str, Any]", map_nodes(node.kwargs, lambda source: partner[source]))
    for index in range(start, len(available)):
        other = available[index]
        if other.op != node.op or other.target != node.target:
            continue
        differing = _differing_flags(other, args, kwargs)
        if differing is not None:
            return index, differing
    return None


def _differing_flags(train: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[int | str] | None:
    """Where (True in train, False in eval) stands; None if anything else differs."""
    if len(train.args) != len(args) or set(train.kwargs) != set(kwargs):
        return None
    pairs: list[tuple[int | str, Any, Any]] = [(i, a, b) for i, (a, b) in enumerate(zip(train.args, args, strict=True))]
    pairs += [(name, train.kwargs[name], kwargs[name]) for name in kwargs]
    differing = [(where, a, b) for where, a, b in pairs if not _equal(a, b)]
    if all(a is True and b is False and train.op == "call_function" for _, a, b in differing):
        return [where for where, _, _ in differing]
    return None


def _equal(first: Any, second: Any) -> bool:
    if isinstance(first, fx.Node) or isinstance(second, fx.Node) or isinstance(first, torch.Tensor):
        return first is second
    if type(first) is not type(second):
        return False
    if isinstance(first, slice):
        return _equal(_bounds(first), _bounds(second))
    if isinstance(first, (tuple, list)):
        pairs: list[tuple[Any, Any]] = list(zip(first, second, strict=False))  # pyright: ignore
        return len(pairs) == len(second) == len(first) and all(_equal(a, b) for a, b in pairs)  # pyright: ignore
    return bool(first == second)


def _bounds(part: Any) -> tuple[Any, Any, Any]:
    return part.start, part.stop, part.step


def _use_mode_calls(graph: fx.Graph, flags: dict[fx.Node, list[int | str]], model: nn.Module) -> None:
    for count, (node, where) in enumerate(flags.items()):
        positions = tuple(index for index in where if isinstance(index, int))
        names = tuple(name for name in where if isinstance(name, str))
        set_module(model, f"octify_modes.{count}", ModeCall(node.target, positions, names))
        node.op = "call_module"
        node.target = f"octify_modes.{count}"
    if flags:
        model.get_submodule("octify_modes").train(model.training)


def graph_of_mode(graph: fx.Graph, *, training: bool) -> fx.Graph:
    """The part of a graph with outputs of both modes that one of them needs."""
    copied = copy.deepcopy(graph)
    output = next(node for node in reversed(copied.nodes) if node.op == "output")
    train, evaluate = cast("tuple[Any, Any]", output.args[0])
    output.args = (train if training else evaluate,)
    for node in reversed(list(copied.nodes)):
        counts = writes_in_place(node) and node.meta.get("mode") != ("eval" if training else "train")
        if not node.users and node.op not in ("output", "placeholder") and not counts:
            copied.erase_node(node)
    return copied
