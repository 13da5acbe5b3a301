"""Fitting: every layer's kernels by least squares to the dense network's outputs, in the order of execution.

Both networks run side by side, node by node; each layer sees the inputs that it really has, so that it also repairs
what came before. The fold is the prior.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, fx, nn

from octify.calibrate.clock import telling_rest
from octify.calibrate.compact import RIDGE, fit_compact
from octify.calibrate.least_squares import Fitted, fit_problem
from octify.calibrate.problems import can_fit, problems_of
from octify.calibrate.solve import STRENGTHS
from octify.calibrate.targets import Extra, extra_of
from octify.calibrate.walk import Chunk, Values, Walk, walk_dense, walk_octave
from octify.compconv import CompConv
from octify.layers import Split
from octify.module import OctaveModule
from octify.octbase import OctBase
from octify.trace import Trace


def fit_kernels(
    trace: Trace,
    converted: OctaveModule,
    chunks: Sequence[Chunk],
    *,
    strengths: Sequence[float] = STRENGTHS,
    seed: int = 0,
    progress: Callable[[str], None] | None = None,
) -> list[Fitted]:
    """Fits the layers of a converted network in place, and says how well; both networks must be in eval mode.

    The dense layers behind octave ones are fitted too, which repairs what reaches them.

    Raises:
        CalibrationError: a layer's activations are not finite.
    """
    source = walk_dense(trace, chunks)
    work = FitWork(source, walk_octave(converted, chunks), converted, strengths, seed)
    tell = telling_rest(progress, "kernels", work.left) if progress else None
    while work.wanted is not None:
        name = work.fit_next(source)
        if tell:
            tell(name)
    return work.layers


class FitWork:
    """The layers of a converted network that are to be fitted, one after the other while the dense network runs."""

    def __init__(
        self,
        source: Walk,
        octave: Walk,
        converted: OctaveModule,
        strengths: Sequence[float],
        seed: int = 0,
        repairs: Callable[[fx.Node, nn.Module], bool] = lambda node, module: True,
        rows: float = 1.0,
        chunks: int | None = None,
    ) -> None:
        """`repairs` says which dense layers behind octave ones are fitted too; `rows` see `fit_problem`.

        Fitted is to the first `chunks`.
        """
        self.octave, self.converted = octave, converted
        self.strengths, self.rows, self.chunks = strengths, rows, chunks
        partner = pair_layers(source.nodes, converted)
        self.layers: list[Fitted] = []
        self._waiting = [(partner[node], node) for node in _to_fit(octave.nodes, partner, converted, repairs)]
        self._dice = torch.Generator().manual_seed(seed)

    @property
    def wanted(self) -> fx.Node | None:
        """The dense network's node that the next layer is fitted to; None if all are fitted."""
        return self._waiting[0][0] if self._waiting else None

    @property
    def left(self) -> int:
        """How many layers there are to fit."""
        return len(self._waiting)

    def fit_next(self, source: Walk) -> str:
        """Runs both networks up to the next layer and fits it: its name."""
        wanted, node = self._waiting.pop(0)
        source.run_through(wanted)
        self.octave.run_before(node)
        inputs, targets = self.octave.arguments(node)[: self.chunks], source.values[wanted][: self.chunks]
        extra = extra_of(source, self.octave, (wanted, node), targets)
        self.layers += fit_layer(self.converted, node, inputs, targets, extra, self.strengths, self._dice, self.rows)
        return str(node.target)


def _to_fit(
    nodes: Sequence[fx.Node],
    partner: Mapping[fx.Node, fx.Node],
    converted: OctaveModule,
    repairs: Callable[[fx.Node, nn.Module], bool],
) -> list[fx.Node]:
    """The first calls of layers that are octave, or that octave ones reach; `nodes` in the order of execution."""
    found: dict[str, fx.Node] = {}  # a module called again keeps what its first call was fitted to
    changed: set[fx.Node] = set()
    for node in nodes:
        altered = any(reads in changed for reads in node.all_input_nodes)
        if node in partner:
            module = converted.get_submodule(str(node.target))
            if isinstance(module, OctBase | CompConv) or (altered and repairs(partner[node], module)):
                found.setdefault(str(node.target), node)
        if altered or is_octave(converted, node):
            changed.add(node)
    return list(found.values())


def is_octave(converted: OctaveModule, node: fx.Node) -> bool:
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


def fit_layer(
    converted: OctaveModule,
    node: fx.Node,
    inputs: Sequence[tuple[Any, ...]],
    targets: Sequence[Tensor],
    extra: Extra | None,
    strengths: Sequence[float],
    dice: torch.Generator,
    rows: float,
    alone: bool = False,
) -> list[Fitted]:
    """Fits a layer's kernels in place; unless it is fitted `alone`, a batch norm behind it takes its bias."""
    name = str(node.target)
    module, shifts = converted.get_submodule(name), {} if alone else _shifts(converted, node)
    if isinstance(module, CompConv):
        ridge = RIDGE if len(strengths) > 1 else strengths[0]
        maps: Values[Tensor] = Values(len(inputs), lambda index: inputs[index][0])
        before, after = fit_compact(module, maps, targets, shifts.get("high"), ridge, dice.initial_seed())
        return [Fitted(name, "high", before, after, ridge)]
    found: list[Fitted] = []
    for problem in problems_of(module):
        shift, more = shifts.get(problem.band), partial(extra, problem.band) if extra is not None else None
        found.append(fit_problem(problem, shift, name, inputs, targets, strengths, dice, rows, more))
    return found


def _shifts(root: nn.Module, node: fx.Node) -> dict[str, nn.Module]:
    """The batch norms behind each band that can take a bias into their means."""
    layer = root.get_submodule(str(node.target))
    if not isinstance(layer, OctBase) or layer.out_layout.is_dense:
        norm = _only_norm(root, node)
        return {"high": norm} if norm is not None else {}
    bands = {("high", "low")[cast(int, item.args[1])]: _only_norm(root, item) for item in node.users}
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
