"""Octave convolutions: `OctConv1d`, `OctConv2d`, `OctConv3d`.

`Y^H = f(X^H; W_HH) + up(f(X^L; W_LH))`, `Y^L = f(X^L; W_LL) + f(pool(X^H); W_HL)`: Chen et al., "Drop an Octave",
ICCV 2019 (arXiv 1904.05049), equation 4. The parameters are as many as in the dense convolution.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, cast

from torch import Tensor, nn
from torch.nn import functional as F

from octify.bands import PATHS, Alpha, choose_layouts
from octify.errors import ConversionError
from octify.kernels import Axis
from octify.layout import Layout
from octify.octbase import Bands, OctBase
from octify.resample import add_raised, average, read_both, up_to
from octify.routes import Route, fold_high, fold_low, paper_route, run_route, source_route

if TYPE_CHECKING:
    from typing_extensions import Self

Size = int | tuple[int, ...]
KERNELS = ("fold", "sharp", "paper")
DOWNSAMPLES = ("pool", "stride")
PADDING_MODES = ("zeros", "reflect", "replicate", "circular")


def conv_axes(kernel: Sequence[int], stride: Sequence[int], padding: Size | str, dilation: Sequence[int]) -> list[Axis]:
    """A convolution's geometry, axis by axis; `padding` as `torch.nn` takes it, or "same_dynamic" for TensorFlow's."""
    rows = list(zip(kernel, stride, dilation, strict=True))
    if padding == "same_dynamic":
        return [Axis.same(k, s, d) for k, s, d in rows]
    if padding == "same":
        totals = [d * (k - 1) for k, _, d in rows]
        return [Axis(k, s, d, total // 2, total - total // 2) for (k, s, d), total in zip(rows, totals, strict=True)]
    if isinstance(padding, str) and padding != "valid":
        raise ConversionError(f'padding is "{padding}": expected numbers, "same", "valid" or "same_dynamic"')
    amounts = (0,) * len(rows) if isinstance(padding, str) else as_tuple(padding, len(rows))
    return [Axis(k, s, d, p, p) for (k, s, d), p in zip(rows, amounts, strict=True)]


def as_tuple(value: Size, axes: int) -> tuple[int, ...]:
    """A number per axis."""
    return (int(value),) * axes if isinstance(value, int) else tuple(int(entry) for entry in value)


def fits_paper(conv: nn.Module, padding: Size | str | None = None) -> str | None:
    """Why the paper's kernels do not fit a convolution, or None where they do.

    They keep the k×k kernel on both grids behind a pooling, so padding must be half: `2·padding = dilation·(kernel-1)`
    along the axes that are halved. `padding` stands in for the module's own, as in `from_conv`.
    """
    geometry = cast(Any, conv)
    if getattr(geometry, "transposed", False):
        return "the paper has no transposed convolution"
    given = geometry.padding if padding is None else padding
    axes = conv_axes(geometry.kernel_size, geometry.stride, given, geometry.dilation)
    return misfit_paper(axes[-min(2, len(axes)) :])


def misfit_paper(axes: Sequence[Axis]) -> str | None:
    """Why the halved axes do not fit the paper's kernels, or None."""
    for axis in axes:
        if axis.span % 2:
            return f"kernel {axis.kernel} with dilation {axis.dilation} has no middle"
        if not axis.dynamic and 2 * axis.left != axis.span:
            return f"padding {axis.left} is not half of kernel {axis.kernel}: {axis.span // 2} would be"
    return None


