"""From graph nodes to a program's steps: what all kinds of nodes share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, fx

from octify.optimize.native.sizes import Cropped, Halved, Like, SideBySide
from octify.optimize.native.steps import AT_ONCE, Beside, Conv, Edge, Kind, Shape, Sizes, Step

ONE_TAP = ((1, 1), (1, 1), (0, 0), (1, 1))  # kernel, stride, padding before, dilation


@dataclass
class Pending:
    """A convolution that has no step of its own yet: what reads it may take it in."""

    size: Callable[[Sizes], Shape]
    bias: Tensor | None
    conv: Conv

    @property
    def small_group(self) -> int:
        """Of its convolution."""
        return self.conv.small_group


@dataclass(frozen=True)
class Padding:
    """What a convolution's input is padded by first, as `F.pad` has it or as TensorFlow does, and with what."""

    amounts: tuple[int, ...]
    edge: Edge


class Builder:
    """Collects a segment's steps; the segment's inputs are the values 0, 1, …"""

    def __init__(self, module: fx.GraphModule, inputs: Sequence[fx.Node]) -> None:
        self.module, self.count = module, len(inputs)
        self.values = {node: index for index, node in enumerate(inputs)}
        self.pending: dict[fx.Node, Pending] = {}
        self.padding: dict[fx.Node, Padding] = {}
        self.beside: dict[fx.Node, Beside] = {}  # concatenated, normed, gated, activated: not yet done
        self.writers: dict[int, Step] = {}
        self.steps: list[Step] = []

    def value(self, node: fx.Node) -> int:
        """The value of a node; what is pending gets its step now."""
        if node in self.pending:
            self.settle(node, self.pending.pop(node), "")
        if node in self.beside:
            given = reading(self.beside.pop(node))
            self.values[node] = self.emit(Step(Kind.BESIDE, self.new(), size_of(given), [given]))
        return self.values[node]

    def whole(self, node: fx.Node) -> int:
        """The same as a map of its own: no part of another one, and no input."""
        value = self.value(node)
        if value in self.writers and self.writers[value].kind != Kind.VIEW:
            return value
        given = reading(Beside(((value, channels_of(node)),)))
        return self.emit(Step(Kind.BESIDE, self.new(), Like(value), [given]))

    def new(self) -> int:
        """The number of a new value."""
        self.count += 1
        return self.count - 1

    def emit(self, step: Step) -> int:
        """Adds a step; returns the value that it writes."""
        self.steps.append(step)
        self.writers[step.out] = step
        return step.out

    def halve(self, value: int, size: Callable[[Sizes], Shape]) -> int:
        """Averages 2 by 2."""
        return self.emit(Step(Kind.POOL, self.new(), size, [Conv(value, *ONE_TAP)]))

    def halved(self, node: fx.Node) -> int:
        """D of a node, made by the step that writes it where there is one."""
        value = self.value(node)
        writer = self.writers.get(value)
        if writer is None or writer.kind in (Kind.POOL, Kind.VIEW, Kind.MEAN, Kind.MOMENTS, Kind.GROUPS):
            return self.halve(value, Halved(Like(value)))
        if writer.pooled is None:
            writer.pooled = self.new()
        return writer.pooled

    def is_free(self, term: fx.Node, node: fx.Node) -> bool:
        """Whether a term is a convolution that this sum alone reads, once."""
        pending = self.pending.get(term)
        return pending is not None and list(term.users) == [node]

    def sum(self, terms: Sequence[fx.Node], node: fx.Node, act: str, up: int | None) -> int:
        """act(Σ terms + up), with convolutions that are read here alone taken in."""
        taken: list[Pending] = []
        plains: list[int] = []
        for term in terms:
            alike = not taken or self._small_group(term) == taken[0].small_group
            if self.is_free(term, node) and alike and len(taken) < AT_ONCE:
                taken.append(self.pending.pop(term))
            else:
                plains.append(self.value(term))
        channels = channels_of(terms[0])
        while len(plains) > AT_ONCE:
            partial = self.emit(self.plain_sum(plains[:AT_ONCE], channels))
            plains = [*plains[AT_ONCE:], partial]
        # The whole sum has the size that its uncropped terms have.
        size = Like(plains[0]) if plains else min(taken, key=lambda found: isinstance(found.size, Cropped)).size
        convs = [pending.conv for pending in taken]
        step = Step(_kind_of(taken), self.new(), size, convs, plains, up=up, act=act)
        step.bias = _sum_of([pending.bias for pending in taken], channels)
        return self.emit(step)

    def _small_group(self, term: fx.Node) -> int:
        pending = self.pending.get(term)
        return 0 if pending is None else pending.small_group

    def plain_sum(self, values: list[int], channels: int, act: str = "") -> Step:
        """A step that adds maps."""
        step = Step(Kind.SUM, self.new(), Like(values[0]), plains=values, act=act)
        step.bias = torch.zeros(channels)
        return step

    def settle(self, node: fx.Node, pending: Pending, act: str) -> None:
        """Gives what is pending a step of its own."""
        step = Step(_kind_of([pending]), self.new(), pending.size, [pending.conv], act=act)
        step.bias = _sum_of([pending.bias], channels_of(node))
        self.values[node] = self.emit(step)


def reading(beside: Beside) -> Conv:
    """A reader of values side by side that does nothing else."""
    return Conv(beside.parts[0][0], *ONE_TAP, beside=beside)


def size_of(given: Conv) -> SideBySide:
    """The size of what it reads."""
    return SideBySide(tuple(value for value, _ in cast(Beside, given.beside).parts))


def channels_of(node: fx.Node) -> int:
    """How many channels a node's map has."""
    return cast(Tensor, node.meta["value"]).shape[1]


def _kind_of(convs: Sequence[Pending]) -> Kind:
    return Kind.GROUPED if convs and convs[0].small_group else Kind.SUM


def _sum_of(biases: list[Tensor | None], channels: int) -> Tensor:
    return torch.stack([torch.zeros(channels), *(bias.float() for bias in biases if bias is not None)]).sum(0)
