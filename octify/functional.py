"""Convolutions that a forward calls as functions on its parameters: `F.conv2d(x, self.weight, self.bias, ...)`.

In a trace each is a module beside its parameters, planned, rewritten and fitted as any convolution. What stays dense
becomes the function on the source's parameters again.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from octify.graph import get_attribute, get_module, nodes_in, set_module

KINDS: dict[Any, type[nn.Module]] = {torch.conv1d: nn.Conv1d, torch.conv2d: nn.Conv2d, torch.conv3d: nn.Conv3d}
NAMES = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
PLACE = "octify_conv"  # before the weight's own name


@dataclass(frozen=True)
class FunctionCall:
    """The function that a module stands for, its options, and where its parameters lie."""

    function: Any
    options: Mapping[str, Any]
    homes: Mapping[str, str]

    def emit(self, graph: fx.Graph, x: Any) -> fx.Node:
        """The call as the source has it."""
        own = {role: graph.get_attr(home) for role, home in self.homes.items()}
        return graph.call_function(self.function, (x,), {**own, **self.options})

    def make(self, root: nn.Module) -> nn.Module:
        """A convolution over the source's own parameters."""
        own: dict[str, Tensor] = {role: get_attribute(root, home) for role, home in self.homes.items()}
        weight, groups = own["weight"], self.options.get("groups", 1)
        sizes = (weight.shape[1] * groups, weight.shape[0], tuple(weight.shape[2:]))
        conv = KINDS[self.function](*sizes, bias="bias" in own, device="meta", **self.options)
        for role, tensor in own.items():
            setattr(conv, role, tensor)
        return conv.train(root.training)


def take_functions(graph: fx.Graph, root: nn.Module) -> dict[str, FunctionCall]:
    """Puts modules of `root` in the places of function calls; gives the calls by the modules' paths."""
    uses = Counter(str(node.target) for node in graph.nodes if node.op == "get_attr" for _ in node.users)
    called = {str(node.target) for node in graph.nodes if node.op == "call_module"}
    calls: dict[str, list[tuple[fx.Node, FunctionCall]]] = defaultdict(list)
    for node in graph.nodes:
        if (call := _read(node, root)) is not None:
            calls[call.homes["weight"]].append((node, call))
    found: dict[str, FunctionCall] = {}
    for home, (*several, (_, call)) in calls.items():
        alike = all(other == call for _, other in several)
        lent = any(uses[path] != len(several) + 1 or _lies_in(path, called) for path in call.homes.values())
        if not alike or lent:
            continue  # a module has one geometry, and its weights to itself
        owner, _, name = home.rpartition(".")
        path = f"{owner}.{PLACE}_{name}" if owner else f"{PLACE}_{name}"
        set_module(root, path, call.make(root))
        for node, _ in calls[home]:
            x = node.args[0] if node.args else node.kwargs["input"]
            node.op, node.target, node.args, node.kwargs = "call_module", path, (x,), {}
        found[path] = call
    for node in [node for node in graph.nodes if node.op == "get_attr" and not node.users]:
        graph.erase_node(node)
    return found


def _lies_in(path: str, modules: Collection[str]) -> bool:
    """Whether a parameter belongs to one of some modules, or to a part of one."""
    parts = path.split(".")
    return any(".".join(parts[:depth]) in modules for depth in range(1, len(parts)))


def _read(node: fx.Node, root: nn.Module) -> FunctionCall | None:
    """A convolution on parameters, with options that are no symbols; None of anything else."""
    given: dict[str, Any] = dict(zip(NAMES, node.args, strict=False)) | node.kwargs
    if node.op != "call_function" or node.target not in KINDS or nodes_in([given.get(name) for name in NAMES[3:]]):
        return None
    own = {role: given[role] for role in ("weight", "bias") if given.get(role) is not None}
    if not all(isinstance(value, fx.Node) and value.op == "get_attr" for value in own.values()):
        return None
    homes = {role: str(value.target) for role, value in own.items()}
    if not all(isinstance(get_attribute(root, home), nn.Parameter) for home in homes.values()):
        return None
    return FunctionCall(node.target, {name: given[name] for name in NAMES[3:] if name in given}, homes)


def drop_stand_ins(root: nn.Module, calls: Mapping[str, FunctionCall], replaced: Mapping[str, Any]) -> None:
    """Of each module and the parameters that it stands for, leaves what is used: the parameters where it is dense."""
    for path, call in calls.items():
        for idle in call.homes.values() if path in replaced else (path,):
            owner, _, name = idle.rpartition(".")
            delattr(get_module(root, owner), name)
