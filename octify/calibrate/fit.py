"""Fitting: every layer's kernels by least squares to the dense network's outputs, in the order of execution.

Both networks run side by side, node by node; each layer sees the inputs that it really has, so that it also repairs
what came before. The fold is the prior.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, fx, nn

from octify.calibrate.compact import RIDGE, fit_compact
from octify.calibrate.least_squares import Fitted, fit_problem
from octify.calibrate.problems import can_fit, problems_of
from octify.calibrate.solve import STRENGTHS
from octify.calibrate.targets import Extra, extra_of
from octify.calibrate.walk import Chunk, Walk, walk_dense, walk_octave
from octify.compconv import CompConv
from octify.layers import Split
from octify.module import OctaveModule
from octify.octbase import OctBase
from octify.trace import Trace


@dataclass(frozen=True)
class Fit:
    """What a fit did, and what both networks give, chunk by chunk, once it is done."""

    layers: list[Fitted]
    dense: list[Any]
    octave: list[Any]


def fit_kernels(
    trace: Trace,
    converted: OctaveModule,
    chunks: Sequence[Chunk],
    *,
    strengths: Sequence[float] = STRENGTHS,
    seed: int = 0,
    dense_too: bool = True,
    progress: Callable[[str], None] | None = None,
) -> Fit:
    """Fits the layers of a converted network in place; both networks must be in eval mode.

    `dense_too` also fits the dense layers behind octave ones, which repairs what reaches them.

    Raises:
        CalibrationError: a layer's activations are not finite.
    """
    dice = torch.Generator().manual_seed(seed)
    source, octave = walk_dense(trace, chunks), walk_octave(converted, chunks)
    partner = pair_layers(source.nodes, converted)
    dense_nodes = iter(source.nodes)
    fitted: list[Fitted] = []
    changed: set[fx.Node] = set()
    done: set[str] = set()
    for node in octave.nodes:
        altered = any(reads in changed for reads in node.all_input_nodes)
        if node in partner:
            name, module = str(node.target), converted.get_submodule(str(node.target))
            outputs = _run_until(source, dense_nodes, partner[node])
            # A module called again keeps what its first call was fitted to.
            if name not in done and (isinstance(module, OctBase | CompConv) or (altered and dense_too)):
                done.add(name)
                extra = extra_of(source, octave, (partner[node], node), outputs)
                fitted += _fit_layer(octave, node, module, outputs, extra, strengths, dice)
                if progress:
                    progress(name)
            source.free(partner[node])
        if altered or _is_octave(converted, node):
            changed.add(node)
        octave.step(node)
        octave.free(node)
    return Fit(fitted, source.run(), octave.outputs())


def _is_octave(converted: OctaveModule, node: fx.Node) -> bool:
    return node.op == "call_module" and isinstance(
        converted.get_submodule(str(node.target)), OctBase | Split | CompConv
    )


def pair_layers(nodes: Sequence[fx.Node], converted: OctaveModule) -> dict[fx.Node, fx.Node]:
    """The source's node of every layer that could be fitted: the same call of the same path."""
    calls: dict[tuple[str, int], fx.Node] = {}
    count: Counter[str] = Counter()
    for node in nodes:
        if node.op == "call_module":
            calls[str(node.target), count[str(node.target)]] = node
            count[str(node.target)] += 1
    pairs: dict[fx.Node, fx.Node] = {}
    count = Counter()
    for node in converted.graph.nodes:
        if node.op != "call_module":
            continue
        key = str(node.target), count[str(node.target)]
        count[str(node.target)] += 1
        if key in calls and can_fit(converted.get_submodule(str(node.target))):
            pairs[node] = calls[key]
    return pairs


def _run_until(source: Walk, nodes: Iterator[fx.Node], wanted: fx.Node) -> list[Any]:
    """Runs the dense network up to a node, whose values stay."""
    for node in nodes:
        values = source.step(node)
        if node is wanted:
            return values
        source.free(node)
    raise AssertionError(f"{wanted} does not come in the order of execution")


def _fit_layer(
    octave: Walk,
    node: fx.Node,
    module: nn.Module,
    targets: list[Tensor],
    extra: Extra | None,
    strengths: Sequence[float],
    dice: torch.Generator,
) -> list[Fitted]:
    inputs = octave.arguments(node)
    shifts = _shifts(octave.root, node)
    if isinstance(module, CompConv):
        given = [cast(Tensor, args[0]) for args in inputs]
        ridge = RIDGE if len(strengths) > 1 else strengths[0]
        before, after = fit_compact(module, given, targets, shifts.get("high"), ridge, dice.initial_seed())
        return [Fitted(str(node.target), "high", before, after, ridge)]
    found: list[Fitted] = []
    for problem in problems_of(module):
        shift = shifts.get(problem.band)
        more = partial(extra, problem.band) if extra is not None else None
        found.append(fit_problem(problem, shift, str(node.target), inputs, targets, strengths, dice, more))
    return found


def _shifts(root: nn.Module, node: fx.Node) -> dict[str, nn.Module]:
    """The batch norms behind each band that can take a bias into their means."""
    getitems = [user for user in node.users if user.op == "call_function" and user.name.startswith("getitem")]
    if not getitems:
        norm = _only_norm(root, node)
        return {"high": norm} if norm is not None else {}
    bands = {("high", "low")[cast(int, item.args[1])]: _only_norm(root, item) for item in getitems}
    return {band: norm for band, norm in bands.items() if norm is not None}


def _only_norm(root: nn.Module, node: fx.Node) -> nn.Module | None:
    """The batch norm that alone reads a value, if it has running means."""
    readers = list(node.users)
    if len(readers) != 1 or readers[0].op != "call_module":
        return None
    target = str(readers[0].target)
    norm = root.get_submodule(target)
    calls = sum(other.target == readers[0].target for other in node.graph.nodes)
    is_norm = isinstance(norm, nn.modules.batchnorm._BatchNorm)  # pyright: ignore[reportPrivateUsage]
    return norm if is_norm and calls == 1 and norm.running_mean is not None else None
