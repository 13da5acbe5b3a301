"""What a user would pick instead: Torch-Pruning's structured pruning at the same multiply-adds, without training."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Literal

import torch
import torch_pruning
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from tests.fidelity.data import CLASSES, SIZE

Importance = Literal["magnitude", "bn-scale"]
IMPORTANCES: tuple[Importance, ...] = ("magnitude", "bn-scale")


@torch.inference_mode()
def count_macs(net: nn.Module) -> int:
    """Multiply-adds of one picture; convolutions and matrix products count."""
    with FlopCounterMode(display=False) as counter:
        net(torch.zeros(1, 3, SIZE, SIZE))
    return counter.get_total_flops() // 2


def prune_net(net: nn.Module, importance: Importance, target: float) -> tuple[nn.Module, float]:
    """A pruned copy in eval mode, the same share of channels gone from every layer, and its multiply-adds against the
    source's: of thirteen shares tried by bisection the one that comes nearest to `target`."""
    dense = count_macs(net)
    low, high = 0.0, 0.9
    tried: list[tuple[float, nn.Module, float]] = []
    for _ in range(13):
        share = (low + high) / 2
        pruned = _prune(net, importance, share)
        cost = count_macs(pruned) / dense
        tried.append((abs(cost - target), pruned, cost))
        low, high = (share, high) if cost > target else (low, share)
    _, pruned, cost = min(tried, key=lambda row: row[0])
    return pruned, cost


def reestimate_norms(net: nn.Module, batches: Iterable[Tensor]) -> nn.Module:
    """A copy whose batch norms hold the plain mean of these batches' statistics, in eval mode."""
    net = copy.deepcopy(net).eval()
    norms = [module for module in net.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
        norm.train()
    with torch.no_grad():
        for batch in batches:
            net(batch)
    return net.eval()


def _prune(net: nn.Module, importance: Importance, share: float) -> nn.Module:
    net = copy.deepcopy(net).eval()
    kinds = torch_pruning.importance
    score = kinds.GroupMagnitudeImportance(p=2) if importance == "magnitude" else kinds.BNScaleImportance()
    last = [module for module in net.modules() if isinstance(module, nn.Linear) and module.out_features == CLASSES]
    example = torch.zeros(1, 3, SIZE, SIZE)
    torch_pruning.pruner.BasePruner(net, example, score, pruning_ratio=share, ignored_layers=last).step()
    return net
