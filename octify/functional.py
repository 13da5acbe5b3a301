"""Layers that a forward calls as functions on its tensors: `F.conv2d(x, self.weight, ...)`, and frozen norms.

In a trace each is a module beside its tensors, planned, rewritten and fitted as any of its kind. What stays dense
becomes the function on the source's tensors again.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.ops import FrozenBatchNorm2d

from octify.graph import get_attribute, get_module, map_nodes, nodes_in, set_module, shape_of, value_of

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
    return _Kind("octify_conv", names, ("weight", "bias"), _is_plain, make)


def _transposed(layer: type[nn.Module]) -> _Kind:
    def make(own: Mapping[str, Tensor], options: Options) -> nn.Module:
        weight = own["weight"]
        sizes = (weight.shape[0], weight.shape[1] * options.get("groups", 1), tuple(weight.shape[2:]))
        return layer(*sizes, bias="bias" in own, device="meta", **options)

    names = ("input", "weight", "bias", "stride", "padding", "output_padding", "groups", "dilation")
    return _Kind("octify_conv", names, ("weight", "bias"), _is_plain, make)


def _is_plain(_: fx.Node, own: Mapping[str, Tensor], __: Options) -> bool:
    """Whether a convolution's tensors are ordinary ones; filters that nothing learns are, too."""
    return all(type(tensor) in (Tensor, nn.Parameter) and tensor.is_floating_point() for tensor in own.values())


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
    torch.conv_transpose1d: _transposed(nn.ConvTranspose1d),
    torch.conv_transpose2d: _transposed(nn.ConvTranspose2d),
    torch.conv_transpose3d: _transposed(nn.ConvTranspose3d),
}
KINDS: dict[Any, _Kind] = {**CONVOLUTIONS, F.batch_norm: NORM}


@dataclass(frozen=True)
class OwnTensor:
    """One of a layer's tensors: how it is made of the model's, most often as one of them as it is.

    `code` says the same as `graph`, and can be compared. `asked` are the types and devices of other tensors (as in
    `weight.to(x.dtype)`) that the graph takes.
    """

    homes: tuple[str, ...]
    code: str
    graph: fx.Graph = field(compare=False)
    asked: tuple[fx.Node, ...] = field(compare=False)

    @classmethod
    def of(cls, source: fx.Node) -> OwnTensor | None:
        """What a node computes of the model's tensors alone; None if it needs anything else."""
        nodes = _made_of(source)
        if not nodes:
            return None
        homes = dict.fromkeys(str(node.target) for node in nodes if node.op == "get_attr")
        graph = fx.Graph()
        asked = tuple(dict.fromkeys(other for node in nodes for other in node.all_input_nodes if _is_question(other)))
        copies = {node: graph.placeholder(f"asked_{index}") for index, node in enumerate(asked)}
        for node in nodes:  # under names of its own, so that equal computations read the same
            args, kwargs = (map_nodes(given, copies.__getitem__) for given in (node.args, node.kwargs))
            copies[node] = graph.create_node(node.op, node.target, args, kwargs)
        graph.output(copies[source])
        return cls(tuple(homes), str(graph), graph, asked)

    @property
    def is_computed(self) -> bool:
        """Whether the forward computes it."""
        return len(self.graph.nodes) > 2

    def emit(self, graph: fx.Graph, rest: Callable[[fx.Node], Any]) -> Any:
        """The same computation in another graph, where `rest` gives what stands for a node of the trace."""
        places = (node for node in self.graph.nodes if node.op == "placeholder")
        return graph.graph_copy(self.graph, {place: rest(node) for place, node in zip(places, self.asked, strict=True)})

    @torch.no_grad()
    def value(self, root: nn.Module) -> Tensor:
        """The tensor as it is now.

        Raises:
            _Impure: its computation draws random numbers, or writes.
        """
        held: list[Tensor] = [get_attribute(root, home) for home in self.homes]
        if not self.is_computed:
            return held[0]
        answers = (held[0].device if node.args[1] == "device" else value_of(node) for node in self.asked)
        with _Pure():
            found: Tensor = fx.Interpreter(root, graph=self.graph).run(*answers)
        learnt = [tensor for tensor in held if isinstance(tensor, nn.Parameter)]
        return nn.Parameter(found, any(tensor.requires_grad for tensor in learnt)) if learnt else found


def _made_of(source: fx.Node) -> list[fx.Node]:
    """A node behind all that it is computed from, in the order of execution; nothing if not of tensors of the model."""
    found, todo = {source}, [source]
    while todo:
        node = todo.pop()
        if node.op != "get_attr" and not (node.op in ("call_function", "call_method") and node.all_input_nodes):
            return []
        todo += [other for other in node.all_input_nodes if other not in found and not _is_question(other)]
        found.update(todo)
    return [node for node in source.graph.nodes if node in found] if len(found) > 1 else [source]


def _is_question(node: fx.Node) -> bool:
    """Whether a node asks for a tensor's type or device."""
    return node.target is getattr and node.args[1] in ("dtype", "device")


class _Impure(Exception):
    """What is computed would not be the same twice."""


