"""The weights of a CompConv that takes a trained convolution's place: drawn by `from_conv`, fitted by `fit`.

There is no exact transfer. The first unit reads what the source reads and so can take the source's weights for the
channels which it stands for; everything behind it has less to read than the source, and is drawn or fitted.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.lazy import LazyModuleMixin
from torch.utils.hooks import RemovableHandle

from octify.compconv import CompConv, CompConv1d, CompConv2d, CompConv3d, Conv
from octify.errors import CalibrationError, ConversionError

_OF: dict[type[nn.Module], type[CompConv]] = {nn.Conv1d: CompConv1d, nn.Conv2d: CompConv2d, nn.Conv3d: CompConv3d}


def from_conv(
    conv: nn.Module, *, c0: int = 128, depth: int | None = None, shuffle_groups: int = 2, seed: int = 0
) -> CompConv:
    """A CompConv of a convolution's shape, device, dtype, mode and `requires_grad`, its weights keeping the variance.

    There is no exact transfer. The first unit reads what the source reads, so it takes the source's weights for
    the channels which it stands for; the others are drawn from `seed` so that for independent inputs of
    variance 1 every channel keeps, on average, the variance which it has in the source. Biases are taken over.
    Copied channels have no weights: they keep the input's variance.

    Raises:
        ConversionError: as `CompConv2d`, or `conv` computes something else than Conv1d, Conv2d or Conv3d do.
    """
    kind = kind_for(conv)
    if kind is None:
        raise ConversionError(f"{type(conv).__name__} cannot be a CompConv: expected a Conv1d, Conv2d or Conv3d itself")
    source = cast(Conv, conv)
    comp = kind(
        source.in_channels,
        source.out_channels,
        source.kernel_size,
        source.stride,
        source.padding,
        source.dilation,
        source.groups,
        source.bias is not None,
        source.padding_mode,
        "meta",  # so that the global random state is not touched
        source.weight.dtype,
        c0=c0,
        depth=depth,
        shuffle_groups=shuffle_groups,
    )
    comp.to_empty(device=source.weight.device)
    if not source.weight.is_meta:
        _initialise(comp, source, seed)
    for name, parameter in comp.named_parameters():
        like = source.bias if name.endswith("bias") else source.weight
        parameter.requires_grad_(like is not None and like.requires_grad)
    return comp.train(source.training)


def kind_for(conv: nn.Module) -> type[CompConv] | None:
    """The CompConv for a convolution; None for what is none, or computes something else than its base class does."""
    for base, kind in _OF.items():
        own = [getattr(type(conv), name, None) is getattr(base, name) for name in ("forward", "_conv_forward")]
        if isinstance(conv, base) and all(own) and not isinstance(conv, LazyModuleMixin):
            return kind
    return None


@torch.no_grad()
def _initialise(comp: CompConv, source: Conv, seed: int) -> None:
    # On the CPU and in float64 whatever the source is, so that a seed means the same weights everywhere.
    random = torch.Generator().manual_seed(seed)
    weight = source.weight.detach().to("cpu", torch.float64)
    power = weight.flatten(1).square().sum(1)
    rows = comp.stands_for()
    first, *others = [cast(Conv, unit) for unit in (*comp.units, comp.tail) if unit is not None]
    first.weight.copy_(weight[list(rows[0])])
    made = power[list(rows[0])]
    for unit, outputs in zip(others, rows[1:], strict=True):
        given = made
        if unit.groups == 1:
            given = torch.cat([torch.full_like(made, 1 / math.prod(comp.stride)), made])
        made = power.mean().repeat(unit.out_channels)
        made[: len(outputs)] = power[list(outputs)]
        drawn = torch.randn(unit.weight.shape, generator=random, dtype=torch.float64)
        taps = drawn.flatten(2).square().sum(2)
        variance = taps @ given if unit.groups == 1 else taps[:, 0] * given
        scale = (made / variance.clamp(min=torch.finfo(torch.float64).tiny)).sqrt()
        unit.weight.copy_(drawn * scale.reshape(-1, *[1] * (drawn.dim() - 1)))
    for unit, outputs in zip([first, *others], rows, strict=True):
        if unit.bias is not None and source.bias is not None:
            unit.bias.zero_()
            unit.bias[: len(outputs)] = source.bias.detach()[list(outputs)]


@dataclass(frozen=True)
class UnitFit:
    """What a fit did to one convolution: its squared error, relative to the targets' about their mean."""

    name: str
    before: float
    after: float


