"""Norms whose statistics run over both bands: those of the map that the bands stand for, U of the low one included.

A norm over positions (group norm and its kin) scales each channel by a number, so its low band stays constant on 2x2
blocks and the result is exact. A norm over channels scales each position, at full resolution: `D` of the true result
is `x_l · D(1/σ) - D(μ/σ)`, exact as well.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from octify.layers import Channels
from octify.layout import Layout
from octify.resample import pool_low, up_to

Moments = tuple[Tensor, Tensor]
Optional = Tensor | None


def band_moments(high: Tensor, low: Tensor, spatial: int) -> tuple[Moments, Moments]:
    """(mean, variance) over all positions, (N, C) each, of the high band and of U of the low one.

    A low position counts as often as the positions that it stands for: 4 times, 2 and 1 at the last row and column of
    an odd size.
    """
    dims = tuple(range(2, high.dim()))
    none = low.new_zeros(low.shape[0], 0)
    of_high = moments(high) if high.shape[1] else (none, none)
    size = high.shape[-spatial:]
    if not torch.compiler.is_exporting() and all(length % 2 == 0 for length in size):
        return of_high, moments(low)
    share = position_shares(size, low)
    frames = math.prod(low.shape[2 : low.dim() - spatial])
    mean_low = (low * share).sum(dims, keepdim=True) / frames
    var_low = ((low - mean_low).square() * share).sum(dims) / frames
    return of_high, (mean_low.flatten(1), var_low)


def moments(x: Tensor) -> Moments:
    """(mean, variance) over all positions, (N, C) each."""
    dims = tuple(range(2, x.dim()))
    if x.device.type != "cpu" or torch.compiler.is_compiling() or cast(Any, torch.jit).is_tracing():
        var, mean = torch.var_mean(x, dims, correction=0)
        return mean, var
    return cast(Moments, _Moments.apply(x))


class _Moments(torch.autograd.Function):
    """The same in two passes and one back: on maps laid out channels last `var_mean` takes ten times as long."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Moments:  # pyright: ignore[reportIncompatibleMethodOverride]
        dims = tuple(range(2, x.dim()))
        mean = x.mean(dims, keepdim=True)
        return mean.flatten(1), (x - mean).square().mean(dims)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Moments) -> None:
        """Keeps the map and its means."""
        ctx.save_for_backward(*inputs, output[0])
        ctx.save_for_forward(*inputs, output[0])

    @staticmethod
    def backward(ctx: Any, mean: Tensor, var: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, middle = ctx.saved_tensors
        shape = (*middle.shape, *(1,) * (x.dim() - 2))
        share = 1 / math.prod(x.shape[2:])
        factor = 2 * share * var
        return torch.addcmul((share * mean - factor * middle).view(shape), x, factor.view(shape))

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor) -> Moments:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, middle = ctx.saved_tensors
        dims = tuple(range(2, x.dim()))
        centred = x - middle.view(*middle.shape, *(1,) * (x.dim() - 2))
        return tangent.mean(dims), 2 * (centred * tangent).mean(dims)