class _Pure(TorchDispatchMode):
    """Refuses operations that draw random numbers or write."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._schema.is_mutable or torch.Tag.nondeterministic_seeded in func.tags:
            raise _Impure(str(func))
        return func(*args, **(kwargs or {}))


@dataclass(frozen=True)
class FunctionCall:
    """The function that a module stands for, its options, and its tensors by their roles."""

    function: Any
    options: Options
    own: Mapping[str, OwnTensor]

    @property
    def path(self) -> str:
        """Where its module lies: beside the weight."""
        owner, _, name = self.own["weight"].homes[0].rpartition(".")
        return f"{owner}.{KINDS[self.function].place}_{name}".lstrip(".")

    @property
    def homes(self) -> list[str]:
        """Where all its tensors lie, or what they are computed from."""
        return list(dict.fromkeys(home for tensor in self.own.values() for home in tensor.homes))

    @property
    def computed(self) -> list[str]:
        """The tensors that the forward computes."""
        return [role for role, tensor in self.own.items() if tensor.is_computed]

    def emit(self, graph: fx.Graph, x: Any, name: str, rest: Callable[[fx.Node], Any]) -> fx.Node:
        """The call as the source has it, under the name of the trace's node."""
        own = {role: tensor.emit(graph, rest) for role, tensor in self.own.items()}
        return graph.create_node("call_function", self.function, (x,), {**own, **self.options}, name=name)

    def make(self, root: nn.Module) -> nn.Module:
        """The module, over the source's own tensors, or over what is computed of them now."""
        own = {role: tensor.value(root) for role, tensor in self.own.items()}
        layer = KINDS[self.function].make(own, self.options)
        for role, tensor in own.items():
            learns = isinstance(tensor, nn.Parameter) or role in layer._buffers  # pyright: ignore[reportPrivateUsage]
            setattr(layer, role, tensor if learns else nn.Parameter(tensor, requires_grad=False))
        return layer.train(root.training)


def take_functions(graph: fx.Graph, root: nn.Module) -> dict[str, FunctionCall]:
    """Puts modules of `root` in the places of function calls; gives the calls by the modules' paths.

    The nodes must hold their values.
    """
    names = _names(root)
    for node in reversed(graph.nodes):
        if not node.users and node.op == "call_method" and node.target in ("size", "dim"):
            graph.erase_node(node)  # what reads a weight's size into a number leaves it behind
    readers: dict[str, set[fx.Node]] = defaultdict(set)
    for node in graph.nodes:
        if node.op == "get_attr":
            readers[str(node.target)].update(node.users)
    called = {str(node.target) for node in graph.nodes if node.op == "call_module"}
    calls: dict[str, list[tuple[fx.Node, FunctionCall]]] = defaultdict(list)
    for node in graph.nodes:
        if (call := _read(node, root)) is not None:
            calls[call.path].append((node, call))
    found: dict[str, FunctionCall] = {}
    idle: set[fx.Node] = set()
    for path, ((first, call), *others) in calls.items():
        nodes = [first, *(node for node, _ in others)]
        inside = {made for node in nodes for source in node.all_input_nodes for made in _made_of(source)}
        alike = all(other == call for _, other in others)
        mine = {*inside, *nodes}
        lent = any(not set(made.users) <= mine for made in inside)  # written in place, perhaps
        lent = lent or any(not readers[name] <= mine or _lies_in(name, called) for name in _known_as(call, names, root))
        if not alike or lent:
            continue  # a module has one geometry, and its weights to itself
        set_module(root, path, call.make(root))
        for node in nodes:
            x = node.args[0] if node.args else node.kwargs["input"]
            node.op, node.target, node.args, node.kwargs = "call_module", path, (x,), {}
        found[path] = call
        idle |= inside
    for node in reversed(list(graph.nodes)):
        if not node.users and (node in idle or node.op == "get_attr"):
            graph.erase_node(node)
    return found


def _names(root: nn.Module) -> dict[int, list[str]]:
    """What each of a model's tensors is called; one that is tied has several names."""
    found: dict[int, list[str]] = defaultdict(list)
    for list_of in (root.named_parameters, root.named_buffers):
        for name, tensor in list_of(remove_duplicate=False):
            found[id(tensor)].append(name)
    return found


def _known_as(call: FunctionCall, names: Mapping[int, list[str]], root: nn.Module) -> list[str]:
    """All names of a call's tensors."""
    return [name for home in call.homes for name in names.get(id(get_attribute(root, home)), [home])]


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
    if isinstance(options.get("groups"), fx.Node):
        options["groups"] = value_of(options["groups"])  # a number of channels, which no input changes
    sources = {role: given[role] for role in kind.own if given.get(role) is not None}
    if nodes_in(options) or not all(isinstance(source, fx.Node) for source in sources.values()):
        return None
    tensors = {role: OwnTensor.of(source) for role, source in sources.items()}
    own = {role: tensor for role, tensor in tensors.items() if tensor is not None}
    if len(own) < len(tensors):
        return None
    try:
        values = {role: tensor.value(root) for role, tensor in own.items()}
    except _Impure:
        return None
    return FunctionCall(node.target, options, own) if kind.fits(node, values, options) else None


def drop_stand_ins(root: nn.Module, calls: Mapping[str, FunctionCall], replaced: Collection[str]) -> None:
    """Of each module and the tensors that it stands for, leaves what is used: the tensors where it is dense."""
    names = _names(root)
    for path in calls:
        if path not in replaced:
            owner, _, name = path.rpartition(".")
            delattr(get_module(root, owner), name)
    for path, call in calls.items():
        for idle in _known_as(call, names, root) if path in replaced else ():
            _forget(root, idle)


def _forget(root: nn.Module, path: str) -> None:
    """Leaves nothing of a tensor but its name, which its module may ask for when it is printed."""
    owner, _, name = path.rpartition(".")
    home: Any = get_module(root, owner)
    for kept in (home._parameters, home._buffers):
        if name in kept:
            kept[name] = None
            return
    if name in vars(home):
        delattr(home, name)
