"""What a network costs, counted while it runs on the meta device."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from torch.utils.hooks import RemovableHandle

import octify

from . import build
from .rows import Row

COUNTED = (torch.ops.aten.convolution, torch.ops.aten.mm, torch.ops.aten.addmm)
Sizes = dict[str, tuple[Tensor, ...]]


@dataclass(frozen=True)
class Measured:
    """A row as octify gives it, beside the dense network."""

    row: Row
    parameters: int
    dense_parameters: int
    gmacs: float
    dense_gmacs: float
    memory: float  # elements of the split convolutions' outputs, as share of the dense ones
    planned_memory: float  # the same from the number of low channels alone: 1 - 3/4 of their share

    @property
    def ratio(self) -> float:
        """The cost as share of the dense network's."""
        return self.gmacs / self.dense_gmacs


def measure(row: Row) -> Measured:
    """Builds a row's network on the meta device, converts it and counts both."""
    model, dense_gmacs, dense_sizes = dense(row.net, row.shape)
    octave = octify.convert(model, recipe=octify.load_recipe(row.recipe, alpha=row.alpha), example_inputs=row.shape)
    cost, sizes = run(octave, list(dense_sizes), row.shape)
    split = [name for name, bands in sizes.items() if len(bands) == 2]
    before = sum(dense_sizes[name][0].numel() for name in split)
    low = sum(dense_sizes[name][0].numel() * share(sizes[name]) for name in split)
    after = sum(band.numel() for name in split for band in sizes[name])
    return Measured(
        row,
        count_parameters(octave),
        count_parameters(model),
        cost,
        dense_gmacs,
        after / before if before else 1.0,
        1 - 0.75 * low / before if before else 1.0,
    )


@functools.cache
def dense(net: str, shape: tuple[int, ...]) -> tuple[nn.Module, float, Sizes]:
    """A network on the meta device, its cost, and what its convolutions give."""
    with torch.device("meta"):
        model = build(net)
    names = [name for name, module in model.named_modules() if isinstance(module, (nn.Conv2d, nn.Conv3d))]
    return model, *run(model, names, shape)


def gmacs(model: nn.Module, shape: tuple[int, ...]) -> float:
    """Multiply-adds of convolutions and linear layers in 1e9; attention and other products of maps are left out."""
    return run(model, [], shape)[0]


def run(model: nn.Module, names: list[str], shape: tuple[int, ...]) -> tuple[float, Sizes]:
    """Runs on the meta device: the cost, and what the named modules give: one tensor, or a high and a low band."""
    found: Sizes = {}

    def keep(name: str) -> RemovableHandle:
        def hook(_: nn.Module, __: object, output: Tensor | tuple[Tensor, Tensor]) -> None:
            found[name] = output if isinstance(output, tuple) else (output,)

        return modules[name].register_forward_hook(hook)

    modules = dict(model.named_modules())
    handles = [keep(name) for name in names]
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.empty(shape, device="meta"))
    for handle in handles:
        handle.remove()
    counts = counter.get_flop_counts()["Global"]
    return sum(flops for kind, flops in counts.items() if kind in COUNTED) / 2e9, found


def share(bands: tuple[Tensor, ...]) -> float:
    """The share of low channels."""
    high, low = bands[0].shape[1], bands[1].shape[1]
    return low / (high + low)


def count_parameters(model: nn.Module) -> int:
    """Weights and biases, shared ones once."""
    return sum(parameter.numel() for parameter in model.parameters())
