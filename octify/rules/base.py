"""What a rule is: how one kind of operation ties channels (`flow`) and how it runs on bands (`emit`).

A rule inserts nothing and chooses nothing. The plan ties channels by the rules' flows, and the rewrite brings every
input into the layout that the plan says before it calls `emit`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import fx, nn

from octify.graph import map_nodes, shape_of, value_of
from octify.layout import Layout
from octify.recipe import Settings

Ids = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Map:
    """A feature map while planning: which channel classes it holds, and which axes are channels and which are halved.

    `ids` has the shape of the channel axes (two axes inside a channel shuffle, say). Axes count from 0.
    A dense tensor that nothing is known about is a `Plain` instead: whoever joins it with a map splits it.
    """

    shape: tuple[int, ...]
    ids: Ids
    channel: tuple[int, ...]
    spatial: tuple[int, ...]

    @property
    def size(self) -> tuple[int, ...]:
        """The lengths of the axes that are halved."""
        return tuple(self.shape[axis] for axis in self.spatial)

    @property
    def is_plain(self) -> bool:
        """Whether it is channels-first with one channel axis and trailing spatial axes, as modules expect."""
        rank = len(self.shape)
        return self.channel == (1,) and self.spatial == tuple(range(rank - len(self.spatial), rank))

    def with_ids(self, ids: Ids, shape: tuple[int, ...]) -> Map:
        """The same axes with other channels and another shape."""
        return Map(shape, ids, self.channel, self.spatial)


@dataclass(frozen=True, eq=False)
class Plain:
    """A dense tensor while planning; `image` says that no convolution has touched it yet."""

    shape: tuple[int, ...]
    image: bool = False


class Ties(Protocol):
    """Where rules say which channels are the same channel; the plan implements it."""

    def free(self, count: int) -> Ids:
        """New channels of this operation's making, which may be chosen high or low."""
        ...

    def follow(self, count: int) -> Ids:
        """New channels without a writer of their own, high unless they are tied to low ones."""
        ...

    def high(self, count: int, why: str = "") -> Ids:
        """New channels that must be high, for a reason."""
        ...

    def pin(self, ids: Ids, why: str) -> None:
        """Says that existing channels must be high."""
        ...

    def write(self, ids: Ids) -> None:
        """Says that this operation's alpha has a say in these channels too (a depthwise convolution)."""
        ...

    def tie(self, first: Ids, second: Ids) -> None:
        """Says that two equally long sets are channel by channel the same."""
        ...

    def balance(self, ids: Ids, groups: int) -> None:
        """Asks for the same number of low channels in each of the groups."""
        ...

    def read(self, ids: Ids) -> None:
        """Says that a convolution reads these channels in whatever layout they have."""
        ...

    def close(self, ids: Ids) -> None:
        """Says that a pooling over the whole map reads these channels in whatever layout they have."""
        ...

    def want_dense(self, ids: Ids) -> None:
        """Says that a reader needs these channels as one dense map."""
        ...

    def note(self, text: str) -> None:
        """Adds a line to the plan about the operation at hand."""
        ...