class OctConv(OctBase):
    """An octave convolution in the place of a `torch.nn` one; see `OctConv2d`."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Size,
        stride: Size = 1,
        padding: Size | str = 0,
        dilation: Size = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        device: Any = None,
        dtype: Any = None,
        *,
        alpha: Alpha = 0.0,
        in_layout: Layout | None = None,
        out_layout: Layout | None = None,
        kernels: str = "paper",
        downsample: str = "pool",
        paths: Iterable[str] = PATHS,
    ) -> None:
        super().__init__()
        layouts = choose_layouts((in_channels, out_channels), groups, alpha, (in_layout, out_layout))
        kernel = as_tuple(kernel_size, self.dim)
        self._shape(kernel, stride, padding, dilation, padding_mode)
        self._configure(*layouts, groups, paths)
        self._plan(kernels, downsample)
        self._draw((out_channels, in_channels // groups, *kernel), bias, device, dtype)

    @classmethod
    def from_conv(
        cls,
        conv: nn.Module,
        in_layout: Layout,
        out_layout: Layout,
        *,
        kernels: str = "fold",
        downsample: str = "pool",
        paths: Iterable[str] = PATHS,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        padding: Size | str | None = None,
    ) -> Self:
        """An octave convolution with a trained convolution's weights.

        `conv` is `nn.Conv…` or anything with its attributes. `weight` and `bias` stand in for the module's own (of a
        weight-standardised convolution, say), `padding` for its padding: "same_dynamic" is `timm.layers.Conv2dSame`.

        Raises:
            ConversionError: layouts that do not fit the convolution, or kernels "paper" where they do not fit it.
        """
        source = cast(Any, conv)
        choose_layouts((source.in_channels, source.out_channels), source.groups, 0.0, (in_layout, out_layout))
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer._shape(
            as_tuple(source.kernel_size, cls.dim),
            source.stride,
            source.padding if padding is None else padding,
            source.dilation,
            source.padding_mode,
        )
        layer._configure(in_layout, out_layout, source.groups, paths)
        layer._plan(kernels, downsample)
        layer.place_weights(source.weight if weight is None else weight, source.bias if bias is None else bias)
        return layer.train(source.training)

    def _shape(
        self, kernel: tuple[int, ...], stride: Size, padding: Size | str, dilation: Size, padding_mode: str
    ) -> None:
        if padding_mode not in PADDING_MODES:
            raise ConversionError(f'padding_mode is "{padding_mode}": expected one of {", ".join(PADDING_MODES)}')
        self.kernel_size, self.padding_mode = kernel, padding_mode
        self.stride, self.dilation = as_tuple(stride, self.dim), as_tuple(dilation, self.dim)
        self.padding = padding if isinstance(padding, str) else as_tuple(padding, self.dim)
        axes = conv_axes(kernel, self.stride, self.padding, self.dilation)
        self._axes, self._halved = axes, axes[-self.spatial :]

    def _plan(self, kernels: str, downsample: str) -> None:
        """Works out every path's route."""
        if kernels not in KERNELS:
            raise ConversionError(f'kernels is "{kernels}": expected one of {", ".join(KERNELS)}')
        if downsample not in DOWNSAMPLES:
            raise ConversionError(f'downsample is "{downsample}": expected one of {", ".join(DOWNSAMPLES)}')
        self.kernels, self.downsample = kernels, downsample
        self._pool: tuple[int, ...] = ()
        plain = (0,) * self.dim if self.padding in ("valid", "same_dynamic") else self.padding
        routes = {"hh": source_route(self._axes, self.padding_mode, plain)}
        if kernels == "paper":
            routes |= self._paper_routes()
        else:
            sharp = kernels == "sharp"
            routes["ll"] = routes["hl"] = fold_low(self._axes, self.spatial, self.padding_mode, sharp)
            routes["lh"] = fold_high(self._axes, self.spatial, self.padding_mode, sharp)
        self.routes = {path: routes[path] for path in self.paths}
        self._taps = {path: route.taps for path, route in self.routes.items()}
        self._lift = "lh" in self.paths and any(routes["lh"].low)

    def _paper_routes(self) -> dict[str, Route]:
        misfit = misfit_paper(self._halved)
        strides = [axis.stride for axis in self._halved]
        if misfit and (self._takes_low or self._gives_low or max(strides) > 1):
            raise ConversionError(f'the paper\'s kernels do not fit: {misfit}; use kernels="fold"')
        pools = self.downsample == "pool" and max(strides) > 1
        if pools:
            self._pool = (1,) * (self.dim - self.spatial) + tuple(strides)
        sides = {"h": "high", "l": "low"}
        return {
            path: paper_route(self._axes, self.spatial, self.padding_mode, self.downsample, *(sides[s] for s in path))
            for path in PATHS
            if (pools or path != "hh") and not misfit
        }

    def out_size(self, high: Tensor) -> tuple[int, ...]:
        """The high output's size on the halved axes, which is the source's, for a high input."""
        sizes = high.shape[-self.spatial :]
        return tuple(axis.out_size(size) for axis, size in zip(self._halved, sizes, strict=True))

    def forward(self, high: Bands, low: Tensor | None = None) -> Bands:
        """Bands to bands; a dense side is one tensor instead of the pair."""
        high, low = self._bands(high, low)
        size = self.out_size(high)
        if self._pool and self._takes_high:
            high = average(high, self._pool)
        if not self._gives_low:
            return self._to_high(high, low, size)
        if self.weight_hl is None and low is not None:
            low_out = self._run("ll", low, self.bias_l, size)
        else:
            high, pooled = read_both(high, self.spatial)
            low_out = self._to_low(pooled, low, size)
        if not self._gives_high:
            return self._carrier(low_out, size), low_out
        return self._to_high(high, low, size), low_out

    def _run(self, path: str, x: Tensor, bias: Tensor | None, size: tuple[int, ...]) -> Tensor:
        weight = cast(Tensor, getattr(self, f"weight_{path}"))
        return run_route(self.routes[path], self.conv, x, weight, bias, self._groups[path], size)

    def _to_high(self, high: Tensor, low: Tensor | None, size: tuple[int, ...]) -> Tensor:
        if self.weight_lh is None or low is None:
            return self._run("hh", high, self.bias_h, size)
        if self.weight_hh is None:
            lifted = self._run("lh", low, self.bias_h, size)
            return up_to(lifted, size) if self._lift else lifted
        out = self._run("hh", high, self.bias_h, size)
        lifted = self._run("lh", low, None, size)
        # In place: the convolution's output is nobody else's, and its backward pass does not need it.
        return add_raised(out, lifted, size) if self._lift else out.add_(lifted)

    def _to_low(self, pooled: Tensor, low: Tensor | None, size: tuple[int, ...]) -> Tensor:
        if self.weight_ll is None or low is None:
            return self._run("hl", pooled, self.bias_l, size)
        return self._run("ll", low, self.bias_l, size).add_(self._run("hl", pooled, None, size))

    def extra_repr(self) -> str:
        """Channels, layouts and geometry, as far as they are not the default."""
        parts = [
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}",
            f"padding={self.padding!r}",
            f"dilation={self.dilation}" if max(self.dilation) > 1 else "",
            f"groups={self.groups}" if self.groups > 1 else "",
            "bias=False" if self.bias_h is None and self.bias_l is None else "",
            f"padding_mode={self.padding_mode!r}" if self.padding_mode != "zeros" else "",
            f"layout={self.in_layout}→{self.out_layout}, kernels={self.kernels!r}",
            f"downsample={self.downsample!r}" if self.kernels == "paper" and max(self.stride) > 1 else "",
            f"paths={self.paths}",
        ]
        return ", ".join(part for part in parts if part)


