"""Distillation without labels: gradient steps towards the dense network's outputs and those of its layers."""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# (tensor and array methods that come without complete types)

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from octify.calibrate.bands import band_pairs, relative_error
from octify.calibrate.data import Images, float_tensors, output_loss
from octify.calibrate.statistics import run_model, snapshot
from octify.layers import OctConv
from octify.module import OctaveModule

RATE = 1e-3
BATCH = 32
LOOKS = 8  # how often held-back images are looked at
LAYERS = 1.0  # the weight of the layers' errors beside the outputs' 1


@dataclass(frozen=True)
class Distilled:
    """The loss on held-back images before the first step and at the best one."""

    steps: int
    best_step: int
    before: float
    after: float


def distil(
    images: Images,
    converted: OctaveModule,
    steps: int,
    *,
    seed: int = 0,
    rate: float = RATE,
    progress: Callable[[str], None] | None = None,
) -> Distilled:
    """Trains a converted network in place, in eval mode, and leaves it at the step that held-back images like best."""
    dense = images.trace.model
    targets = run_model(dense, images.held)
    pool = tuple(torch.cat(parts) for parts in zip(*images.fit, strict=True))
    dice = torch.Generator().manual_seed(seed)
    weights = [parameter for parameter in converted.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(weights, rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _share(step, steps))
    start = best = output_loss(targets, run_model(converted, images.held))
    best_step, kept = 0, snapshot(converted)
    taps = _Taps(dense, converted)
    order = torch.empty(0, dtype=torch.int64)
    for step in range(1, steps + 1):
        if len(order) < min(BATCH, len(pool[0])):
            order = torch.randperm(len(pool[0]), generator=dice)
        chosen, order = order[:BATCH], order[BATCH:]
        loss = taps.loss(tuple(value[chosen] for value in pool))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        schedule.step()
        if step % max(1, steps // LOOKS) == 0 or step == steps:
            now = output_loss(targets, run_model(converted, images.held))
            if progress:
                progress(f"distillation {step}/{steps}: held-back loss {now:.4f}")
            if now < best:
                best, best_step, kept = now, step, snapshot(converted)
    taps.remove()
    converted.load_state_dict(kept)
    for parameter in weights:
        parameter.grad = None
    return Distilled(steps, best_step, start, best)


def _share(step: int, steps: int) -> float:
    """A short rise and a cosine down."""
    rise = max(1, steps // 10)
    return min(1.0, (step + 1) / rise) * 0.5 * (1 + math.cos(math.pi * min(1.0, step / steps)))


class _Taps:
    """Hooks on octave layers and the dense layers in their places."""

    def __init__(self, dense: nn.Module, converted: OctaveModule) -> None:
        self.dense, self.converted = dense, converted
        self.seen: dict[str, Any] = {}
        self.errors: list[Tensor] = []
        self.handles: list[Any] = []
        for name, module in converted.named_modules():
            if isinstance(module, OctConv):
                self.handles.append(dense.get_submodule(name).register_forward_hook(self._keep(name)))
                self.handles.append(module.register_forward_hook(self._compare(name, module)))

    def remove(self) -> None:
        """Takes the hooks off."""
        for handle in self.handles:
            handle.remove()

    def loss(self, inputs: tuple[Tensor, ...]) -> Tensor:
        """The error of the outputs and the mean error of the layers, as shares of the targets' energy."""
        self.errors = []
        with torch.no_grad():
            wanted = float_tensors(self.dense(*inputs))
        given = float_tensors(self.converted(*inputs))
        outputs = [relative_error(y, x) + _divergence(y, x) for y, x in zip(given, wanted, strict=True)]
        total = torch.stack(outputs).mean()
        return total + LAYERS * torch.stack(self.errors).mean() if self.errors else total

    def _keep(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: Any, output: Tensor) -> None:
            self.seen[name] = output.detach().clone()

        return hook

    def _compare(self, name: str, layer: OctConv) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            target = self.seen.pop(name, None)
            if target is not None:
                pairs = band_pairs(layer.out_layout, output, target, layer.spatial)
                self.errors += [relative_error(given, wanted) for _, given, wanted in pairs]

        return hook


def _divergence(given: Tensor, wanted: Tensor) -> Tensor:
    """KL divergence of class probabilities; nothing where the output is no row of logits."""
    if given.dim() != 2:
        return given.new_zeros(())
    return F.kl_div(F.log_softmax(given, 1), F.log_softmax(wanted, 1), reduction="batchmean", log_target=True)
