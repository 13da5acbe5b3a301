"""From graph nodes to a program's steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, fx, nn

from octify.graph import get_module
from octify.octconv import as_tuple
from octify.optimize.forms import Enter, Leave, LowPool, join
from octify.optimize.native.gates import gate_of, is_choice, is_mean, is_mean_of_bands
from octify.optimize.native.sizes import Chosen, Convolved, Cropped, Halved, Like, OnGrid, SideBySide, Vector
from octify.optimize.native.steps import AT_ONCE, Beside, Conv, Kind, Shape, Sizes, Step
from octify.optimize.norms import scale_and_shift
from octify.optimize.passes import act_of
from octify.resample import average, pool_low

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


class Builder:
    """Takes a segment's nodes one by one; the segment's inputs are the values 0, 1, …"""

    def __init__(self, module: fx.GraphModule, inputs: Sequence[fx.Node]) -> None:
        self.module, self.count = module, len(inputs)
        self.values = {node: index for index, node in enumerate(inputs)}
        self.pending: dict[fx.Node, Pending] = {}
        self.padding: dict[fx.Node, tuple[int, ...]] = {}
        self.beside: dict[fx.Node, Beside] = {}  # concatenated, normed, activated: not yet done
        self.writers: dict[int, Step] = {}
        self.steps: list[Step] = []

    def add(self, node: fx.Node) -> None:
        """Takes one node."""
        if node.target is join:
            self._join(node)
        elif node.target in (pool_low, average):
            self._pool(node)
        elif node.target is torch.cat:
            self._cat(node)
        elif is_mean(self.module, node):
            self.values[node] = self._mean(self.value(cast(fx.Node, node.args[0])))
        elif is_mean_of_bands(node) or is_choice(node):
            self._take(node)
        elif pair := gate_of(node):
            self._gate(node, *pair)
        elif node.op == "call_module" and not act_of(self.module, node):
            self._module(node, get_module(self.module, str(node.target)))
        else:
            self._act(node)

    def value(self, node: fx.Node) -> int:
        """The value of a node; what is pending gets its step now."""
        if node in self.pending:
            self._settle(node, self.pending.pop(node), "")
        if node in self.beside:
            given = _reading(self.beside.pop(node))
            self.values[node] = self._emit(Step(Kind.BESIDE, self._new(), _size_of(given), [given]))
        return self.values[node]

    def _new(self) -> int:
        self.count += 1
        return self.count - 1

    def _emit(self, step: Step) -> int:
        self.steps.append(step)
        self.writers[step.out] = step
        return step.out

    # One kind of node each.

    def _module(self, node: fx.Node, module: nn.Module) -> None:
        source = cast(fx.Node, node.args[0])
        if isinstance(module, Enter):
            self.padding[node] = module.route.pads[0][1] if module.route.pads else (0, 0, 0, 0)
        elif isinstance(module, Leave):
            pending, (high, halved) = self.pending.pop(source), cast(Any, node.args[1:])
            inner, route = cast(Convolved, pending.size), module.route
            self.pending[node] = replace(
                pending, size=Cropped(inner, self.value(high), tuple(halved), route.crop, route.low)
            )
        elif isinstance(module, nn.Conv2d):
            self._conv(node, source, module)
        elif isinstance(module, nn.AvgPool2d):
            value = self.value(source)
            self.values[node] = self._halve(value, Halved(Like(value), module.ceil_mode))
        elif isinstance(module, LowPool):
            value, pooled = (self.value(cast(fx.Node, argument)) for argument in node.args)
            size, pool = OnGrid(value, Halved(Like(pooled))), module.pool
            if module.halves:
                self.values[node] = self._halve(value, size)
            else:
                low = (pool.low_kernel, pool.low_stride, pool.left, (1, 1))
                self.values[node] = self._greatest(Conv(value, *cast("tuple[Any, Any, Any, Any]", low)), size)
        elif isinstance(module, nn.MaxPool2d):
            given = (module.kernel_size, module.stride, module.padding, module.dilation)
            pairs = cast("tuple[Any, Any, Any, Any]", tuple(as_tuple(value, 2) for value in given))
            window = Conv(self.value(source), *pairs)
            self.values[node] = self._greatest(window, Convolved(window, window.before, module.ceil_mode))
        else:
            scale, shift = (row.float() for row in scale_and_shift(module))
            given = self.beside.get(source)
            alone = given is not None and given.plain and len(source.users) == 1
            parts = self.beside.pop(source).parts if alone else ((self.value(source), len(scale)),)
            self.beside[node] = Beside(parts, scale, shift)

    def _conv(self, node: fx.Node, source: fx.Node, conv: nn.Conv2d) -> None:
        before = after = cast("tuple[int, int]", conv.padding)
        if source in self.padding:  # F.pad's order: the last axis first
            left, right, top, bottom = self.padding[source]
            source = cast(fx.Node, source.args[0])
            before, after = (before[0] + top, before[1] + left), (after[0] + bottom, after[1] + right)
        stride, dilation = cast("tuple[int, int]", conv.stride), cast("tuple[int, int]", conv.dilation)
        kernel, weight = cast("tuple[int, int]", conv.kernel_size), conv.weight.detach()
        beside = self.beside[source] if self._is_read_in_parts(source) else None
        value = self.value(source) if beside is None else beside.parts[0][0]
        made = Conv(value, kernel, stride, before, dilation, conv.groups, weight, beside)
        bias = None if conv.bias is None else conv.bias.detach()
        self.pending[node] = Pending(Convolved(made, after), bias, made)

    def _act(self, node: fx.Node) -> None:
        source, act = cast(fx.Node, node.args[0]), act_of(self.module, node)
        if source in self.pending and len(source.users) == 1:
            self._settle(node, self.pending.pop(source), act)
            return
        if source in self.beside and not self.beside[source].act and len(source.users) == 1:
            self.beside[node] = replace(self.beside.pop(source), act=act)
            return
        value = self.value(source)
        self.values[node] = self._emit(self._plain_sum([value], _channels(node), act))

    def _pool(self, node: fx.Node) -> None:
        source = cast(fx.Node, node.args[0])
        if self._is_read_in_parts(source):
            given = _reading(self.beside[source])
            self.values[node] = self._emit(Step(Kind.POOL, self._new(), Halved(_size_of(given)), [given]))
            return
        value = self.value(source)
        writer = self.writers.get(value)
        if writer is None or writer.kind == Kind.POOL:
            self.values[node] = self._halve(value, Halved(Like(value)))
            return
        if writer.pooled is None:
            writer.pooled = self._new()
        self.values[node] = writer.pooled

    def _halve(self, value: int, size: Callable[[Sizes], Shape]) -> int:
        return self._emit(Step(Kind.POOL, self._new(), size, [Conv(value, *ONE_TAP)]))

    def _cat(self, node: fx.Node) -> None:
        nodes = cast("list[fx.Node]", node.args[0])
        self.beside[node] = Beside(tuple((self.value(part), _channels(part)) for part in nodes))

    def _greatest(self, window: Conv, size: Callable[[Sizes], Shape]) -> int:
        return self._emit(Step(Kind.GREATEST, self._new(), size, [window]))

    def _mean(self, value: int, high: int | None = None) -> int:
        return self._emit(Step(Kind.MEAN, self._new(), Vector(value), [Conv(value, *ONE_TAP)], up=high))

    def _take(self, node: fx.Node) -> None:
        """Channels of a vector, or of both bands' means in the source's order."""
        if is_choice(node):
            source = cast(fx.Node, node.args[0])
            parts, order = ((self.value(source), _channels(source)),), cast("tuple[int, ...]", node.args[1])
        else:
            nodes, order = cast("tuple[fx.Node, fx.Node]", node.args[:2]), cast("tuple[int, ...]", node.args[2])
            high, low = (self.value(band) for band in nodes)
            means = self._mean(high), self._mean(low, high)
            parts = tuple((mean, _channels(band)) for mean, band in zip(means, nodes, strict=True))
        step = Step(Kind.TAKE, self._new(), Chosen(parts[0][0], len(order)), [_reading(Beside(parts))])
        step.order = tuple(order)
        self.values[node] = self._emit(step)

    def _gate(self, node: fx.Node, gate: fx.Node, x: fx.Node) -> None:
        self.beside[node] = Beside(((self.value(x), _channels(x)),), gate=self.value(gate))

    def _is_read_in_parts(self, source: fx.Node) -> bool:
        """Whether all that read what is not yet done can do so pixel by pixel: then no map of it is ever written."""
        return source in self.beside and all(map(self._reads_pixels, source.users))

    def _reads_pixels(self, reader: fx.Node) -> bool:
        if reader.target in (pool_low, average):
            return True
        conv = get_module(self.module, str(reader.target)) if reader.op == "call_module" else None
        if type(conv) is not nn.Conv2d or conv.groups > 1:
            return False
        return (conv.kernel_size, conv.stride, conv.padding) == ((1, 1), (1, 1), (0, 0))

    def _join(self, node: fx.Node) -> None:
        highs, lows = cast("tuple[list[fx.Node], list[fx.Node]]", node.args[:2])
        act = cast(str, node.args[3]) if len(node.args) > 3 else ""
        up = None
        if len(lows) == 1 and not self._is_free(lows[0], node):
            up = self.value(lows[0])
        elif lows:
            up = self._sum(lows, node, "", None)
        self.values[node] = self._sum(highs, node, act, up)

    def _is_free(self, term: fx.Node, node: fx.Node) -> bool:
        """Whether a term is a convolution that this sum alone reads, once."""
        pending = self.pending.get(term)
        return pending is not None and list(term.users) == [node]

    def _small_group(self, term: fx.Node) -> int:
        pending = self.pending.get(term)
        return 0 if pending is None else pending.small_group

    def _sum(self, terms: list[fx.Node], node: fx.Node, act: str, up: int | None) -> int:
        taken: list[Pending] = []
        plains: list[int] = []
        for term in terms:
            alike = not taken or self._small_group(term) == taken[0].small_group
            if self._is_free(term, node) and alike and len(taken) < AT_ONCE:
                taken.append(self.pending.pop(term))
            else:
                plains.append(self.value(term))
        channels = _channels(terms[0])
        while len(plains) > AT_ONCE:
            partial = self._emit(self._plain_sum(plains[:AT_ONCE], channels))
            plains = [*plains[AT_ONCE:], partial]
        # The whole sum has the size that its uncropped terms have.
        size = Like(plains[0]) if plains else min(taken, key=lambda found: isinstance(found.size, Cropped)).size
        convs = [pending.conv for pending in taken]
        step = Step(_kind_of(taken), self._new(), size, convs, plains, up=up, act=act)
        step.bias = _sum_of([pending.bias for pending in taken], channels)
        return self._emit(step)

    def _plain_sum(self, values: list[int], channels: int, act: str = "") -> Step:
        step = Step(Kind.SUM, self._new(), Like(values[0]), plains=values, act=act)
        step.bias = torch.zeros(channels)
        return step

    def _settle(self, node: fx.Node, pending: Pending, act: str) -> None:
        """Gives what is pending a step of its own."""
        step = Step(_kind_of([pending]), self._new(), pending.size, [pending.conv], act=act)
        step.bias = _sum_of([pending.bias], _channels(node))
        self.values[node] = self._emit(step)


def _reading(beside: Beside) -> Conv:
    """A reader of values side by side that does nothing else."""
    return Conv(beside.parts[0][0], *ONE_TAP, beside=beside)


def _size_of(given: Conv) -> SideBySide:
    return SideBySide(tuple(value for value, _ in cast(Beside, given.beside).parts))


def _kind_of(convs: Sequence[Pending]) -> Kind:
    return Kind.GROUPED if convs and convs[0].small_group else Kind.SUM


def _sum_of(biases: list[Tensor | None], channels: int) -> Tensor:
    return torch.stack([torch.zeros(channels), *(bias.float() for bias in biases if bias is not None)]).sum(0)


def _channels(node: fx.Node) -> int:
    return cast(Tensor, node.meta["value"]).shape[1]