class OctConv1d(OctConv):
    """`OctConv2d` for maps of one axis: high (N, C, L), low (N, C, ⌈L/2⌉)."""

    dim, spatial = 1, 1
    conv: ClassVar[Any] = staticmethod(F.conv1d)


class OctConv2d(OctConv):
    """Octave convolution of bands (N, Ch, H, W) and (N, Cl, ⌈H/2⌉, ⌈W/2⌉), in the place of `nn.Conv2d`.

    `alpha`, one share of low channels or `(alpha_in, alpha_out)`, makes the last channels low; `in_layout` and
    `out_layout` say it channel by channel. The high output has the size that the dense convolution's would have.

    `kernels="paper"` keeps the k×k kernel on both grids and needs half padding; a stride is average pooling before
    (`downsample="pool"`) or a stride (`"stride"`). `kernels="fold"` is the arithmetic of `octify.kernels`, for any
    geometry: exact where low maps are constant on 2 by 2 blocks; "sharp" weighs the same taps for maps that are not, as
    a trained network's. `paths` leaves paths between the bands out, save the only one into a band.

    >>> import torch
    >>> layer = OctConv2d(64, 128, 3, padding=1, alpha=(0, 0.25))
    >>> [tuple(band.shape) for band in layer(torch.zeros(1, 64, 15, 15))]
    [(1, 96, 15, 15), (1, 32, 8, 8)]

    Raises:
        ConversionError: layouts, groups or kernels that do not fit the geometry, or a call without the bands they ask.
    """

    dim, spatial = 2, 2
    conv: ClassVar[Any] = staticmethod(F.conv2d)


class OctConv3d(OctConv):
    """`OctConv2d` for maps with a time axis (N, C, T, H, W): halves H and W; time keeps its kernel and stride."""

    dim, spatial = 3, 2
    conv: ClassVar[Any] = staticmethod(F.conv3d)
