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

from octify.calibrate.walk import Chunk
from octify.flows import Flows
from octify.graph import nodes_in
from octify.resample import pool_low, up_to
from octify.rules.base import Map
from octify.trace import Trace

DIGITS = 4  # of a score that count: less than that is rounding, and equal scores shall be ties


def channel_loss(flows: Flows, trace: Trace, chunks: Sequence[Chunk]) -> dict[int, float]:
    """What the readers of every channel class lose when it goes low, summed over readers."""
    watch = _Watch(flows, trace)
    with torch.no_grad():
        for chunk in chunks:
            watch.run(*(value.clone() for value in chunk))  # the network may write into them
    felt: dict[int, float] = defaultdict(float)
    for reader in watch.readers.values():
        roots = [flows.classes.find(channel) for channel in reader.read.ids.ravel().tolist()]
        for root, share in zip(roots, reader.shares().tolist(), strict=True):
            felt[root] += share
    return {root: float(f"{share:.{DIGITS - 1}e}") for root, share in felt.items()}


class _Watch(fx.Interpreter):
    """Runs the dense network and adds up what convolution-like nodes read and give."""

    def __init__(self, flows: Flows, trace: Trace) -> None:
        super().__init__(trace.model, graph=trace.graph)
        self.flows, self.trace = flows, trace
        self.readers: dict[fx.Node, _Reader] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        source = _map_read(self.flows, n)
        if source is not None:
            if n not in self.readers:
                self.readers[n] = _Reader(source[1], self.trace.module_of(n))
            self.readers[n].see(self.env[source[0]], value)
        return value


class _Reader:
    """Sums over images, channel by channel: the energy of `x - UDx` and the outputs' spread."""

    def __init__(self, read: Map, module: nn.Module | None) -> None:
        self.read, self.module = read, module
        weight = cast("Tensor | None", getattr(module, "weight", None))
        self.weight = None if weight is None else weight.detach().double().cpu()
        self.lost, self.rows = torch.zeros((), dtype=torch.float64), 0
        self.mean, self.spread, self.count = self.lost, self.lost, 0

    def see(self, x: Tensor, y: Tensor) -> None:
        """Adds some images."""
        found = self.read
        kept = [0, *found.channel, *found.spatial]
        others = [axis for axis in range(len(found.shape)) if axis not in kept]
        x = x.permute(0, *others, *found.channel, *found.spatial).flatten(0, len(others))
        x = x.flatten(1, len(found.channel))
        lost = x - up_to(pool_low(x, len(found.spatial)), x.shape[2:])
        self.lost = self.lost + torch.linalg.vector_norm(lost.flatten(2), dim=2).double().square().sum(0).cpu()
        self.rows += lost.numel() // max(lost.shape[1], 1)
        if self.weight is not None:
            axis = 1 if self.weight.dim() > 2 else y.dim() - 1
            self._add_moments(*torch.var_mean(y, [i for i in range(y.dim()) if i != axis], correction=0), y)

    def _add_moments(self, variance: Tensor, mean: Tensor, y: Tensor) -> None:
        variance, mean, count = variance.double().cpu(), mean.double().cpu(), y.numel() // max(len(mean), 1)
        whole = self.count + count
        moved = mean - self.mean
        self.spread = self.spread + variance * count + moved.square() * (self.count * count / max(whole, 1))
        self.mean, self.count = self.mean + moved * (count / max(whole, 1)), whole

    def shares(self) -> Tensor:
        """The mean energy that is lost, by how much each channel weighs in outputs relative to their own variance."""
        return self.lost / max(self.rows, 1) * self._weight()

    def _weight(self) -> Tensor:
        weight = self.weight
        if weight is None:
            return torch.ones(1, dtype=torch.float64)
        variance = (self.spread / max(self.count - 1, 1)).clamp_min(1e-12)
        transposed = isinstance(self.module, nn.modules.conv._ConvTransposeNd)  # pyright: ignore[reportPrivateUsage]
        groups = int(getattr(self.module, "groups", 1))
        if transposed:
            energy = weight.flatten(2).square().sum(2).unflatten(0, (groups, -1))  # groups, in, out
            return (energy / variance.unflatten(0, (groups, -1))[:, None]).sum(2).flatten() / len(variance)
        energy = weight.flatten(2).square().sum(2) if weight.dim() > 2 else weight.square()
        shares = (energy / variance[:, None]).unflatten(0, (groups, -1)).sum(1)  # groups, in
        return shares.flatten() / len(variance)


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
