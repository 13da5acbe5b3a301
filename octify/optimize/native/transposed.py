"""Transposed convolutions of stride 2 as convolutions: one for every parity of the output's rows and columns.

Before: conv_transpose(x).   After: interleave([conv 00, conv 01, conv 10, conv 11]).

Along one axis input j sends tap t to the output 2j + place(t), so outputs 2i + a are a convolution of the taps whose
places have that parity. A low input stands for inputs 2q and 2q + 1: its share of outputs 2i + a, at i = 2r + v, is a
convolution for each v; where that is the same for all, what is raised of one does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, cast

import torch
from torch import Tensor, fx, nn

from octify.graph import shape_of, value_of
from octify.kernels import half
from octify.layers import OctConvTranspose2d
from octify.layout import Layout
from octify.optimize.forms import OutSize, empty_high, join
from octify.optimize.native.operations import is_map, module_of
from octify.optimize.native.writer import Result, Writer
from octify.optimize.spread import Pad, interleave
from octify.resample import pool_low
from octify.transposed import Upward

Shifts = list[tuple[int, int]]  # taps, and by how many positions each moves its input
PARITIES = tuple(product((0, 1), (0, 1)))


def transposed(writer: Writer, node: fx.Node) -> Result:
    """A transposed convolution of stride 2, dense or octave → convolutions whose results are interleaved."""
    found = module_of(writer.module, node)
    if type(found) is nn.ConvTranspose2d:  # an octave one without low channels
        dense = Layout.dense(found.in_channels), Layout.dense(found.out_channels)
        found = OctConvTranspose2d.from_conv(found, *dense)
    if type(found) is not OctConvTranspose2d or node.kwargs:
        return None
    layer = _Layer.of(found)
    if layer is None or len(node.args) > len(layer.bands) or not all(_is_band(x) for x in node.args):
        return None
    return _Spread(writer, layer, dict(zip("hl", cast("tuple[fx.Node, ...]", node.args), strict=False))).run()


def _is_band(x: Any) -> bool:
    """Whether an argument is a map, or a high band without channels."""
    return is_map(x) or (isinstance(x, fx.Node) and (shape_of(value_of(x)) or ())[1:2] == (0,))


@dataclass(frozen=True)
class _Layer:
    """A layer's geometry by axes, its weights (in, out, h, w) by path, its biases by band, its taps' places by path."""

    rows: tuple[Upward, ...]
    weights: dict[str, Tensor]
    biases: dict[str, Tensor | None]
    places: dict[str, tuple[list[int], ...]]

    @classmethod
    def of(cls, conv: OctConvTranspose2d) -> _Layer | None:
        """None of a layer that convolutions of whole maps do not stand for, or that is not for octify's kernels."""
        weights = {path: cast(Tensor, getattr(conv, f"weight_{path}")).detach() for path in conv.paths}
        if conv.stride != (2, 2) or conv.groups > 1:
            return None
        if any(weight.dtype != torch.float32 or weight.device.type != "cpu" for weight in weights.values()):
            return None
        places = {
            path: tuple([tap.first + tap.dilation * index for index in range(len(tap.matrix))] for tap in route.taps)
            for path, route in conv.routes.items()
        }
        return cls(conv.rows, weights, {"h": conv.bias_h, "l": conv.bias_l}, places)

    @property
    def bands(self) -> str:
        """The bands that it may read."""
        return "hl" if any(path[0] == "l" for path in self.weights) else "h"

    def more(self, band: str) -> list[int]:
        """By how much, at most, the output is longer than twice the input, on the band's grid."""
        beyond = [row.out_size(0) for row in self.rows]
        return beyond if band == "h" else [half(more) for more in beyond]