@dataclass(frozen=True)
class Op:
    """One operation of the source: its node, its module if it has one, and its input values while planning."""

    node: fx.Node
    module: nn.Module | None
    values: dict[fx.Node, Any]
    settings: Settings
    dense_stem: bool = False

    @property
    def args(self) -> tuple[Any, ...]:
        """The node's arguments with maps in the places of nodes."""
        return map_nodes(self.node.args, self.value)  # pyright: ignore

    @property
    def kwargs(self) -> dict[str, Any]:
        """The node's keyword arguments with maps in the places of nodes."""
        return map_nodes(self.node.kwargs, self.value)  # pyright: ignore

    def value(self, node: fx.Node) -> Any:
        """A node's map, tuple of maps, or meta value where it is no map."""
        return self.values[node]

    def argument(self, position: int, name: str, default: Any = None) -> Any:
        """An argument by position or name, maps in the places of nodes."""
        if position < len(self.node.args):
            return self.args[position]
        return self.kwargs.get(name, default)

    def concrete(self, position: int, name: str, default: Any = None) -> Any:
        """An argument as it is at the example's size: nodes give their recorded values (numbers, shapes)."""
        raw = self.node.args[position] if position < len(self.node.args) else self.node.kwargs.get(name, default)
        return map_nodes(raw, value_of)  # pyright: ignore

    @property
    def maps(self) -> list[Map]:
        """The maps among the inputs, by position, those inside lists and tuples included."""
        return maps_in((self.args, self.kwargs))

    @property
    def shape(self) -> tuple[int, ...]:
        """The output's shape at the example's size; several tensors (a pool's indices) have none."""
        shape = shape_of(value_of(self.node))
        if shape is None:
            raise Dense("it gives several tensors")
        return shape

    def too_small(self, size: Iterable[int]) -> bool:
        """Whether the low band of a map of this size would be shorter than `min_size`."""
        return any((length + 1) // 2 < self.settings.min_size for length in size)


def maps_in(argument: object) -> list[Map]:
    """All maps of an argument tree, repeats kept."""
    if isinstance(argument, Map):
        return [argument]
    if isinstance(argument, dict):
        return [found for value in argument.values() for found in maps_in(value)]  # pyright: ignore
    if isinstance(argument, (tuple, list)):
        return [found for value in argument for found in maps_in(value)]  # pyright: ignore
    return []


class Dense(Exception):
    """Raised by a `flow`: this use of the operation has no octave form, for the reason given; it stays dense."""


@dataclass(frozen=True, eq=False)
class Bands:
    """An emitted split value: the nodes of its two bands, its layout, and the map that it is in the source.

    The channel axes of a band are flattened into one, at the place of the map's first channel axis.
    """

    high: fx.Node
    low: fx.Node
    layout: Layout
    map: Map


class Build(Protocol):
    """What a rule's `emit` makes nodes with; the rewrite implements it."""

    def value(self, node: fx.Node) -> Any:
        """What was emitted for a source node, in the planned layout: a node, Bands, or a tuple of them."""
        ...

    def bands(self, node: fx.Node, like: Map, layout: Layout) -> Bands:
        """An input as bands of the given layout, split if it is dense."""
        ...

    def dense(self, node: fx.Node) -> fx.Node:
        """An input as one dense tensor, merged if it is split."""
        ...

    def layout(self, found: Map) -> Layout:
        """The planned layout of a map."""
        ...

    def function(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
        """Adds a call of a function."""
        ...

    def method(self, name: str, *args: Any, **kwargs: Any) -> fx.Node:
        """Adds a call of a tensor's method."""
        ...

    def module(self, make: Callable[[], nn.Module], *args: Any, part: str = "", **kwargs: Any) -> fx.Node:
        """Adds a call of a module that takes the place of the source's (or of a child `part` of that place).

        `make` is called once, also when the source calls its module several times.
        """
        ...

    def source_module(self) -> nn.Module:
        """A copy of the source's module."""
        ...

    def pair(self, node: fx.Node) -> tuple[fx.Node, fx.Node]:
        """The two results of a node that gives (high, low)."""
        ...

    def rest(self, argument: Any) -> Any:
        """An argument with emitted nodes in the places of source nodes (shapes, numbers)."""
        ...

    def options(self) -> dict[str, Any]:
        """What the plan says about how to emit this operation."""
        ...


class Rule:
    """How one kind of operation goes through the rewriter; subclasses say `flow` and `emit`."""

    kind: ClassVar[str] = "keeps"
    passes_on: ClassVar[bool] = False  # whether a band may be given as it is where the source makes a copy

    def applies(self, op: Op) -> bool:
        """Whether this use is one that the rule is about; if not, it is treated as an operation without a rule."""
        return True

    def flow(self, op: Op, ties: Ties) -> Any:
        """Ties the channels of inputs and outputs and gives the output's map (or a tuple or list of maps).

        Raises:
            Dense: this use cannot be done on bands; inputs are merged and the output is dense.
        """
        raise NotImplementedError

    def emit(self, op: Op, build: Build) -> Any:
        """Adds the nodes for the bands and gives the emitted value; called only when an input or output is split."""
        raise NotImplementedError

    def changes(self, op: Op, reads: list[Layout], gives: list[Layout]) -> bool:
        """Whether an operation differs from the source's, given the chosen layouts."""
        return any(not layout.is_dense for layout in (*reads, *gives))

    def options(self, op: Op, reads: list[Layout], gives: list[Layout]) -> tuple[dict[str, Any], list[str]]:
        """What the plan records about how to emit an operation that chooses, and notes."""
        return {}, []


MODULES: dict[type[nn.Module], Rule] = {}
FUNCTIONS: dict[Callable[..., Any], Rule] = {}
METHODS: dict[str, Rule] = {}


def register(
    rule: Rule,
    *,
    modules: Iterable[type[nn.Module]] = (),
    functions: Iterable[Callable[..., Any]] = (),
    methods: Iterable[str] = (),
    replace: bool = False,
) -> None:
    """Says which exact types, functions and method names a rule is for.

    Raises:
        ValueError: one of them has a rule already and `replace` is not set.
    """
    for table, keys in ((MODULES, modules), (FUNCTIONS, functions), (METHODS, methods)):
        for key in keys:
            if key in table and not replace:
                raise ValueError(f"{key} has a rule already: {type(table[key]).__name__}")  # pyright: ignore
            table[key] = rule  # pyright: ignore


def rule_of_type(kind: type[nn.Module]) -> Rule | None:
    """The rule of an exact type, or of the base class whose behaviour it inherits without overriding a method."""
    overridden: set[str] = set()
    for cls in kind.__mro__:
        if cls in MODULES:
            changed = {name for name in overridden if name in dir(cls)} - _HARMLESS
            return None if changed else MODULES[cls]
        overridden |= set(vars(cls))
    return None


_HARMLESS = {
    "__init__", "__module__", "__doc__", "__annotations__", "__constants__", "__qualname__", "__dict__",
    "__weakref__", "__parameters__", "__orig_bases__", "__static_attributes__", "__firstlineno__", "__annotate__",
    "__annotate_func__", "__annotations_cache__", "extra_repr", "_version", "reset_parameters", "_load_from_state_dict",
}  # fmt: skip


def rule_for(node: fx.Node, module: nn.Module | None) -> Rule | None:
    """The rule of a node, or None: then it is opaque."""
    if node.op == "call_module" and module is not None:
        return rule_of_type(type(module))
    if node.op == "call_function":
        return FUNCTIONS.get(node.target)  # pyright: ignore
    if node.op == "call_method":
        return METHODS.get(str(node.target))
    return None
