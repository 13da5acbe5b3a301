"""Interpolation: each band to its own share of the new size."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn import functional as F

from octify.ops import resize_bands
from octify.rules.base import Bands, Build, Dense, Map, Op, Rule, Ties, register

_NAMES = ("size", "scale_factor", "mode", "align_corners", "recompute_scale_factor", "antialias")


class Resize(Rule):
    """`F.interpolate` and `nn.Upsample`; exact for nearest by whole factors, else approximate on the low band."""

    def flow(self, op: Op, ties: Ties) -> Map:
        """Keeps its input's channels; what was too small to split stays dense, and may be split afterwards."""
        source = op.argument(0, "input")
        if not isinstance(source, Map) or not source.is_plain:
            raise Dense("its input's axes are in another order")
        if op.too_small(source.size) or op.too_small(op.shape[axis] for axis in source.spatial):
            raise Dense("its map is less than twice min_size")
        ties.note("approximate on the low band")
        return source.with_ids(source.ids, op.shape)

    def emit(self, op: Op, build: Build) -> Bands:
        """One call over both bands."""
        source: Bands = build.value(op.node.args[0] if op.node.args else op.node.kwargs["input"])  # pyright: ignore
        node = build.function(resize_bands, source.high, source.low, **self._arguments(op, build))
        return Bands(*build.pair(node), source.layout, op.values[op.node])

    def _arguments(self, op: Op, build: Build) -> dict[str, Any]:
        if op.module is not None:
            found = {name: getattr(op.module, name, None) for name in _NAMES[:5]}
        else:
            found = dict(zip(_NAMES, op.node.args[1:], strict=False)) | {
                name: value for name, value in op.node.kwargs.items() if name != "input"
            }
        return {name: build.rest(value) for name, value in found.items() if value is not None}


register(
    Resize(),
    modules=(nn.Upsample, nn.UpsamplingNearest2d, nn.UpsamplingBilinear2d),
    functions=(F.interpolate, F.upsample),
)
