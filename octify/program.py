"""A network's inference form as `torch.export`'s program, with as many open axes as it can have."""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch.fx.experimental.symbolic_shapes import statically_known_true

from octify.branches import takes_branches
from octify.errors import BackendError
from octify.optimize import flatten

_ATEN: Any = torch.ops.aten
AXES = ("batch", "size")  # what a file may leave open
NEAREST = (_ATEN.upsample_nearest1d.vec, _ATEN.upsample_nearest2d.vec, _ATEN.upsample_nearest3d.vec)


def trace_program(
    model: nn.Module, inputs: Sequence[Tensor], may_open: Sequence[str] = AXES, multiple: int = 1
) -> tuple[Any, tuple[str, ...]]:
    """`torch.export`'s program of the optimised form, and which axes it leaves open: as many as it can of those that
    it may; open sizes are multiples of `multiple`.

    Raises:
        BackendError: it cannot be traced with any.
    """
    ready = copy.deepcopy(model).cpu().eval()
    form = flatten(ready, tuple(value.to("meta") for value in inputs))
    how = getattr(getattr(model, "octify_plan", None), "how", "symbolic")
    sized = AXES[:1] if takes_branches(form.graph) else AXES
    traced = {"symbolic": AXES, "guarded": sized, "free batch": AXES[:1]}.get(how, ())
    wanted = tuple(axis for axis in traced if axis in may_open)
    reasons: list[str] = []
    for axes in (wanted[:count] for count in range(len(wanted), -1, -1)):
        try:
            program = _program(form, inputs, axes, multiple)
        except Exception as error:
            reasons.append(f"{' and '.join(axes) or 'fixed'}: {type(error).__name__}: {str(error).strip()[:200]}")
            continue
        double_by_factor(program.graph_module)
        return program, axes
    raise BackendError(f"torch.export cannot trace {type(model).__name__}:\n  " + "\n  ".join(reasons))


def _program(form: nn.Module, inputs: Sequence[Tensor], axes: tuple[str, ...], multiple: int) -> Any:
    # A batch of one would be taken for a constant.
    given = tuple(
        value.repeat(2, *(1,) * (value.dim() - 1)) if axes and value.shape[0] == 1 else value for value in inputs
    )
    batch: Any = cast(Any, torch.export).Dim.DYNAMIC
    shapes = tuple(
        ({0: batch} if "batch" in axes else {}) | (_open_sizes(value, multiple) if "size" in axes else {})
        for value in given
    )
    with hushed(), torch.no_grad():
        return torch.export.export(form, given, dynamic_shapes=shapes if axes else None)


def _open_sizes(value: Tensor, multiple: int) -> dict[int, Any]:
    """What may vary of the last two axes; inputs of one size keep one size where it has to be a multiple."""
    dim: Any = cast(Any, torch.export).Dim
    last = range(max(2, value.dim() - 2), value.dim())
    if multiple == 1:
        return dict.fromkeys(last, dim.DYNAMIC)
    return {axis: multiple * dim(f"size{value.dim() - axis}_{value.shape[axis]}") for axis in last}


def double_by_factor(module: fx.GraphModule) -> int:
    """Before: nearest upsampling to a computed size.   After: by a factor, where that is known to give this size.

    Runtimes keep their own layout of maps across an upsampling by a constant factor; how often it applied.
    """
    count = 0
    for node in module.graph.nodes:
        if node.target not in NEAREST or node.args[1] is None:
            continue
        small, large = (cast(Tensor, each.meta["val"]).shape[2:] for each in (node.args[0], node))
        factors = [_factor(*pair) for pair in zip(small, large, strict=True)]
        if None not in factors:
            node.args = (node.args[0], None, factors)
            count += 1
    if count:
        module.graph.eliminate_dead_code()
        module.recompile()
    return count


def _factor(small: Any, large: Any) -> float | None:
    return next((float(factor) for factor in (1, 2) if statically_known_true(large == factor * small)), None)


@contextmanager
def hushed() -> Generator[None]:
    """Without the exporters' own remarks."""
    level = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
