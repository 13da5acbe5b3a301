"""Which multiply-adds of a network could be octave, and how many of a network's are convolutions."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.utils.flop_counter import FlopCounterMode

from octify.cost import COUNTED
from octify.recipe import Recipe

ALPHA = 0.25
MIN_SIZE = Recipe.uniform(ALPHA).settings_for("", "").min_size
BOTH, DEPTHWISE = 1 - 0.75 * ALPHA * (2 - ALPHA), 1 - 0.75 * ALPHA


@dataclass(frozen=True)
class Call:
    """One call of a convolution or of a Linear on an NHWC map: per batch multiply-adds and the output's H and W."""

    path: str
    macs: int
    size: tuple[int, ...]
    spatial: bool  # a kernel larger than one
    ratio: float  # what is left of it as an octave convolution

    @property
    def large(self) -> bool:
        """Whether its map is at least twice `min_size`."""
        return len(self.size) > 1 and all((length + 1) // 2 >= MIN_SIZE for length in self.size)


@dataclass(frozen=True)
class Counted:
    """A network's convolutions and all its multiply-adds (attention's products included)."""

    calls: list[Call]
    total: float
    weighted: float  # without attention's products, as octify's costs

    @property
    def share(self) -> float:
        """The convolutions' share of the multiply-adds."""
        return sum(call.macs for call in self.calls) / max(self.total, 1)

    @property
    def spatial(self) -> int:
        """How many convolutions have kernels larger than one."""
        return len({call.path for call in self.calls if call.spatial})

    @property
    def is_cnn(self) -> bool:
        """At least half of the multiply-adds in convolutions, and at least four spatial convolutions."""
        return self.share >= 0.5 and self.spatial >= 4

    def eligible(self, stems: Iterable[str]) -> list[Call]:
        """The convolutions that could be octave: not the stem, and large maps."""
        left = set(stems)
        return [call for call in self.calls if call.large and call.path not in left]


def count(model: nn.Module, run: Callable[[], object]) -> Counted:
    """Counts what `run` calls of a model's convolutions."""
    calls: list[Call] = []
    hooks = [
        module.register_forward_hook(lambda own, args, out, path=path: calls.extend(_call(path, own, args, out)))
        for path, module in model.named_modules()
    ]
    try:
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            run()
    finally:
        for hook in hooks:
            hook.remove()
    return Counted(calls, counter.get_total_flops() / 2, _weighted(counter))


def macs(run: Callable[[], object]) -> float:
    """The multiply-adds of convolutions and linear layers in what `run` runs."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        run()
    return _weighted(counter)


def _weighted(counter: FlopCounterMode) -> float:
    counts: dict[Any, int] = counter.get_flop_counts()["Global"]
    return sum(flops for kind, flops in counts.items() if kind in COUNTED) / 2


def _call(path: str, module: Any, args: Any, out: Any) -> list[Call]:
    if not isinstance(out, Tensor):
        return []
    if isinstance(module, nn.Linear):
        if out.dim() != 4:
            return []
        return [Call(path, out.numel() * module.in_features, tuple(out.shape[1:3]), False, BOTH)]
    if not isinstance(module, _ConvNd) and not _like_convolution(module):
        return []
    taps, groups = math.prod(module.kernel_size), module.groups
    transposed = isinstance(module, _ConvTransposeNd)
    macs = args[0].numel() * module.out_channels if transposed else out.numel() * module.in_channels
    ratio = DEPTHWISE if groups == module.in_channels > 1 else BOTH
    return [Call(path, macs * taps // groups, tuple(out.shape[2:][-2:]), taps > 1, ratio)]


def _like_convolution(module: nn.Module) -> bool:
    """Convolutions of other classes, such as CondConv."""
    return all(hasattr(module, name) for name in ("kernel_size", "in_channels", "out_channels", "groups", "weight"))
