"""What a network's outputs feel of small changes of its layers' outputs: gradients in random directions."""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# (tensor and array methods that come without complete types)

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import Any, cast

import torch
from torch import Tensor, fx

from octify.calibrate.data import float_tensors
from octify.calibrate.walk import Chunk, Walk


class Felt:
    """For one chunk: the dense network's values at some nodes, and how its outputs move with them.

    In each of several random directions of the outputs (random signs, so that the mean square over directions is the
    squared length) there is one gradient a node. `spreads` are what squares of each output tensor are measured by.
    """

    def __init__(
        self,
        source: Walk,
        chunk: Chunk,
        nodes: Collection[fx.Node],
        spreads: Sequence[float],
        directions: int,
        seed: int,
    ) -> None:
        run = _Run(source, nodes)
        with torch.enable_grad():
            outputs = float_tensors(run.run(*(value.clone() for value in chunk)))
            dice = torch.Generator().manual_seed(seed)
            self.images = len(chunk[0])
            self.values, self.outputs = run.values, [output.detach() for output in outputs]
            self._ways = [_signs(outputs, spreads, dice) for _ in range(directions)]
            self._gradients = [_gradients(run.zeros, outputs, way) for way in self._ways]

    def change(self, node: fx.Node, value: Tensor) -> Tensor:
        """(directions, images): how far the outputs move if a node's value becomes this one, to first order."""
        moved = value - self.values[node]
        return torch.stack([self._along(found.get(node), moved) for found in self._gradients])

    def output_change(self, outputs: Sequence[Tensor]) -> Tensor:
        """(directions, images): how far these outputs are from the dense network's."""
        moved = [given - wanted for given, wanted in zip(outputs, self.outputs, strict=True)]
        rows = [[self._along(sign, part) for sign, part in zip(way, moved, strict=True)] for way in self._ways]
        return torch.stack([torch.stack(row).sum(0) for row in rows])

    def _along(self, gradient: Tensor | None, moved: Tensor) -> Tensor:
        if gradient is None:  # the outputs do not depend on it, or through nothing that has a gradient
            return torch.zeros(self.images, dtype=torch.float64, device=moved.device)
        return (gradient * moved).reshape(self.images, -1).sum(1).double()


class _Run(fx.Interpreter):
    """Runs the dense network and adds zeros at some nodes, which gradients can be taken of."""

    def __init__(self, source: Walk, nodes: Collection[fx.Node]) -> None:
        super().__init__(source.root, graph=source.graph)
        self._wanted = set(nodes)
        self.values: dict[fx.Node, Tensor] = {}
        self.zeros: dict[fx.Node, Tensor] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n not in self._wanted:
            return value
        self.values[n] = value.detach().clone()  # whoever reads it may write into it
        self.zeros[n] = value.detach().new_zeros(()).expand_as(value).requires_grad_()
        return value + self.zeros[n]


def _signs(outputs: Sequence[Tensor], spreads: Sequence[float], dice: torch.Generator) -> list[Tensor]:
    """A random direction of all outputs, in which a change's mean square is the loss."""
    return [
        (torch.randint(0, 2, output.shape, generator=dice).to(output) * 2 - 1) / math.sqrt(len(outputs) * spread)
        for output, spread in zip(outputs, spreads, strict=True)
    ]


def _gradients(zeros: dict[fx.Node, Tensor], outputs: Sequence[Tensor], way: Sequence[Tensor]) -> dict[fx.Node, Tensor]:
    reached = [(output * sign).sum() for output, sign in zip(outputs, way, strict=True) if output.requires_grad]
    if not reached or not zeros:
        return {}
    total = torch.stack(reached).sum()
    found = cast(
        "tuple[Tensor | None, ...]",
        torch.autograd.grad(total, list(zeros.values()), retain_graph=True, allow_unused=True),
    )
    return {node: gradient for node, gradient in zip(zeros, found, strict=True) if gradient is not None}