def position_shares(size: Sequence[int], like: Tensor) -> Tensor:
    """What share of a map of `size` each low position stands for; they sum to 1. Shape (⌈H/2⌉, ⌈W/2⌉)."""
    shares = like.new_ones(())
    for length in size:
        start = 2 * torch.arange((length + 1) // 2, device=like.device)
        shares = shares.unsqueeze(-1) * (length - start).clamp(max=2).to(like.dtype) / length
    return shares


def _wide(x: Tensor) -> Tensor:
    """Half precision has too few digits for statistics."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def _root(x: Tensor) -> Tensor:
    """The square root, with a gradient of 0 at 0, as a norm has it."""
    return x.clamp_min(torch.finfo(x.dtype).tiny).sqrt()


class BandNorm(nn.Module):
    """What the norms share; parameters keep the source's names and channel order.

    Bands are (N, C, …, H, W), or with `axis=-1` channels last. `weight` and `bias` may be given to the call instead.
    """

    weight: nn.Parameter | None
    bias: nn.Parameter | None

    def __init__(self, layout: Layout, spatial: int, axis: int = 1) -> None:
        super().__init__()
        self.layout, self.spatial, self.axis = layout, spatial, axis
        self.pick_high = Channels(layout.high_index, [layout.channels]) if layout.high else None
        self.pick_low = Channels(layout.low_index, [layout.channels])
        self.register_parameter("weight", None)
        self.register_parameter("bias", None)
        self.act: nn.Module | None = None

    def take(self, source: nn.Module, *more: str) -> BandNorm:
        """Takes over the parameters and the activation of a norm (of a copy: they are not cloned)."""
        for name in ("weight", "bias", *more):
            self.register_parameter(name, getattr(source, name, None))
        act = getattr(source, "act", None)
        self.act = act if isinstance(act, nn.Module) else None
        return self.train(source.training)

    def pick(self, vector: Tensor, low: bool) -> Tensor:
        """A band's part of a (N, C) or (C,) tensor."""
        rows = vector if vector.dim() == 2 else vector.unsqueeze(0)
        if low:
            return self.pick_low(rows)
        return self.pick_high(rows) if self.pick_high is not None else rows.narrow(1, 0, 0)

    def pick_like(self, vector: Tensor, band: Tensor, low: bool) -> Tensor:
        """A band's part of a (N, C) or (C,) tensor, in the shape that broadcasts over the band."""
        part = self.pick(vector, low)
        return part.reshape(*part.shape, *(1,) * (band.dim() - 2))

    def bands_first(self, high: Tensor, low: Tensor) -> tuple[Tensor, Tensor]:
        """The bands with channels at axis 1, in at least single precision."""
        return _wide(high.movedim(self.axis, 1)), _wide(low.movedim(self.axis, 1))

    def extra_repr(self) -> str:
        """Layout and axes."""
        return f"{self.layout}, spatial={self.spatial}, axis={self.axis}"


class PositionsNorm(BandNorm):
    """Norms by statistics over all positions: one scale and shift a channel and sample."""

    def __init__(self, layout: Layout, spatial: int, axis: int = 1) -> None:
        super().__init__(layout, spatial, axis)
        self.order = Channels(layout.order, [layout.high, layout.low])

    def forward(
        self, high: Tensor, low: Tensor, weight: Optional = None, bias: Optional = None
    ) -> tuple[Tensor, Tensor]:
        """Both bands, normalised."""
        wide = self.bands_first(high, low)
        first, second = band_moments(*wide, self.spatial)
        mean, var = (self.order(a, b) for a, b in zip(first, second, strict=True))
        scale, shift = self.factors(mean, var, math.prod(wide[0].shape[2:]))
        weight, bias = (own if given is None else given for own, given in ((self.weight, weight), (self.bias, bias)))
        if weight is not None:
            scale, shift = scale * weight, shift * weight
        if bias is not None:
            shift = shift + bias
        out = [self._scaled(band, scale, shift, bool(index)) for index, band in enumerate(wide)]
        return out[0].movedim(1, self.axis).to(high.dtype), out[1].movedim(1, self.axis).to(low.dtype)

    def _scaled(self, band: Tensor, scale: Tensor, shift: Tensor, low: bool) -> Tensor:
        factor, offset = (self.pick_like(value, band, low) for value in (scale, shift))
        return self.after(torch.addcmul(offset, self.before(band, low), factor), low)

    def factors(self, mean: Tensor, var: Tensor, positions: int) -> tuple[Tensor, Tensor]:
        """Scale and shift, (N, C) each, from the channels' moments in source order."""
        raise NotImplementedError

    def before(self, band: Tensor, low: bool) -> Tensor:
        """What happens to a band ahead of the scale."""
        return band

    def after(self, band: Tensor, low: bool) -> Tensor:
        """What happens to a band behind the scale."""
        return band if self.act is None else self.act(band)


def group_moments(mean: Tensor, var: Tensor, groups: int) -> Moments:
    """Mean and variance over groups of channels, (N, C) to (N, C), from those of the channels."""
    samples, channels = mean.shape
    means, variances = (value.reshape(samples, groups, channels // groups) for value in (mean, var))
    middle = means.mean(2, keepdim=True)
    spread = (variances + (means - middle).square()).mean(2, keepdim=True)
    return middle.expand_as(means).reshape(mean.shape), spread.expand_as(means).reshape(mean.shape)


class OctGroupNorm(PositionsNorm):
    """`nn.GroupNorm` of both bands; with as many groups as channels an instance norm."""

    def __init__(self, layout: Layout, spatial: int, groups: int, eps: float) -> None:
        super().__init__(layout, spatial)
        self.groups, self.eps = groups, eps

    def factors(self, mean: Tensor, var: Tensor, positions: int) -> tuple[Tensor, Tensor]:
        """`(x - μ) / σ`."""
        middle, spread = group_moments(mean, var, self.groups)
        scale = (spread + self.eps).rsqrt()
        return scale, -middle * scale


class OctEvoNorm(PositionsNorm):
    """timm's EvoNorm S0, S1 and S2: an activation over the standard deviation (or, with `rms`, its kin) of a group."""

    v: nn.Parameter | None

    def __init__(self, layout: Layout, spatial: int, groups: int, eps: float, rms: bool, divides: bool) -> None:
        super().__init__(layout, spatial)
        self.groups, self.eps, self.rms, self.divides = groups, eps, rms, divides
        self.register_parameter("v", None)

    def factors(self, mean: Tensor, var: Tensor, positions: int) -> tuple[Tensor, Tensor]:
        """`1 / σ`, or nothing where the source is built without its activation."""
        if not self.divides:
            return torch.ones_like(mean), torch.zeros_like(mean)
        middle, spread = group_moments(mean, var, self.groups)
        scale = (spread + middle.square() * self.rms + self.eps).rsqrt()
        return scale, torch.zeros_like(scale)

    def before(self, band: Tensor, low: bool) -> Tensor:
        """The activation, which may have a factor a channel."""
        if self.v is not None:
            return band * (band * self.pick_like(self.v, band, low)).sigmoid()
        return band if self.act is None else self.act(band)

    def after(self, band: Tensor, low: bool) -> Tensor:
        """Nothing."""
        return band


class OctFilterResponse(PositionsNorm):
    """timm's filter response norms: a channel over its root mean square, then a threshold or an activation."""

    tau: nn.Parameter | None

    def __init__(self, layout: Layout, spatial: int, eps: float) -> None:
        super().__init__(layout, spatial)
        self.eps = eps
        self.register_parameter("tau", None)

    def factors(self, mean: Tensor, var: Tensor, positions: int) -> tuple[Tensor, Tensor]:
        """`1 / rms`."""
        scale = (var + mean.square() + self.eps).rsqrt()
        return scale, torch.zeros_like(scale)

    def after(self, band: Tensor, low: bool) -> Tensor:
        """The learned threshold, or the activation."""
        if self.tau is None:
            return super().after(band, low)
        return torch.maximum(band, self.pick_like(self.tau, band, low))


class OctGlobalResponse(PositionsNorm):
    """timm's `GlobalResponseNorm`: `x + bias + weight · x · n`, n a channel's 2-norm over the mean of all of them."""

    def __init__(self, layout: Layout, spatial: int, axis: int, eps: float) -> None:
        super().__init__(layout, spatial, axis)
        self.eps = eps

    def factors(self, mean: Tensor, var: Tensor, positions: int) -> tuple[Tensor, Tensor]:
        """`n`; the forward pass adds the input."""
        norm = _root((var + mean.square()) * positions)
        scale = norm / (norm.mean(1, keepdim=True) + self.eps)
        return scale, torch.zeros_like(scale)

    def forward(
        self, high: Tensor, low: Tensor, weight: Optional = None, bias: Optional = None
    ) -> tuple[Tensor, Tensor]:
        """Both bands with their share of the response added."""
        first, second = super().forward(high, low, weight, bias)
        return high + first, low + second


class OctChannelNorm(BandNorm):
    """Norms over the channels of each position: `kind` "layer", "rms", "simple" (timm) or "unit" (`F.normalize`)."""

    def __init__(self, layout: Layout, spatial: int, axis: int, kind: str, eps: float) -> None:
        super().__init__(layout, spatial, axis)
        self.kind, self.eps = kind, eps

    def forward(
        self, high: Tensor, low: Tensor, weight: Optional = None, bias: Optional = None
    ) -> tuple[Tensor, Tensor]:
        """Both bands, normalised by statistics over all channels at full resolution."""
        wide_high, wide_low = self.bands_first(high, low)
        size = wide_high.shape[-self.spatial :]
        parts = [torch.var_mean(band, 1, correction=0, keepdim=True) for band in (wide_high, wide_low) if band.shape[1]]
        var_low, mean_low = parts[-1]
        raised = up_to(mean_low, size)
        mean, var = raised, up_to(var_low, size)
        if len(parts) > 1:
            mean, var = self._joined(parts[0][1], parts[0][0], raised, var)
        scale = self._scale(mean, var)
        if self.kind == "layer":
            # Around its own mean, so that a large common offset costs no digits.
            low_offset = pool_low((raised - mean) * scale, self.spatial)
            out_low = torch.addcmul(low_offset, wide_low - mean_low, pool_low(scale, self.spatial))
            out_high = (wide_high - mean) * scale
        else:
            out_high, out_low = wide_high * scale, wide_low * pool_low(scale, self.spatial)
        weight, bias = (own if given is None else given for own, given in ((self.weight, weight), (self.bias, bias)))
        out = [self._affine(band, weight, bias, bool(index)) for index, band in enumerate((out_high, out_low))]
        return out[0].movedim(1, self.axis).to(high.dtype), out[1].movedim(1, self.axis).to(low.dtype)

    def _joined(self, mean_high: Tensor, var_high: Tensor, mean_low: Tensor, var_low: Tensor) -> Moments:
        share = self.layout.low / self.layout.channels
        mean = torch.lerp(mean_high, mean_low, share)
        var = (1 - share) * (var_high + (mean_high - mean).square()) + share * (var_low + (mean_low - mean).square())
        return mean, var

    def _scale(self, mean: Tensor, var: Tensor) -> Tensor:
        channels = self.layout.channels
        if self.kind == "layer":
            return (var + self.eps).rsqrt()
        if self.kind == "simple":
            return (var * (channels / (channels - 1)) + self.eps).rsqrt()
        square = var + mean.square()
        if self.kind == "rms":
            return (square + self.eps).rsqrt()
        return _root(square * channels).clamp_min(self.eps).reciprocal()

    def _affine(self, band: Tensor, weight: Optional, bias: Optional, low: bool) -> Tensor:
        factor, offset = (None if value is None else self.pick_like(value, band, low) for value in (weight, bias))
        if factor is not None and offset is not None:
            band = torch.addcmul(offset, band, factor)
        elif factor is not None:
            band = band * factor
        elif offset is not None:
            band = band + offset
        return band if self.act is None else self.act(band)
