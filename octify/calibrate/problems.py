"""Layers as least squares: which rows of a layer's input meet which rows of the dense layer's output.

A problem is one band that a layer gives: `rows` samples positions, `weight` reads and `place` writes the kernels of all
paths into that band as one matrix per group.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# (tensor and array methods that come without complete types)

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from timm.layers.conv2d_same import Conv2dSame
from torch import Tensor, nn
from torch.nn import functional as F

from octify.bands import path_groups, swap_sides, take
from octify.compconv import CompConv
from octify.layers import OctConv, OctConv1d, OctConv2d, OctConv3d
from octify.layout import Layout
from octify.linear import OctLinear
from octify.octbase import OctBase
from octify.octconv import as_tuple, conv_axes
from octify.reparametrized import computed_by
from octify.resample import average, pool_low
from octify.routes import Route, enter
from octify.transposed import OctConvTranspose, OctConvTranspose1d, OctConvTranspose2d, OctConvTranspose3d


@dataclass(frozen=True)
class Rows:
    """Sampled rows, image by image: x (N, P, groups, unknowns) and y (N, P, groups, outputs)."""

    x: Tensor
    y: Tensor


class Problem(Protocol):
    """One band of one layer."""

    band: str  # high, low
    groups: int
    bias: nn.Parameter | None

    def rows(
        self, inputs: tuple[Any, ...], output: Tensor, count: int, dice: torch.Generator, extra: Tensor | None = None
    ) -> Rows:
        """Samples up to `count` positions an image; `output` is the dense layer's.

        `extra` is added to what the band shall be, channels at axis 1.
        """
        ...

    def weight(self) -> Tensor:
        """The weights as (groups, unknowns, outputs), in float64."""
        ...

    def place(self, weight: Tensor) -> None:
        """The inverse of `weight`."""
        ...


class ConvProblem:
    """The paths of an octave convolution into one band."""

    def __init__(self, layer: OctConv, side: str, home: nn.Module | None = None) -> None:
        self.layer, self.side = layer, side
        self.band = "high" if side == "h" else "low"
        self.paths = [path for path in layer.paths if path[1] == side]
        self.groups = path_groups(self.paths[0], layer.in_layout, layer.groups)
        # `home` is a dense convolution, which `layer` is another view of: its parameters are written.
        self._weights = {path: cast(nn.Parameter, getattr(layer, f"weight_{path}")) for path in self.paths}
        self.bias = cast("nn.Parameter | None", getattr(layer, f"bias_{side}"))
        if home is not None:
            self._weights = {"hh": cast(nn.Parameter, home.weight)}
            self.bias = cast("nn.Parameter | None", home.bias)

    def rows(
        self, inputs: tuple[Any, ...], output: Tensor, count: int, dice: torch.Generator, extra: Tensor | None = None
    ) -> Rows:
        """Samples up to `count` positions an image."""
        layer = self.layer
        bands: tuple[Any, ...] = inputs[0] if isinstance(inputs[0], tuple) else inputs  # pyright: ignore
        high, low = cast(Tensor, bands[0]), cast("Tensor | None", bands[1] if len(bands) > 1 else None)
        target = _target(layer, self.side, output)
        target = target if extra is None else target + extra
        points = sample_points(target.shape[2:], count, dice, target.device)
        pieces = [self._features(path, high, low, output, points) for path in self.paths]
        x = torch.cat(pieces, 3)
        y = target.flatten(2)[:, :, ravel(points, target.shape[2:])].transpose(1, 2)
        return Rows(x, y.unflatten(2, (self.groups, -1)))

    def _features(self, path: str, high: Tensor, low: Tensor | None, output: Tensor, points: Tensor) -> Tensor:
        """(N, P, groups, unknowns of this path)."""
        layer = self.layer
        route = layer.routes[path]
        source = high if path[0] == "h" else cast(Tensor, low)
        if path[0] == "h":
            source = average(source, pool) if (pool := paper_pool(layer)) else source
            source = pool_low(source, layer.spatial) if path[1] == "l" else source
        size = output.shape[-layer.spatial :]
        if path == "lh":
            halves = torch.tensor([2 if on_low else 1 for on_low in route.low], device=points.device)
            points = points // halves
        taken = gather(enter(route, source, size), route, _zeros(layer, route), points)
        return taken.unflatten(2, (self.groups, -1)).flatten(3)

    def weight(self) -> Tensor:
        """The weights as (groups, unknowns, outputs), in float64."""
        parts = [self._by_output(self._weights[path].detach().double()) for path in self.paths]
        flat = [part.unflatten(0, (self.groups, -1)).flatten(2).transpose(1, 2) for part in parts]
        return torch.cat(flat, 1)

    def place(self, weight: Tensor) -> None:
        """The inverse of `weight`."""
        start = 0
        for path in self.paths:
            home = self._weights[path]
            shape = self._by_output(home.detach()).shape
            unknowns = shape[1:].numel()
            part = weight[:, start : start + unknowns].transpose(1, 2).reshape(shape)
            with torch.no_grad():
                home.copy_(self._by_output(part).to(home.dtype))
            start += unknowns

    def _by_output(self, weight: Tensor) -> Tensor:
        """A weight as (out, in/groups, …), and back to as it is stored."""
        return weight


class TransposedProblem(ConvProblem):
    """The paths of a transposed octave convolution into one band."""

    def __init__(self, layer: OctConvTranspose, side: str, home: nn.Module | None = None) -> None:
        super().__init__(cast(OctConv, layer), side, home)
        self.upward = layer

    def _features(self, path: str, high: Tensor, low: Tensor | None, output: Tensor, points: Tensor) -> Tensor:
        source = high if path[0] == "h" else cast(Tensor, low)
        if path == "hl":
            source = pool_low(source, self.layer.spatial)
        size = output.shape[-self.layer.spatial :]
        # Image by image: all taps side by side are many maps.
        seen = [self._at(self.upward.spread_taps(path, image, size), points) for image in source.split(1)]
        return torch.cat(seen).unflatten(2, (self.groups, -1))

    def _at(self, maps: Tensor, points: Tensor) -> Tensor:
        return maps.flatten(2)[:, :, ravel(points, maps.shape[2:])].transpose(1, 2)

    def _by_output(self, weight: Tensor) -> Tensor:
        return swap_sides(weight, self.groups)


class OctLinearProblem(ConvProblem):
    """The paths of an octave linear layer (channels last) into one band."""

    def __init__(self, layer: OctLinear, side: str) -> None:
        super().__init__(cast(OctConv, layer), side)
        self.halved = layer.halved

    def rows(
        self, inputs: tuple[Any, ...], output: Tensor, count: int, dice: torch.Generator, extra: Tensor | None = None
    ) -> Rows:
        """Samples up to `count` positions an image."""
        given: tuple[Any, ...] = inputs[0] if isinstance(inputs[0], tuple) else inputs  # pyright: ignore
        maps = {name: cast(Tensor, band).movedim(-1, 1) for name, band in zip("hl", given, strict=False)}
        layout = self.layer.out_layout
        wanted = take(output.movedim(-1, 1), 1, layout.high_index if self.side == "h" else layout.low_index)
        wanted = pool_low(wanted, self.halved) if self.side == "l" else wanted
        wanted = wanted if extra is None else wanted + extra
        points = sample_points(wanted.shape[2:], count, dice, wanted.device)
        pieces = [self._taken(path, maps[path[0]], points) for path in self.paths]
        y = wanted.flatten(2)[:, :, ravel(points, wanted.shape[2:])].transpose(1, 2)
        return Rows(torch.cat(pieces, 2).unsqueeze(2), y.unsqueeze(2))

    def _taken(self, path: str, x: Tensor, points: Tensor) -> Tensor:
        if path == "hl":
            x = pool_low(x, self.halved)
        if path == "lh":
            still = points.shape[1] - self.halved
            points = torch.cat([points[:, :still], points[:, still:] // 2], 1)
        return x.flatten(2)[:, :, ravel(points, x.shape[2:])].transpose(1, 2)


class LinearProblem:
    """A linear layer on the last axis of its input."""

    band, groups = "high", 1

    def __init__(self, layer: nn.Linear) -> None:
        self.layer, self.bias = layer, cast("nn.Parameter | None", layer.bias)

    def rows(
        self, inputs: tuple[Any, ...], output: Tensor, count: int, dice: torch.Generator, extra: Tensor | None = None
    ) -> Rows:
        """Samples up to `count` rows an image."""
        output = output if extra is None else output + extra.movedim(1, -1)
        x, y = (value.flatten(1, -2) if value.dim() > 2 else value.unsqueeze(1) for value in (inputs[0], output))
        points = sample_points(x.shape[1:2], count, dice, x.device)[:, 0]
        return Rows(x[:, points].unsqueeze(2), y[:, points].unsqueeze(2))

    def weight(self) -> Tensor:
        """The weights as (1, unknowns, outputs), in float64."""
        return self.layer.weight.detach().double().T.unsqueeze(0)

    def place(self, weight: Tensor) -> None:
        """The inverse of `weight`."""
        with torch.no_grad():
            self.layer.weight.copy_(weight[0].T.to(self.layer.weight.dtype))


def paper_pool(layer: OctConv) -> tuple[int, ...]:
    """The pooling that paper kernels put before a strided convolution; empty where there is none."""
    if layer.kernels != "paper" or layer.downsample != "pool" or max(layer.stride[-layer.spatial :]) == 1:
        return ()
    return (1,) * (layer.dim - layer.spatial) + layer.stride[-layer.spatial :]


def _target(layer: OctConv, side: str, output: Tensor) -> Tensor:
    """What a band shall be: the dense convolution's channels, averaged for the low band."""
    if side == "h":
        return take(output, 1, layer.out_layout.high_index)
    return pool_low(take(output, 1, layer.out_layout.low_index), layer.spatial)


