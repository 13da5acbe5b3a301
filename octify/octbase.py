"""What ordinary and transposed octave convolutions share: layouts, paths and parameters."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from octify.bands import PATHS, check_layouts, choose_paths, path_groups, path_weight, swap_sides, take
from octify.errors import ConversionError
from octify.kernels import Taps, fold_weight
from octify.layout import Layout

Bands = Tensor | tuple[Tensor, Tensor]


def memory_format_of(x: Tensor) -> torch.memory_format:
    """Channels last if the tensor is laid out so and in no other way."""
    channels_last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(x.dim())
    if channels_last is None or x.is_contiguous() or not x.is_contiguous(memory_format=channels_last):
        return torch.contiguous_format
    return channels_last


class OctBase(nn.Module):
    """An octave convolution's layouts, paths and parameters; subclasses have the geometry and the forward pass."""

    dim: ClassVar[int]
    spatial: ClassVar[int]
    conv: ClassVar[Callable[..., Tensor]]
    transposed: ClassVar[bool] = False

    weight_hh: nn.Parameter | None
    weight_hl: nn.Parameter | None
    weight_lh: nn.Parameter | None
    weight_ll: nn.Parameter | None
    bias_h: nn.Parameter | None
    bias_l: nn.Parameter | None
    _taps: dict[str, tuple[Taps, ...]]

    def _configure(self, in_layout: Layout, out_layout: Layout, groups: int, paths: Iterable[str]) -> None:
        check_layouts(in_layout, out_layout, groups)
        self.in_channels, self.out_channels, self.groups = in_layout.channels, out_layout.channels, groups
        self.in_layout, self.out_layout = in_layout, out_layout
        self.paths = choose_paths(in_layout, out_layout, groups, paths)
        self._groups = {path: path_groups(path, in_layout, groups) for path in self.paths}
        # Plain attributes, so that forward asks nothing of the layouts.
        self._takes_low, self._gives_low = not in_layout.is_dense, not out_layout.is_dense
        self._takes_high, self._gives_high = in_layout.high > 0, out_layout.high > 0

    def place_weights(self, weight: Tensor, bias: Tensor | None) -> None:
        """Makes the parameters from a dense convolution's; shapes, dtype, device and `requires_grad` as given there."""
        source = weight.detach()
        memory_format = memory_format_of(weight)
        by_output = swap_sides(source, self.groups) if self.transposed else source
        for path in PATHS:
            if path not in self.paths:
                self.register_parameter(f"weight_{path}", None)
                continue
            part = path_weight(by_output, path, self.in_layout, self.out_layout, self.groups)
            part = fold_weight(part, self._taps[path])
            if self.transposed:
                part = swap_sides(part, self._groups[path])
            part = part.contiguous(memory_format=memory_format)
            self.register_parameter(f"weight_{path}", nn.Parameter(part, weight.requires_grad))
        for name, index in (("bias_h", self.out_layout.high_index), ("bias_l", self.out_layout.low_index)):
            if bias is None or not index:
                self.register_parameter(name, None)
                continue
            part = take(bias.detach(), 0, index).clone()
            self.register_parameter(name, nn.Parameter(part, bias.requires_grad))

    def _draw(self, shape: Sequence[int], bias: bool, device: Any, dtype: Any) -> None:
        # Drawn dense, by the calls of `torch.nn`: the same seed gives the weights of the same dense layer.
        weight = nn.Parameter(torch.empty(*shape, device=device, dtype=dtype))
        nn.init.kaiming_uniform_(weight, a=math.sqrt(5))
        if not bias:
            self.place_weights(weight, None)
            return
        offset = nn.Parameter(torch.empty(self.out_channels, device=device, dtype=dtype))
        fan_in = math.prod(shape[1:])
        bound = 1 / math.sqrt(fan_in) if fan_in else 0.0
        self.place_weights(weight, nn.init.uniform_(offset, -bound, bound))

    def _bands(self, high: Bands, low: Tensor | None) -> tuple[Tensor, Tensor | None]:
        if not isinstance(high, Tensor):
            high, low = high
        if (low is not None) != self._takes_low:
            wanted = "a pair (high, low)" if self._takes_low else "one tensor"
            raise ConversionError(f"{type(self).__name__} of input layout {self.in_layout} was not given {wanted}")
        return high, low

    def _carrier(self, low: Tensor, size: Sequence[int]) -> Tensor:
        """A high band of no channels, which carries the size."""
        return low.new_empty((low.shape[0], 0, *low.shape[2 : low.dim() - len(size)], *size))
