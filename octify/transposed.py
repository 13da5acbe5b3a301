"""Octave forms of transposed convolutions: `OctConvTranspose1d`, `OctConvTranspose2d`, `OctConvTranspose3d`.

The paper has none; these come from the fold. Input j sends tap t to the output `s·j + d·t - p`. With `x[j] =
x_l[⌊j/2⌋]`, input 2j+u reaches the low output `s·j + ⌊(s·u + d·t - p)/2⌋`: L→L is a transposed convolution of stride
s, exact. L→H is exact as well and keeps the kernel: a transposed convolution of stride 2s gives the share of the even
inputs, and the odd ones' is the same map moved by s. At an odd input size the low map's last element stands for one
input too many, which shows in the last rows and columns only.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from octify.bands import PATHS, Alpha, choose_layouts
from octify.errors import ConversionError
from octify.kernels import Axis, Taps, fold_taps, half, keep_taps
from octify.layout import Layout
from octify.octbase import Bands, OctBase
from octify.octconv import Size, as_tuple
from octify.resample import cut, pool_low

if TYPE_CHECKING:
    from typing_extensions import Self


@dataclass(frozen=True)
class _Lattice:
    """One path's transposed convolution; one entry per axis behind the channels.

    `pads` is put behind the input where its output would be too short; of the output, `front` elements are left out
    and the rest cut to size, along the `cut` dims.
    """

    taps: tuple[Taps, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    output_padding: tuple[int, ...]
    dilation: tuple[int, ...]
    pads: tuple[int, ...] = ()
    cut: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True)
class Upward:
    """A transposed convolution's geometry along one axis."""

    axis: Axis
    extra: int

    def out_size(self, size: int) -> int:
        """The output's size for an input of `size`."""
        return self.axis.stride * (size - 1) - 2 * self.axis.left + self.axis.span + self.extra + 1

    def low_end(self, taps: Taps) -> tuple[int, int, int, int, bool]:
        """`(padding, output_padding, pad, front, cut)` on the low grid, for sizes of either parity."""
        smallest = next(size for size in range(1, 2 * self.axis.left + 3) if self.out_size(size) > 0)
        sizes = range(smallest, smallest + 4)
        lasts = [(taps.stride * (half(size) - 1) + taps.last, half(self.out_size(size)) - 1) for size in sizes]
        missing = max(wanted - reached for reached, wanted in lasts)
        padding = min(-taps.first, max(0, -missing))
        front = -taps.first - padding
        extra = max(0, missing)
        # PyTorch refuses an output padding of a whole stride; a zero behind the input does the same.
        pad = 0 if extra < max(taps.stride, taps.dilation) else -(-extra // taps.stride)
        end = taps.stride * pad if pad else extra - padding
        exact = all(reached + end == wanted for reached, wanted in lasts)
        return padding, 0 if pad else extra, pad, front, bool(front) or not exact


def _low_lattice(rows: Sequence[Upward], still: int) -> _Lattice:
    """Low to low, and high to low behind D: `D ∘ transposed conv ∘ U`, from axis `still` on."""
    kept = [(keep_taps(row.axis), (row.axis.left, row.extra, 0, 0, False)) for row in rows[:still]]
    folded = [(taps, row.low_end(taps)) for row in rows[still:] for taps in [fold_taps(row.axis)]]
    places = kept + folded
    taps = tuple(tap for tap, _ in places)
    pads = tuple(amount for _, (_, _, pad, _, _) in reversed(places) for amount in (0, pad))
    dims = range(-len(places), 0)
    return _Lattice(
        taps,
        tuple(tap.stride for tap in taps),
        tuple(padding for _, (padding, *_) in places),
        tuple(extra for _, (_, extra, *_) in places),
        tuple(tap.dilation for tap in taps),
        pads if any(pads) else (),
        tuple((dim, front) for dim, (_, (_, _, _, front, cut)) in zip(dims, places, strict=True) if cut),
    )


class OctConvTranspose(OctBase):
    """An octave form of a `torch.nn` transposed convolution; see `OctConvTranspose2d`."""

    transposed = True

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Size,
        stride: Size = 1,
        padding: Size = 0,
        output_padding: Size = 0,
        groups: int = 1,
        bias: bool = True,
        dilation: Size = 1,
        padding_mode: str = "zeros",
        device: Any = None,
        dtype: Any = None,
        *,
        alpha: Alpha = 0.0,
        in_layout: Layout | None = None,
        out_layout: Layout | None = None,
        paths: Iterable[str] = PATHS,
    ) -> None:
        super().__init__()
        if padding_mode != "zeros":
            raise ConversionError(f'padding_mode is "{padding_mode}": a transposed convolution only has "zeros"')
        layouts = choose_layouts((in_channels, out_channels), groups, alpha, (in_layout, out_layout))
        self._configure(*layouts, groups, paths)
        self._plan(kernel_size, stride, padding, output_padding, dilation)
        self._draw((in_channels, out_channels // groups, *self.kernel_size), bias, device, dtype)

    @classmethod
    def from_conv(
        cls,
        conv: nn.Module,
        in_layout: Layout,
        out_layout: Layout,
        *,
        paths: Iterable[str] = PATHS,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
    ) -> Self:
        """An octave form with a trained transposed convolution's weights; arguments as in `OctConv2d.from_conv`."""
        source = cast(Any, conv)
        choose_layouts((source.in_channels, source.out_channels), source.groups, 0.0, (in_layout, out_layout))
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer._configure(in_layout, out_layout, source.groups, paths)
        layer._plan(source.kernel_size, source.stride, source.padding, source.output_padding, source.dilation)
        layer.place_weights(source.weight if weight is None else weight, source.bias if bias is None else bias)
        return layer.train(source.training)

    def _plan(self, kernel_size: Size, stride: Size, padding: Size, output_padding: Size, dilation: Size) -> None:
        self.kernel_size, self.stride = as_tuple(kernel_size, self.dim), as_tuple(stride, self.dim)
        self.padding, self.output_padding = as_tuple(padding, self.dim), as_tuple(output_padding, self.dim)
        self.dilation = as_tuple(dilation, self.dim)
        geometry = zip(self.kernel_size, self.stride, self.dilation, self.padding, self.output_padding, strict=True)
        rows = [Upward(Axis(k, s, d, p, p), extra) for k, s, d, p, extra in geometry]
        still = self.dim - self.spatial
        self.rows = tuple(rows[still:])  # the halved axes
        taps = tuple(keep_taps(row.axis) for row in rows)
        low = _low_lattice(rows, still)
        moved = (0,) * self.spatial
        wide = self.stride[:still] + tuple(2 * step for step in self.stride[still:])
        routes = {
            "hh": _Lattice(taps, self.stride, self.padding, self.output_padding, self.dilation),
            "hl": low,
            "lh": _Lattice(
                taps, wide, self.padding[:still] + moved, self.output_padding[:still] + moved, self.dilation
            ),
            "ll": low,
        }
        self.routes = {path: routes[path] for path in self.paths}
        self._taps = {path: lattice.taps for path, lattice in self.routes.items()}

    def out_size(self, high: Tensor) -> tuple[int, ...]:
        """The high output's size on the halved axes, which is the source's, for a high input."""
        sizes = high.shape[-self.spatial :]
        return tuple(row.out_size(size) for row, size in zip(self.rows, sizes, strict=True))

    def forward(self, high: Bands, low: Tensor | None = None) -> Bands:
        """Bands to bands; a dense side is one tensor instead of the pair."""
        high, low = self._bands(high, low)
        size = self.out_size(high)
        if not self._gives_low:
            return self._to_high(high, low, size)
        low_out = self._to_low(high, low, size)
        if not self._gives_high:
            return self._carrier(low_out, size), low_out
        return self._to_high(high, low, size), low_out

    def spread_taps(self, path: str, x: Tensor, size: Sequence[int]) -> Tensor:
        """What each tap of a path's kernel would send to the outputs, if it were 1: (N, C·taps, …)."""
        kernel = [len(tap.matrix) for tap in self._taps[path]]
        taps = math.prod(kernel)
        single = torch.eye(taps, dtype=x.dtype, device=x.device).reshape(1, taps, *kernel)
        seen = self._send(path, x, single.expand(x.shape[1], *single.shape[1:]), None, x.shape[1], size)
        return self._spread(seen, size) if path == "lh" else seen

    def _run(self, path: str, x: Tensor, bias: Tensor | None, size: Sequence[int]) -> Tensor:
        weight = cast(Tensor, getattr(self, f"weight_{path}"))
        return self._send(path, x, weight, bias, self._groups[path], size)

    def _send(
        self, path: str, x: Tensor, weight: Tensor, bias: Tensor | None, groups: int, size: Sequence[int]
    ) -> Tensor:
        plan = self.routes[path]
        if plan.pads:
            x = F.pad(x, plan.pads)
        x = self.conv(x, weight, bias, plan.stride, plan.padding, plan.output_padding, groups, plan.dilation)
        for dim, front in plan.cut:
            x = cut(x, dim, front, half(size[dim]))
        return x

    def _to_high(self, high: Tensor, low: Tensor | None, size: Sequence[int]) -> Tensor:
        if self.weight_lh is None or low is None:
            return self._run("hh", high, self.bias_h, size)
        raised = self._spread(self._run("lh", low, None, size), size)
        if self.weight_hh is not None:
            return self._run("hh", high, self.bias_h, size).add_(raised)
        return raised if self.bias_h is None else raised + self.bias_h.view(-1, *(1,) * self.dim)

    def _spread(self, even: Tensor, size: Sequence[int]) -> Tensor:
        """Adds the odd inputs' share, the even ones' moved by the stride, and cuts what the source's padding cuts."""
        for dim, length in enumerate(size, -len(size)):
            stride, padding = self.stride[dim], self.padding[dim]
            front = max(stride - padding, 0)
            behind = max(stride + self.output_padding[dim] - padding, 0)
            wide = F.pad(even, [0, 0] * (-dim - 1) + [front, behind])
            start = padding + front
            even = cut(wide, dim, start, length) + cut(wide, dim, start - stride, length)
        return even

    def _to_low(self, high: Tensor, low: Tensor | None, size: Sequence[int]) -> Tensor:
        if self.weight_hl is None and low is not None:
            return self._run("ll", low, self.bias_l, size)
        pooled = pool_low(high, self.spatial)
        if self.weight_ll is None or low is None:
            return self._run("hl", pooled, self.bias_l, size)
        return self._run("ll", low, self.bias_l, size).add_(self._run("hl", pooled, None, size))

    def extra_repr(self) -> str:
        """Channels, layouts and geometry, as far as they are not the default."""
        parts = [
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}",
            f"padding={self.padding}",
            f"output_padding={self.output_padding}" if max(self.output_padding) else "",
            f"dilation={self.dilation}" if max(self.dilation) > 1 else "",
            f"groups={self.groups}" if self.groups > 1 else "",
            "bias=False" if self.bias_h is None and self.bias_l is None else "",
            f"layout={self.in_layout}→{self.out_layout}, paths={self.paths}",
        ]
        return ", ".join(part for part in parts if part)


class OctConvTranspose1d(OctConvTranspose):
    """`OctConvTranspose2d` for maps of one axis: high (N, C, L), low (N, C, ⌈L/2⌉)."""

    dim, spatial = 1, 1
    conv: ClassVar[Any] = staticmethod(F.conv_transpose1d)


class OctConvTranspose2d(OctConvTranspose):
    """Octave form of `nn.ConvTranspose2d`, for bands (N, Ch, H, W) and (N, Cl, ⌈H/2⌉, ⌈W/2⌉).

    Arguments as in `OctConv2d`; kernels are folded for any geometry, and the high output has the source's size.

    >>> import torch
    >>> layer = OctConvTranspose2d(64, 32, 2, stride=2, alpha=0.25)
    >>> [tuple(band.shape) for band in layer(torch.zeros(1, 48, 7, 7), torch.zeros(1, 16, 4, 4))]
    [(1, 24, 14, 14), (1, 8, 7, 7)]
    """

    dim, spatial = 2, 2
    conv: ClassVar[Any] = staticmethod(F.conv_transpose2d)


class OctConvTranspose3d(OctConvTranspose):
    """`OctConvTranspose2d` for maps with a time axis (N, C, T, H, W): halves H and W; time keeps its geometry."""

    dim, spatial = 3, 2
    conv: ClassVar[Any] = staticmethod(F.conv_transpose3d)
