"""Which channels go low: those whose loss of detail their readers feel least.

A channel's score is the energy of `x - UDx` at the input of each convolution that reads it, weighted by that
convolution's weights on the channel and relative to its outputs: the share of the reader's output that would be lost.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# (tensor and array methods that come without complete types)

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, fx, nn

from octify.calibrate.walk import Chunk, Walk
from octify.graph import nodes_in
from octify.plan import Flows
from octify.resample import pool_low, up_to
from octify.rules.base import Map
from octify.trace import Trace

DIGITS = 4  # of a score that count: less than that is rounding, and equal scores shall be ties


def rank_channels(flows: Flows, trace: Trace, chunks: Sequence[Chunk]) -> dict[str, list[float]]:
    """A score per output channel of every writer, by module path; the lowest go low first.

    `trace` is the dense network in eval mode, `chunks` are its inputs.
    """
    classes = flows.classes
    felt = channel_loss(flows, trace, chunks)
    scores: dict[str, list[float]] = {}
    for writer in classes.writers:
        roots = [classes.find(channel) for channel in writer.ids.tolist()]
        scores[writer.module] = [felt.get(root, 0.0) for root in roots]
    return scores


def channel_loss(flows: Flows, trace: Trace, chunks: Sequence[Chunk]) -> dict[int, float]:
    """What the readers of every channel class lose when it goes low, summed over readers."""
    walk = Walk(trace.model, trace.graph, chunks)
    felt: dict[int, float] = defaultdict(float)
    for node in walk.nodes:
        source = _map_read(flows, node)
        values = walk.step(node)
        if source is not None:
            details = _detail(walk.values[source[0]], source[1])
            shares = details * _weight_of(trace.module_of(node), values)
            roots = [flows.classes.find(channel) for channel in source[1].ids.ravel().tolist()]
            for root, share in zip(roots, shares.tolist(), strict=True):
                felt[root] += share
        walk.free(node)
    return {root: float(f"{share:.{DIGITS - 1}e}") for root, share in felt.items()}


def _map_read(flows: Flows, node: fx.Node) -> tuple[fx.Node, Map] | None:
    """The map that a convolution-like node reads."""
    rule = flows.rules.get(node)
    if rule is None or rule.kind != "chooses":
        return None
    for source in nodes_in(node.args):
        found = flows.values[source]
        if isinstance(found, Map):
            return source, found
    return None


def _detail(values: Sequence[Tensor], found: Map) -> Tensor:
    """The mean energy of `x - UDx`, channel by channel, in float64."""
    total, count = torch.zeros(found.ids.size, dtype=torch.float64), 0
    kept = [0, *found.channel, *found.spatial]
    others = [axis for axis in range(len(found.shape)) if axis not in kept]
    for value in values:
        x = value.permute(0, *others, *found.channel, *found.spatial).flatten(0, len(others))
        x = x.flatten(1, len(found.channel))
        lost = x - up_to(pool_low(x, len(found.spatial)), x.shape[2:])
        total += lost.double().square().sum((0, *range(2, lost.dim()))).cpu()
        count += lost.numel() // max(lost.shape[1], 1)
    return total / max(count, 1)


def _weight_of(module: nn.Module | None, outputs: Sequence[Any]) -> Tensor:
    """How much each input channel weighs in a layer's outputs, which count relative to their own variance."""
    weight = cast("Tensor | None", getattr(module, "weight", None))
    if weight is None:
        return torch.ones(1, dtype=torch.float64)
    weight = weight.detach().double().cpu()
    axis = 1 if weight.dim() > 2 else -1
    rows = torch.cat(
        [output.transpose(1, axis).flatten(2).transpose(0, 1).flatten(1).double().cpu() for output in outputs], 1
    )
    variance = rows.var(1).clamp_min(1e-12)
    transposed = isinstance(module, nn.modules.conv._ConvTransposeNd)  # pyright: ignore[reportPrivateUsage]
    groups = int(getattr(module, "groups", 1))
    if transposed:
        energy = weight.flatten(2).square().sum(2).unflatten(0, (groups, -1))  # groups, in, out
        return (energy / variance.unflatten(0, (groups, -1))[:, None]).sum(2).flatten() / len(variance)
    energy = weight.flatten(2).square().sum(2) if weight.dim() > 2 else weight.square()
    shares = (energy / variance[:, None]).unflatten(0, (groups, -1)).sum(1)  # groups, in
    return shares.flatten() / len(variance)