def _by_parity(places: Sequence[int], parity: int) -> Shifts:
    """The taps that send inputs j to outputs 2i + parity, and i - j."""
    return [(tap, (place - parity) // 2) for tap, place in enumerate(places) if (place - parity) % 2 == 0]


def _on_low(shifts: Shifts, parity: int) -> Shifts:
    """The same of an input that stands for two, at outputs of a parity."""
    return [(tap, -((parity - shift) // 2)) for tap, shift in shifts]


@dataclass(frozen=True)
class _Taps:
    """A convolution's taps along one axis, and how much longer than its input its output is to be."""

    shifts: Shifts
    more: int

    @property
    def before(self) -> int:
        """What is padded in front."""
        return max(0, *(shift for _, shift in self.shifts), 0)

    @property
    def length(self) -> int:
        """The kernel's."""
        return self.before + max(0, *(-shift for _, shift in self.shifts), 0) + 1

    @property
    def after(self) -> int:
        """What is padded behind; less than nothing where the last inputs reach no output."""
        return self.more + self.length - 1 - self.before


class _Spread:
    """One call of a layer; `maps` are its input's bands, h alone where it is dense."""

    def __init__(self, writer: Writer, layer: _Layer, maps: dict[str, fx.Node]) -> None:
        self.writer, self.layer, self.maps = writer, layer, maps
        size = tuple(
            row.out_size(length) for row, length in zip(layer.rows, value_of(maps["h"]).shape[2:], strict=True)
        )
        self.size = writer.call(OutSize(layer.rows), size, maps["h"])

    def run(self) -> Result:
        """The output, or its bands."""
        paths = self.layer.weights
        low = self._to_low() if any(path[1] == "l" for path in paths) else None
        if any(path[1] == "h" for path in paths):
            high = self._to_high()
        else:
            high = self.writer.function(empty_high, low, self.size)
        return high if low is None else (high, low)

    def _to_high(self) -> fx.Node:
        return self._interleaved([self._high_part(*parity) for parity in PARITIES])

    def _high_part(self, row: int, column: int) -> fx.Node:
        """What stands at the outputs of one parity."""
        more = [half(beyond - parity) for beyond, parity in zip(self.layer.more("h"), (row, column), strict=True)]
        own: list[fx.Node] = []
        bias = self.layer.biases["h"]
        if "hh" in self.layer.weights:
            own.append(self._conv("hh", self.maps["h"], self._taps("hh", (row, column), more), bias))
            bias = None
        if "lh" not in self.layer.weights:
            return own[0]
        shares = self._low_shares((row, column), more, bias)
        if own and more == [0, 0] and len(set(shares)) == 1:
            return self.writer.function(join, own, shares[:1], 2)
        raised = self._interleaved(shares, (row, column), 2)
        return self.writer.function(join, [raised, *own], [], 2) if own else raised

    def _taps(self, path: str, parity: tuple[int, int], more: Sequence[int]) -> tuple[_Taps, _Taps]:
        rows, columns = (
            _Taps(_by_parity(places, odd), beyond)
            for places, odd, beyond in zip(self.layer.places[path], parity, more, strict=True)
        )
        return rows, columns

    def _low_shares(self, parity: tuple[int, int], more: Sequence[int], bias: Tensor | None) -> list[fx.Node]:
        """The low band's share of the outputs of one parity, one by one for the parities of their own places."""
        axes = self._taps("lh", parity, more)
        parts: dict[Any, fx.Node] = {}
        chosen: list[fx.Node] = []
        for odd in PARITIES:
            halves = tuple(
                _Taps(_on_low(axis.shifts, o), half(axis.more - o)) for axis, o in zip(axes, odd, strict=True)
            )
            key = str(halves)
            if key not in parts:
                parts[key] = self._conv("lh", self.maps["l"], cast("tuple[_Taps, _Taps]", halves), bias)
            chosen.append(parts[key])
        return chosen

    def _to_low(self) -> fx.Node:
        inputs = {"ll": self.maps.get("l"), "hl": None}
        if "hl" in self.layer.weights:
            inputs["hl"] = self.writer.function(pool_low, self.maps["h"], 2)
        parts: list[fx.Node] = []
        for parity in PARITIES:
            more = [half(beyond - odd) for beyond, odd in zip(self.layer.more("l"), parity, strict=True)]
            terms: list[fx.Node] = []
            for path in ("ll", "hl"):
                x = inputs[path]
                if path in self.layer.weights and x is not None:
                    bias = None if terms else self.layer.biases["l"]
                    terms.append(self._conv(path, x, self._taps(path, parity, more), bias))
            parts.append(self.writer.function(join, terms, [], 2) if len(terms) > 1 else terms[0])
        return self._interleaved(parts, (0, 0), 2)

    def _interleaved(self, parts: Sequence[fx.Node], first: tuple[int, int] = (0, 0), step: int = 1) -> fx.Node:
        return self.writer.function(interleave, list(parts), self.size, first, step)

    def _conv(self, path: str, x: fx.Node, axes: tuple[_Taps, _Taps], bias: Tensor | None) -> fx.Node:
        rows, columns = axes
        source = self.layer.weights[path].transpose(0, 1)
        kernel = source.new_zeros((*source.shape[:2], rows.length, columns.length))
        for (top, down), (left, right) in product(rows.shifts, columns.shifts):
            kernel[:, :, rows.before - down, columns.before - right] += source[:, :, top, left]
        pads = (columns.before, columns.after, rows.before, rows.after)
        even = pads[0] == pads[1] and pads[2] == pads[3]
        if not even:
            x = self.writer.layer(Pad(pads), x)
        out, channels = kernel.shape[:2]
        made: Any = nn.Conv2d(
            channels, out, (rows.length, columns.length), 1, (pads[2], pads[0]) if even else 0, bias=bias is not None,
            device="meta",
        )  # fmt: skip
        made.weight = nn.Parameter(kernel, requires_grad=False)
        if bias is not None:
            made.bias = nn.Parameter(bias.detach(), requires_grad=False)
        return self.writer.layer(made, x)
