"""Pooling by function, zeros around maps and resizing, of many spellings, in the few that programs know."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import fx, nn
from torch.nn import functional as F

from octify.graph import nodes_in
from octify.ops import resize_bands
from octify.optimize.forms import empty_high, half_of, scaled_grid
from octify.optimize.native.operations import is_map, module_of
from octify.optimize.native.writer import Result, Writer
from octify.optimize.spread import Pad, blend
from octify.resample import up_to

_MAX = (nn.MaxPool2d, ("kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices"))
_AVERAGE = (nn.AvgPool2d, ("kernel_size", "stride", "padding", "ceil_mode", "count_include_pad", "divisor_override"))
WINDOWS: dict[Any, tuple[Callable[..., nn.Module], tuple[str, ...]]] = {
    F.max_pool2d: _MAX, torch.max_pool2d: _MAX, F.avg_pool2d: _AVERAGE,
}  # fmt: skip


def resize(writer: Writer, node: fx.Node) -> Result:
    """Nearest or bilinear resizing by a size or by whole factors → up_to, blend."""
    found = module_of(writer.module, node)
    names = ("size", "scale_factor", "mode", "align_corners", "recompute_scale_factor", "antialias")
    given: dict[str, Any] = dict(zip(("input", *names), node.args, strict=False)) | node.kwargs
    if node.target is resize_bands:
        given = dict(zip(("input", "low", *names), node.args, strict=False)) | node.kwargs
    elif type(found) in (nn.Upsample, nn.UpsamplingNearest2d, nn.UpsamplingBilinear2d):
        given = {"input": node.args[0], **{name: getattr(found, name) for name in names[:4]}}
    elif node.target is not F.interpolate:
        return None
    x, size, factor = given["input"], given.get("size"), given.get("scale_factor")
    mode = given.get("mode", "nearest")
    if mode not in ("nearest", "bilinear") or given.get("recompute_scale_factor") or given.get("antialias"):
        return None
    if not is_map(given.get("low", x)):
        return None
    size = (size, size) if isinstance(size, int) else size
    if size is None:
        pair = cast("Sequence[float]", factor if isinstance(factor, (list, tuple)) else [factor] * 2)
        factors = [float(number) for number in pair]
        if any(number != math.floor(number) for number in factors):
            return None
        size = writer.function(scaled_grid, x, factors)

    def resized(band: fx.Node, to: Any) -> fx.Node:
        if mode == "nearest":
            return writer.function(up_to, band, to)
        return writer.function(blend, band, to, bool(given.get("align_corners")))

    raised = resized(x, size) if is_map(x) else writer.function(empty_high, given["low"], size)
    if "low" not in given:
        return raised
    return raised, resized(given["low"], writer.function(half_of, raised))


def window(writer: Writer, node: fx.Node) -> Result:
    """A pooling by function → the module."""
    found = WINDOWS.get(cast(Any, node.target))
    if found is None or nodes_in((node.args[1:], node.kwargs)) or not is_map(node.args[0] if node.args else None):
        return None
    kind, names = found
    given: dict[str, Any] = dict(zip(names, node.args[1:], strict=False)) | node.kwargs
    return writer.layer(kind(**given), cast(fx.Node, node.args[0])) if set(given) <= set(names) else None


def pad(writer: Writer, node: fx.Node) -> Result:
    """Zeros around a map, for the convolutions that read it → Pad."""
    found: Any = module_of(writer.module, node)
    given: dict[str, Any] = dict(zip(("input", "pad", "mode", "value"), node.args, strict=False)) | node.kwargs
    if type(found) in (nn.ZeroPad2d, nn.ConstantPad2d):
        given = {"input": node.args[0], "pad": found.padding, "value": found.value}
    elif node.target is not F.pad:
        return None
    pads = given["pad"]
    if not isinstance(pads, (tuple, list)) or nodes_in(cast(Any, pads)) or not is_map(given["input"]):
        return None
    amounts = (*cast("Sequence[int]", pads), 0, 0)[:4]
    zeros = given.get("mode", "constant") == "constant" and not given.get("value")
    if not zeros or len(cast("Sequence[int]", pads)) > 4 or min(amounts) < 0:
        return None
    return writer.layer(Pad(cast("tuple[int, int, int, int]", amounts)), given["input"])
