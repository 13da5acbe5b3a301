"""What a layer has to give beside the dense layer's output, so that what becomes of it is the dense network's.

Where its output is added to something, a shortcut as a rule, the layer makes up for what that lacks in the octave
network. And where an activation g reads it, the low band shall be `D g(y)` behind it, which is not `g(D y)`.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# (tensor and array methods that come without complete types)

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, fx, nn

from octify.bands import take
from octify.calibrate.walk import Walk
from octify.calibrate.ways import Step, Way, find_way
from octify.compconv import CompConv
from octify.layout import Layout
from octify.linear import OctLinear
from octify.octbase import OctBase
from octify.resample import pool_low

FAINT = 1e-2  # of the mean squared scale: a channel scaled by less than its root is hardly asked for anything
FAITH = 0.1  # what keeping `D y` weighs beside reaching `D g(y)`
SHARES = (0.25, 0.5, 0.75, 1.0, 1.25)  # of the way from `D y` to `D g(y)`


Extra = Callable[[str, int], Tensor | None]  # of a band (high, low) and a chunk


def extra_of(source: Walk, octave: Walk, pair: tuple[fx.Node, fx.Node], outputs: Sequence[Tensor]) -> Extra | None:
    """What to add to a layer's targets, band by band and chunk by chunk; `outputs` are the dense layer's.

    `pair` is the layer's node in the dense and in the octave network, and both walks have come to it.
    """
    module = octave.root.get_submodule(str(pair[1].target))
    calls = sum(node.target == pair[0].target for node in source.nodes)
    if calls > 1 or isinstance(module, CompConv):
        return None
    way = find_way(source.root, pair[0])
    wholes = _known(source, way, outputs[0])
    if wholes is None:
        return None
    places = _Places.of(module, way, outputs[0])
    parts = _parts(octave, pair[1], places) if wholes else {}
    act = None if places.layout.is_dense else way.activation

    @torch.no_grad()
    def extra(band: str, index: int) -> Tensor | None:
        whole = places.take(wholes[index], band) if wholes else None
        found = None
        if whole is not None and parts:
            found = places.bring(whole, band) - parts[band][index].movedim(places.axis, 1)
        if act is not None and band == "low":
            behind = places.follow(outputs[index], band)
            shift = _shift(act, behind if whole is None else behind + whole, places.spatial)
            found = shift if found is None else found + shift
        return None if found is None else places.undo(found, band)

    return extra if parts or act is not None else None


def _known(source: Walk, way: Way, output: Tensor) -> Sequence[Tensor] | None:
    """The dense network's other summand, chunk by chunk; empty without one.

    None if it is no such map, or not known yet: then it is that one's layer that makes up for this one.
    """
    if way.other is None:
        return []
    found = source.values.get(way.other)
    same = found and isinstance(found[0], Tensor) and found[0].numel() == output.numel()
    return found if same else None


def _parts(octave: Walk, node: fx.Node, places: _Places) -> dict[str, Sequence[Tensor]]:
    """The octave network's other summand, band by band and chunk by chunk; empty if there is none yet."""
    bands = {"high": node}
    if not places.layout.is_dense:
        bands = {("high", "low")[cast(int, item.args[1])]: item for item in node.users}
    others = {band: find_way(octave.root, value).other for band, value in bands.items()}
    kept = octave.values
    known = {band: kept[other] for band, other in others.items() if other is not None and other in kept}
    return known if len(known) == (1 if places.layout.is_dense else 2) else {}


@dataclass(frozen=True)
class _Places:
    """A layer's channels: their layout, their axis as the layer gives them and behind its way.

    `spatial` axes are halved. The way is `scale · y + offset`, one number a channel, (C, 1, 1) of a map.
    """

    layout: Layout
    given: int
    axis: int
    spatial: int
    scale: Tensor
    offset: Tensor

    @classmethod
    @torch.no_grad()
    def of(cls, layer: nn.Module, way: Way, output: Tensor) -> _Places:
        """Found by what the way makes of a map of one position."""
        given = output.dim() - 1 if isinstance(layer, OctLinear | nn.Linear) else 1
        channels = output.shape[given]
        shape = [1] * output.dim()
        shape[given] = channels
        zeros, ones = (way.follow(fill(shape)) for fill in (output.new_zeros, output.new_ones))
        axis = max(range(zeros.dim()), key=lambda place: zeros.shape[place]) if channels > 1 else given
        layout = layer.out_layout if isinstance(layer, OctBase) else Layout.dense(channels)
        spatial = layer.halved if isinstance(layer, OctLinear) else layer.spatial if isinstance(layer, OctBase) else 0
        scale, offset = (value.movedim(axis, 1)[0] for value in (ones - zeros, zeros))
        return cls(layout, given, axis, spatial, scale, offset)

    def take(self, whole: Tensor, band: str, axis: int | None = None) -> Tensor:
        """A band's channels of a map behind the way, moved to axis 1."""
        index = self.layout.high_index if band == "high" else self.layout.low_index
        return take(whole.movedim(self.axis if axis is None else axis, 1), 1, index)

    def bring(self, channels: Tensor, band: str) -> Tensor:
        """A band's channels on the band's grid."""
        return pool_low(channels, self.spatial) if band == "low" else channels

    def follow(self, output: Tensor, band: str) -> Tensor:
        """What becomes of a band's channels of the dense layer's output, channels at axis 1."""
        scale, offset = (self.take(value[None], band, 1) for value in (self.scale, self.offset))
        return torch.addcmul(offset, self.take(output, band, self.given), scale)

    def undo(self, lacking: Tensor, band: str) -> Tensor:
        """What added to the layer's band adds `lacking` behind the way; faint channels are asked for less."""
        square = self.scale.square()
        factor = self.scale / (square + FAINT * square.mean()).clamp_min(torch.finfo(square.dtype).tiny)
        return lacking * self.take(factor[None], band, 1)


def _shift(act: Step, x: Tensor, spatial: int) -> Tensor:
    """How far the low band should be from `D x`, so that behind the activation g it is near `D g(x)`.

    Of some points between both the best one, by the squared distance to either: where g is flat it is `D x`.
    """
    wanted, plain = pool_low(act(x), spatial), pool_low(x, spatial)
    best, least = torch.zeros_like(plain), (act(plain) - wanted).square()
    for share in SHARES:
        shift = share * (wanted - plain)
        cost = (act(plain + shift) - wanted).square() + FAITH * shift.square()
        best = torch.where(cost < least, shift, best)
        least = torch.minimum(cost, least)
    return best
