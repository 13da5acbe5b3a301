"""Layers that a forward calls as functions on its tensors: `F.conv2d(x, self.weight, ...)`, and frozen norms.

In a trace each is a module beside its tensors, planned, rewritten and fitted as any of its kind. What stays dense
becomes the function on the source's tensors again.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torchvision.ops import FrozenBatchNorm2d

from octify.graph import get_attribute, get_module, nodes_in, set_module, shape_of, value_of

Options = Mapping[str, Any]


@dataclass(frozen=True)
class _Kind:
    """A function's arguments by name, which of them are tensors of its own, and the module that does the same."""

    place: str  # before the weight's own name
    names: tuple[str, ...]
    own: tuple[str, ...]
    fits: Callable[[fx.Node, Mapping[str, Tensor], Options], bool]
    make: Callable[[Mapping[str, Tensor], Options], nn.Module]

    @property
    def options(self) -> tuple[str, ...]:
        """The arguments that are no tensors."""
        return tuple(name for name in self.names if name not in ("input", *self.own))


def _convolution(layer: type[nn.Module]) -> _Kind:
    def make(own: Mapping[str, Tensor], options: Options) -> nn.Module:
        weight, groups = own["weight"], options.get("groups", 1)
        sizes = (weight.shape[1] * groups, weight.shape[0], tuple(weight.shape[2:]))
        return layer(*sizes, bias="bias" in own, device="meta", **options)

    names = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
    return _Kind("octify_conv", names, ("weight", "bias"), lambda node, own, _: _are(own, nn.Parameter), make)


def _are(own: Mapping[str, Tensor], kind: type[Tensor]) -> bool:
    return all(type(tensor) is kind for tensor in own.values())


def _is_frozen_norm(node: fx.Node, own: Mapping[str, Tensor], options: Options) -> bool:
    """With fixed statistics and gains, on a batch of maps of two axes."""
    fixed = options.get("training", False) is False and len(own) == 4 and _are(own, Tensor)
    return fixed and len(shape_of(value_of(node)) or ()) == 4


def _frozen_norm(own: Mapping[str, Tensor], options: Options) -> nn.Module:
    return FrozenBatchNorm2d(len(own["weight"]), options.get("eps", 1e-5))


STATISTICS = ("running_mean", "running_var", "weight", "bias")
NORM = _Kind(
    "octify_norm", ("input", *STATISTICS, "training", "momentum", "eps"), STATISTICS, _is_frozen_norm, _frozen_norm
)
CONVOLUTIONS: dict[Any, _Kind] = {
    torch.conv1d: _convolution(nn.Conv1d),
    torch.conv2d: _convolution(nn.Conv2d),
    torch.conv3d: _convolution(nn.Conv3d),
}
KINDS: dict[Any, _Kind] = {**CONVOLUTIONS, F.batch_norm: NORM}


@dataclass(frozen=True)
class FunctionCall:
    """The function that a module stands for, its options, and where its tensors lie."""

    function: Any
    options: Options
    homes: Mapping[str, str]

    @property
    def path(self) -> str:
        """Where its module lies: beside the weight."""
        owner, _, name = self.homes["weight"].rpartition(".")
        return f"{owner}.{KINDS[self.function].place}_{name}".lstrip(".")

    def emit(self, graph: fx.Graph, x: Any, name: str) -> fx.Node:
        """The call as the source has it, under the name of the trace's node."""
        own = {role: graph.get_attr(home) for role, home in self.homes.items()}
        return graph.create_node("call_function", self.function, (x,), {**own, **self.options}, name=name)

    def make(self, root: nn.Module) -> nn.Module:
        """The module, over the source's own tensors."""
        own: dict[str, Tensor] = {role: get_attribute(root, home) for role, home in self.homes.items()}
        layer = KINDS[self.function].make(own, self.options)
        for role, tensor in own.items():
            setattr(layer, role, tensor)
        return layer.train(root.training)


def take_functions(graph: fx.Graph, root: nn.Module) -> dict[str, FunctionCall]:
    """Puts modules of `root` in the places of function calls; gives the calls by the modules' paths.

    The nodes must hold their values.
    """
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
        set_module(root, call.path, call.make(root))
        for node, _ in calls[home]:
            x = node.args[0] if node.args else node.kwargs["input"]
            node.op, node.target, node.args, node.kwargs = "call_module", call.path, (x,), {}
        found[call.path] = call
    for node in [node for node in graph.nodes if node.op == "get_attr" and not node.users]:
        graph.erase_node(node)
    return found


def _lies_in(path: str, modules: Collection[str]) -> bool:
    """Whether a parameter belongs to one of some modules, or to a part of one."""
    parts = path.split(".")
    return any(".".join(parts[:depth]) in modules for depth in range(1, len(parts)))


def _read(node: fx.Node, root: nn.Module) -> FunctionCall | None:
    """A layer's call on tensors of the model, with options that are no symbols; None of anything else."""
    kind = KINDS.get(node.target) if node.op == "call_function" else None
    if kind is None:
        return None
    given: dict[str, Any] = dict(zip(kind.names, node.args, strict=False)) | node.kwargs
    options = {name: given[name] for name in kind.options if name in given}
    sources = {role: given[role] for role in kind.own if given.get(role) is not None}
    if nodes_in(options) or not all(isinstance(n, fx.Node) and n.op == "get_attr" for n in sources.values()):
        return None
    homes = {role: str(source.target) for role, source in sources.items()}
    own = {role: get_attribute(root, home) for role, home in homes.items()}
    return FunctionCall(node.target, options, homes) if kind.fits(node, own, options) else None


def drop_stand_ins(root: nn.Module, calls: Mapping[str, FunctionCall], replaced: Collection[str]) -> None:
    """Of each module and the tensors that it stands for, leaves what is used: the tensors where it is dense."""
    for path, call in calls.items():
        for idle in call.homes.values() if path in replaced else (path,):
            owner, _, name = idle.rpartition(".")
            delattr(get_module(root, owner), name)