def _zeros(layer: OctConv, route: Route) -> list[tuple[int, int]]:
    """The zeros that a route's convolution puts around its map, axis by axis."""
    if isinstance(route.padding, str):
        axes = conv_axes(layer.kernel_size, layer.stride, layer.padding, layer.dilation)
        return [(axis.left, axis.right) for axis in axes]
    return [(amount, amount) for amount in as_tuple(route.padding, layer.dim)]


def sample_points(size: Sequence[int], count: int, dice: torch.Generator, device: torch.device) -> Tensor:
    """(P, axes): positions on a grid, all of them if `count` allows, else drawn without repeats."""
    total = 1
    for length in size:
        total *= length
    flat = torch.arange(total) if total <= count else torch.randperm(total, generator=dice)[:count]
    return torch.stack(torch.unravel_index(flat, tuple(size)), 1).to(device)


def ravel(points: Tensor, size: Sequence[int]) -> Tensor:
    """Positions (P, axes) as indices into the flattened grid."""
    flat = torch.zeros_like(points[:, 0])
    for axis, length in enumerate(size):
        flat = flat * length + points[:, axis]
    return flat


def gather(x: Tensor, route: Route, zeros: Sequence[tuple[int, int]], points: Tensor) -> Tensor:
    """What a convolution's kernel sees at some outputs: (N, C, …) to (N, P, C, taps)."""
    pads = [amount for pair in reversed(zeros) for amount in pair]
    x = F.pad(x, pads) if any(pads) else x
    sizes = x.shape[2:]
    index = torch.zeros(len(points), 1, dtype=torch.int64, device=x.device)
    for axis, (taps, step, spread) in enumerate(zip(route.kernel, route.stride, route.dilation, strict=True)):
        reach = torch.arange(taps, device=x.device) * spread
        place = points[:, axis, None] * step + reach
        index = (index * sizes[axis])[:, :, None] + place[:, None, :]
        index = index.flatten(1)
    seen = x.flatten(2)[:, :, index.flatten()].unflatten(2, index.shape)
    return seen.transpose(1, 2)


