"""`OctLinear`: `nn.Linear` on a channels-last map, which is a 1x1 convolution, as an octave convolution."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, ClassVar, cast

from torch import Tensor, nn
from torch.nn import functional as F

from octify.bands import PATHS, Alpha, choose_layouts
from octify.layout import Layout
from octify.octbase import Bands, OctBase
from octify.resample import pool_low, up_to

if TYPE_CHECKING:
    from typing_extensions import Self


class OctLinear(OctBase):
    """Octave 1x1 convolution of bands (N, H, W, Ch) and (N, ⌈H/2⌉, ⌈W/2⌉, Cl), in the place of `nn.Linear`.

    Exactly D∘linear∘U. `spatial` axes ahead of the channels are halved.

    >>> import torch
    >>> layer = OctLinear(64, 128, alpha=(0, 0.25))
    >>> [tuple(band.shape) for band in layer(torch.zeros(1, 15, 15, 64))]
    [(1, 15, 15, 96), (1, 8, 8, 32)]
    """

    dim = 0
    conv: ClassVar[Any] = staticmethod(F.linear)

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
        *,
        alpha: Alpha = 0.0,
        in_layout: Layout | None = None,
        out_layout: Layout | None = None,
        paths: Iterable[str] = PATHS,
        spatial: int = 2,
    ) -> None:
        super().__init__()
        layouts = choose_layouts((in_features, out_features), 1, alpha, (in_layout, out_layout))
        self._configure(*layouts, 1, paths)
        self._plan(spatial)
        self._draw((out_features, in_features), bias, device, dtype)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        in_layout: Layout,
        out_layout: Layout,
        *,
        paths: Iterable[str] = PATHS,
        spatial: int = 2,
    ) -> Self:
        """An octave layer with a trained linear layer's weights.

        Raises:
            ConversionError: layouts of other channel counts than the layer's.
        """
        choose_layouts((linear.in_features, linear.out_features), 1, 0.0, (in_layout, out_layout))
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer._configure(in_layout, out_layout, 1, paths)
        layer._plan(spatial)
        layer.place_weights(linear.weight, cast("Tensor | None", linear.bias))
        return layer.train(linear.training)

    def _plan(self, spatial: int) -> None:
        self.halved = spatial
        self._taps = dict.fromkeys(self.paths, ())

    def forward(self, high: Bands, low: Tensor | None = None) -> Bands:
        """Bands to bands; a dense side is one tensor instead of the pair."""
        high, low = self._bands(high, low)
        if not self._gives_low:
            return self._to_high(high, low)
        low_out = self._to_low(high, low)
        if not self._gives_high:
            return low_out.new_empty((*high.shape[:-1], 0)), low_out
        return self._to_high(high, low), low_out

    def _to_high(self, high: Tensor, low: Tensor | None) -> Tensor:
        if self.weight_lh is None or low is None:
            return F.linear(high, cast(Tensor, self.weight_hh), self.bias_h)
        bias = self.bias_h if self.weight_hh is None else None
        lifted = F.linear(low, self.weight_lh, bias).movedim(-1, 1)
        raised = up_to(lifted, high.shape[-1 - self.halved : -1]).movedim(1, -1)
        return raised if self.weight_hh is None else F.linear(high, self.weight_hh, self.bias_h) + raised

    def _to_low(self, high: Tensor, low: Tensor | None) -> Tensor:
        if self.weight_hl is None:
            return F.linear(cast(Tensor, low), cast(Tensor, self.weight_ll), self.bias_l)
        pooled = pool_low(high.movedim(-1, 1), self.halved).movedim(1, -1)
        if self.weight_ll is None or low is None:
            return F.linear(pooled, self.weight_hl, self.bias_l)
        return F.linear(low, self.weight_ll, self.bias_l) + F.linear(pooled, self.weight_hl)

    def extra_repr(self) -> str:
        """Channels and layouts."""
        bias = "" if self.bias_h is not None or self.bias_l is not None else ", bias=False"
        layouts = f"layout={self.in_layout}→{self.out_layout}, paths={self.paths}"
        return f"{self.in_channels}, {self.out_channels}{bias}, {layouts}"