@torch.no_grad()
def fit(
    comp: CompConv, pairs: Sequence[tuple[Tensor, Tensor]], *, ridge: float = 0.01, positions: int = 8192, seed: int = 0
) -> tuple[UnitFit, ...]:
    """Fits a CompConv's convolutions to what a dense layer gives, in the order they compute; changes `comp` in place.

    Each channel of a unit, and of the tail, is fitted to the dense output channel which it becomes (`stands_for`),
    given its input as it really is: the copies, and the units that are fitted already. Ridge regression towards the
    present weights, in float64, with a penalty of `ridge` times the mean of the Gram matrix's diagonal.
    Copied channels have nothing to fit, trimmed ones keep their weights.

    `pairs` are batches of (input of the CompConv, output of the dense layer), (N, C_in, ...) and (N, C_out, ...);
    they are read once per convolution, at about `positions` output positions in all, drawn from `seed`.

    Raises:
        CalibrationError: no pairs, or outputs of another shape than the CompConv's.
    """
    if not pairs:
        raise CalibrationError("nothing to fit a CompConv to: expected at least one pair of input and dense output")
    names = [f"units.{level}" for level in range(len(comp.units))] + ["tail"] * (comp.tail is not None)
    done: list[UnitFit] = []
    for name, outputs in zip(names, comp.stands_for(), strict=True):
        if not outputs:
            continue  # a0 of the few channel counts that trim it away
        unit = cast(Conv, comp.get_submodule(name))
        random = torch.Generator().manual_seed(seed)
        gram, cross, power = 0.0, 0.0, 0.0
        for x, y in pairs:
            patches, targets = _sample(comp, unit, x, y, outputs, -(-positions // len(pairs)), random)
            gram, cross = gram + patches.mT @ patches, cross + patches.mT @ targets
            power = power + targets.square().sum()
        done.append(_solve(name, unit, cast(Tensor, gram), cast(Tensor, cross), cast(Tensor, power), ridge))
    return tuple(done)


def _sample(
    comp: CompConv, unit: Conv, x: Tensor, y: Tensor, outputs: Sequence[int], count: int, random: torch.Generator
) -> tuple[Tensor, Tensor]:
    """What `unit` reads at `count` output positions, and what it should give there.

    Returns:
        Float64 patches (1, P, C·taps + 1), the last column ones, and targets (1, P, K); depthwise (K, P, taps + 1) and
        (K, P, 1).
    """
    seen: list[Tensor] = []

    def keep(_: nn.Module, args: tuple[Tensor]) -> None:
        seen.append(args[0])

    handle: RemovableHandle = unit.register_forward_pre_hook(keep)
    try:
        found = cast(Tensor, comp(x))
    finally:
        handle.remove()
    if found.shape != y.shape:
        raise CalibrationError(f"the dense output is {tuple(y.shape)}, expected the CompConv's {tuple(found.shape)}")
    sizes = (y.shape[0], *y.shape[2:])
    index = torch.randperm(math.prod(sizes), generator=random)[:count].to(x.device)
    batch, *places = torch.unravel_index(index, sizes)
    patches = _patches(unit, seen[0], batch, places)
    targets = y.movedim(1, -1)[(batch, *places)][:, list(outputs)].double()
    if unit.groups > 1:
        patches, targets = patches[:, : len(outputs)].transpose(0, 1), targets.T[:, :, None]
    else:
        patches, targets = patches.flatten(1)[None], targets[None]
    return torch.cat([patches, torch.ones_like(patches[..., :1])], -1), targets


def _patches(unit: Conv, x: Tensor, batch: Tensor, places: Sequence[Tensor]) -> Tensor:
    """(N, C, ...) -> float64 (P, C, taps): what the convolution reads for the outputs at `places`, one per axis."""
    pads: list[int] = []
    for axis in reversed(range(len(places))):
        reach = unit.dilation[axis] * (unit.kernel_size[axis] - 1)
        padding: str | tuple[int, ...] = unit.padding
        if isinstance(padding, str):
            pads += [reach // 2, reach - reach // 2] if padding == "same" else [0, 0]
        else:
            pads += [padding[axis]] * 2
    padded = F.pad(x, pads, mode="constant" if unit.padding_mode == "zeros" else unit.padding_mode)
    index = [batch.reshape(-1, *[1] * len(places))]
    for axis, place in enumerate(places):
        taps = torch.arange(unit.kernel_size[axis], device=x.device) * unit.dilation[axis]
        at = place[:, None] * unit.stride[axis] + taps
        index.append(at.reshape(len(place), *[len(taps) if other == axis else 1 for other in range(len(places))]))
    return padded.movedim(1, -1)[tuple(index)].movedim(-1, 1).flatten(2).double()


def _solve(name: str, unit: Conv, gram: Tensor, cross: Tensor, power: Tensor, ridge: float) -> UnitFit:
    """Solves for the unit's weights and bias, from `gram` (G, F + 1, F + 1) and `cross` (G, F + 1, K) of `_sample`."""
    groups, features, outputs = cross.shape
    spread = (power - (cross[:, -1].square() / gram[:, -1:, -1]).sum()).clamp(min=torch.finfo(torch.float64).tiny)
    bias = unit.bias
    free = features if bias is not None else features - 1
    kept = groups * outputs
    weights = unit.weight[:kept].double().clone().reshape(groups, outputs, features - 1).mT
    if bias is not None:
        weights = torch.cat([weights, bias[:kept].double().reshape(groups, 1, outputs)], 1)
    gram, cross = gram[:, :free, :free], cross[:, :free]
    penalty = ridge * gram.diagonal(dim1=1, dim2=2)[:, : features - 1].mean(1, keepdim=True).repeat(1, free)
    penalty[:, features - 1 :] = 0  # the bias is free
    eased = gram + torch.diag_embed(penalty.clamp(min=torch.finfo(torch.float64).eps))
    change = cast(Tensor, torch.linalg.solve(eased, cross - gram @ weights))  # pyright: ignore[reportUnknownMemberType]
    fitted = weights + change
    unit.weight[:kept] = fitted[:, : features - 1].mT.reshape(unit.weight[:kept].shape).to(unit.weight.dtype)
    if bias is not None:
        bias[:kept] = fitted[:, -1].reshape(kept).to(bias.dtype)

    def error(solution: Tensor) -> float:
        return max(0.0, float((power + (solution * (gram @ solution - 2 * cross)).sum()) / spread))

    return UnitFit(name, error(weights), error(fitted))
