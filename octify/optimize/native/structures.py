"""Steps as the structures that `kernels.cpp` reads."""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from octify.optimize.native.packing import Kernel, pack_weight, padded, panels_of
from octify.optimize.native.steps import AT_ONCE, Beside, Kind, Step

# In the order of the kernels' own list; of some the numbers follow.
ACTS = (
    "", "relu", "hardtanh", "silu", "hardswish", "sigmoid", "tanh", "hardsigmoid", "leaky_relu", "elu", "gelu",
    "gelu_tanh", "mish",
)  # fmt: skip


class CAct(ctypes.Structure):
    """`Act`."""

    _fields_ = [("kind", ctypes.c_int64), ("a", ctypes.c_float), ("b", ctypes.c_float)]


def act_of_name(act: str) -> CAct:
    """An activation's structure."""
    name, *numbers = act.split() or [""]
    return CAct(ACTS.index(name), *(float(number) for number in numbers))


class CMap(ctypes.Structure):
    """`Map`."""

    _fields_ = [("data", ctypes.c_void_p), *((name, ctypes.c_int64) for name in ("n", "h", "w", "c", "pitch"))]


class CPart(ctypes.Structure):
    """`Part`."""

    _fields_ = [("map", ctypes.c_int64), ("channels", ctypes.c_int64)]


class CInput(ctypes.Structure):
    """`Input`."""

    _fields_ = [
        ("map", ctypes.c_int64),
        ("parts", ctypes.c_void_p),
        ("count", ctypes.c_int64),
        ("scale", ctypes.c_void_p),
        ("shift", ctypes.c_void_p),
        ("act", CAct),
        ("gate", ctypes.c_int64),
        ("moments", ctypes.c_int64),
    ]


class CConv(ctypes.Structure):
    """`Conv`."""

    _fields_ = [
        ("input", CInput),
        ("weight", ctypes.c_void_p),
        ("first", ctypes.c_void_p),
        ("span", ctypes.c_int64),
        *((name, ctypes.c_int64 * 2) for name in ("kernel", "stride", "before", "dilation")),
        ("edge", ctypes.c_int64),
    ]


class CStep(ctypes.Structure):
    """`Step`."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("kind", "out", "pooled", "convs", "plains", "up")),
        ("act", CAct),
        ("panels", ctypes.c_int64),
        ("panel", ctypes.c_void_p),
        ("plain", ctypes.c_int64 * AT_ONCE),
        ("weights", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("conv", CConv * AT_ONCE),
    ]


@dataclass
class Made:
    """A step as the kernels read it, the tensors that it points to, and the weights that it shall point to."""

    row: CStep
    kept: list[Tensor]
    weights: Tensor | None


def structure(step: Step, wide: int) -> Made:
    """A step as the kernels read it."""
    kept: list[Tensor] = []

    def place(tensor: Tensor) -> int:
        kept.append(tensor)
        return tensor.data_ptr()

    kernels = [(conv, conv.weight) for conv in step.convs if conv.weight is not None and step.kind == Kind.SUM]
    panels = panels_of([Kernel.of(weight.shape, conv.groups) for conv, weight in kernels], wide) if kernels else []
    packed = [pack_weight(weight, conv.groups, panels) for conv, weight in kernels]
    made = CStep(
        kind=step.kind,
        out=step.out,
        pooled=-1 if step.pooled is None else step.pooled,
        act=CAct(0, step.eps) if step.kind in (Kind.MOMENTS, Kind.GROUPS) else act_of_name(step.act),
        convs=len(step.convs),
        plains=len(step.plains),
        up=-1 if step.up is None else step.up,
        panels=len(panels),
        plain=(ctypes.c_int64 * AT_ONCE)(*step.plains),
        bias=None if step.bias is None else place(padded(step.bias, wide, wide)),
    )
    for conv, row in zip(step.convs, made.conv, strict=False):
        pair = ctypes.c_int64 * 2
        row.input.map, row.input.gate, row.input.moments, row.span = conv.value, -1, -1, conv.area
        row.edge = conv.edge
        if conv.beside is not None:
            _place_beside(row.input, conv.beside, place)
        row.kernel, row.stride = pair(*conv.kernel), pair(*conv.stride)
        row.before, row.dilation = pair(*conv.before), pair(*conv.dilation)
        if conv.weight is None:
            continue
        if step.kind == Kind.GROUPED:
            row.weight, row.span = place(padded(conv.weight.permute(2, 3, 1, 0), wide)), conv.small_group
            continue
        _, row.span = Kernel.of(conv.weight.shape, conv.groups).reads(panels)
    for row, (_, starts) in zip(made.conv, packed, strict=False):
        row.first = place(torch.tensor(starts, dtype=torch.int64))
    if step.kind in (Kind.TAKE, Kind.GROUPS, Kind.BLEND):
        made.conv[0].first = place(torch.tensor(step.order, dtype=torch.int64))
    if step.kind == Kind.GROUPS:
        made.conv[0].span = 1 + max(step.order)
    if not packed:
        return Made(made, kept, None)
    begins = itertools.accumulate((panel.width for panel in panels), initial=0)
    cuts = [[panel.first, panel.outputs, panel.width, begin] for panel, begin in zip(panels, begins, strict=False)]
    made.panel = place(torch.tensor(cuts, dtype=torch.int64))
    blocks = [rows[index].flatten() for index in range(len(panels)) for rows, _ in packed]
    return Made(made, kept, torch.cat(blocks))


def _place_beside(row: CInput, beside: Beside, place: Callable[[Tensor], int]) -> None:
    parts = torch.tensor(beside.parts, dtype=torch.int64)
    row.parts, row.count, row.act = place(parts), len(parts), act_of_name(beside.act)
    row.gate, row.moments = (-1 if value is None else value for value in (beside.gate, beside.moments))
    if beside.scale is not None and beside.shift is not None:
        row.scale, row.shift = (place(values.detach().float().contiguous()) for values in (beside.scale, beside.shift))
