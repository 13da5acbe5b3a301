"""What moves channels, and what multiplies or centres them, as steps."""

from __future__ import annotations

import operator
from typing import Any, cast

import torch
from torch import Tensor, fx

from octify.graph import value_of
from octify.layers import runs_of
from octify.ops import take_channels
from octify.optimize.forms import Centred, GroupFactors, by_image, low_moments, moments
from octify.optimize.native.builder import ONE_TAP, Builder, channels_of, reading
from octify.optimize.native.operations import Graph, Operation, is_map, module_of
from octify.optimize.native.sizes import Chosen, Vector
from octify.optimize.native.steps import Beside, Conv, Kind, Step

MULS: tuple[Any, ...] = (operator.mul, torch.mul)
RUNS = 4  # pieces of a map that are read side by side; more of them are put in order first


def _concatenates(_: Graph, node: fx.Node) -> bool:
    if node.target is not torch.cat:
        return False
    parts, *rest = cast("tuple[Any, ...]", node.args)
    return (rest or [node.kwargs.get("dim", 0)])[0] == 1 and isinstance(parts, (list, tuple))


def _cat(builder: Builder, node: fx.Node) -> None:
    nodes = cast("list[fx.Node]", node.args[0])
    builder.beside[node] = Beside(tuple((builder.value(part), channels_of(part)) for part in nodes))


def _takes(_: Graph, node: fx.Node) -> bool:
    return node.target is take_channels and cast(int, node.args[2]) == 1


def _take(builder: Builder, node: fx.Node) -> None:
    source, order = cast(fx.Node, node.args[0]), cast("tuple[int, ...]", node.args[1])
    value, runs = builder.value(source), runs_of(order)
    if len(runs) <= RUNS:
        views = tuple((_view(builder, value, first, length), length) for first, length in runs)
        if len(views) == 1:
            builder.values[node] = views[0][0]
        else:
            builder.beside[node] = Beside(views)
        return
    whole = Beside(((value, channels_of(source)),))
    step = Step(Kind.TAKE, builder.new(), Chosen(value, len(order)), [reading(whole)], order=tuple(order))
    builder.values[node] = builder.emit(step)


def _view(builder: Builder, value: int, first: int, length: int) -> int:
    """A part of a value's channels where they are."""
    step = Step(Kind.VIEW, builder.new(), Chosen(value, length), [Conv(value, *ONE_TAP)], order=(first,))
    return builder.emit(step)


def gate_of(node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """The gate and the map of a product: a gate has as many images, channels and positions as the map, or one."""
    if node.target not in MULS or len(node.args) != 2 or node.kwargs:
        return None
    pair = node.args
    if not all(is_map(argument) for argument in pair):
        return None
    gate, x = sorted(cast("tuple[fx.Node, fx.Node]", pair), key=_numbers)
    small, shape, given = (tuple(cast(Tensor, value_of(found)).shape) for found in (gate, x, node))
    if shape != given or small[0] not in (1, shape[0]) or small[1] not in (1, shape[1]):
        return None
    # A gate of one channel has all positions: else it would be one number.
    fits = small[2:] == shape[2:] or (small[2:] == (1, 1) and small[1] == shape[1])
    return (gate, x) if fits else None


def _numbers(node: fx.Node) -> int:
    return value_of(node).numel()


def _gate(builder: Builder, node: fx.Node) -> None:
    gate, x = cast("tuple[fx.Node, fx.Node]", gate_of(node))
    builder.beside[node] = Beside(((builder.value(x), channels_of(x)),), gate=builder.value(gate))


def _is_moments(_: Graph, node: fx.Node) -> bool:
    return node.target in (moments, low_moments)


def _moments(builder: Builder, node: fx.Node) -> None:
    """One step for both bands' moments."""
    bands = [builder.value(band) for band in cast("list[fx.Node]", node.args[0])]
    known = [
        step
        for step in builder.steps
        if step.kind == Kind.MOMENTS and [step.convs[0].value, step.up] == [*bands, None][:2]
    ]
    if not known:
        up = bands[1] if len(bands) > 1 else None
        step = Step(Kind.MOMENTS, builder.new(), Chosen(bands[0], 3), [Conv(bands[0], *ONE_TAP)], up=up)
        step.eps, step.pooled = cast(float, node.args[1]), None if up is None else builder.new()
        builder.emit(step)
        known = [step]
    builder.values[node] = known[0].out if node.target is moments else cast(int, known[0].pooled)


def _is_centred(module: Graph, node: fx.Node) -> bool:
    return type(module_of(module, node)) is Centred


def _centre(builder: Builder, node: fx.Node) -> None:
    found = cast(Centred, module_of(builder.module, node))
    x, by = (builder.value(cast(fx.Node, argument)) for argument in node.args)
    parts = ((x, channels_of(node)),)
    builder.beside[node] = Beside(parts, found.affine.scale.float(), found.affine.shift.float(), moments=by)


def _is_group_factors(module: Graph, node: fx.Node) -> bool:
    return type(module_of(module, node)) is GroupFactors


def _group_factors(builder: Builder, node: fx.Node) -> None:
    found = cast(GroupFactors, module_of(builder.module, node))
    first, *second = cast("tuple[fx.Node, ...]", node.args)
    value = builder.value(first)
    own = Beside(((value, channels_of(first)),), found.affine.scale, found.affine.shift)
    step = Step(Kind.GROUPS, builder.new(), Vector(value, 2 * len(found.group)), [reading(own)], eps=found.eps)
    step.order, step.up = found.group, builder.value(second[0]) if second else None
    builder.values[node] = builder.emit(step)


def _by_image(builder: Builder, node: fx.Node) -> None:
    x, factors, first = cast("tuple[fx.Node, fx.Node, int]", node.args)
    parts = ((builder.value(x), channels_of(node)),)
    gate = _view(builder, builder.value(factors), first, 2 * channels_of(node))
    builder.beside[node] = Beside(parts, gate=gate)


OPERATIONS = (
    Operation("concatenation", _concatenates, _cat),
    Operation("some channels", _takes, _take),
    Operation("product", lambda _, node: gate_of(node) is not None, _gate),
    Operation("moments", _is_moments, _moments),
    Operation("norm of each position", _is_centred, _centre),
    Operation("statistics of groups", _is_group_factors, _group_factors),
    Operation("norm of each image", lambda _, node: node.target is by_image, _by_image),
)