DENSE: dict[type[nn.Module], type[OctConv]] = {
    nn.Conv1d: OctConv1d,
    nn.Conv2d: OctConv2d,
    nn.Conv3d: OctConv3d,
    Conv2dSame: OctConv2d,
}
TRANSPOSED: dict[type[nn.Module], type[OctConvTranspose]] = {
    nn.ConvTranspose1d: OctConvTranspose1d,
    nn.ConvTranspose2d: OctConvTranspose2d,
    nn.ConvTranspose3d: OctConvTranspose3d,
}


def can_fit(module: nn.Module) -> bool:
    """Whether a layer's kind can be fitted; of dense ones not those that compute their weights when they run."""
    dense = type(module) in (*DENSE, *TRANSPOSED, nn.Linear) and not computed_by(module)
    return isinstance(module, OctBase | CompConv) or dense


def problems_of(module: nn.Module) -> list[Problem]:
    """The least-squares problems of a layer; none if its kind cannot be fitted."""
    if isinstance(module, OctLinear):
        return [OctLinearProblem(module, side) for side in dict.fromkeys(path[1] for path in module.paths)]
    if isinstance(module, OctConv | OctConvTranspose):
        kind = ConvProblem if isinstance(module, OctConv) else TransposedProblem
        return [kind(cast(Any, module), side) for side in dict.fromkeys(path[1] for path in module.paths)]
    if type(module) is nn.Linear:
        return [LinearProblem(module)]
    if type(module) not in (*DENSE, *TRANSPOSED):
        return []
    return [_dense_problem(module)]


def _dense_problem(module: nn.Module) -> Problem:
    """A dense convolution as an octave one without low channels, whose weights are the module's."""
    conv = cast(nn.Conv2d, module)
    layouts = Layout.dense(conv.in_channels), Layout.dense(conv.out_channels)
    if type(module) in TRANSPOSED:
        return TransposedProblem(TRANSPOSED[type(module)].from_conv(conv, *layouts), "h", conv)
    padding = "same_dynamic" if type(module) is Conv2dSame else None
    return ConvProblem(DENSE[type(module)].from_conv(conv, *layouts, padding=padding), "h", conv)
