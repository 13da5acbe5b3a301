"""Batch norm into the convolution before it: all four paths, both biases.

Before: conv (OctConv or torch.nn) → bn.   After: conv with scaled rows and a bias.
"""

from __future__ import annotations

import operator
from collections import Counter
from typing import Any, cast

import torch
from timm.layers.norm_act import BatchNormAct2d, FrozenBatchNormAct2d, SyncBatchNormAct
from torch import Tensor, fx, nn
from torchvision.ops import FrozenBatchNorm2d

from octify.graph import get_module, set_module
from octify.layers import OctConv, OctConvTranspose

PLAIN = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm, FrozenBatchNorm2d)
WITH_ACT = (BatchNormAct2d, SyncBatchNormAct, FrozenBatchNormAct2d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, *TRANSPOSED)


def fold_norms(module: fx.GraphModule) -> int:
    """Folds every batch norm whose only source is a convolution; returns how many."""
    calls = Counter(str(node.target) for node in module.graph.nodes if node.op == "call_module")
    folded = 0
    for node in list(module.graph.nodes):
        if node.op != "call_module" or calls[str(node.target)] > 1:
            continue
        norm = get_module(module, str(node.target))
        if type(norm) not in (*PLAIN, *WITH_ACT) or cast(Any, norm).running_var is None:
            continue
        source = node.args[0]
        if not isinstance(source, fx.Node) or len(source.users) > 1 or not _fold(module, source, norm, calls):
            if type(norm) is BatchNormAct2d:
                _part(module, node, cast(Any, norm))
            continue
        folded += 1
        if type(norm) in WITH_ACT:
            set_module(module, str(node.target), cast(nn.Module, norm.act))
            continue
        node.replace_all_uses_with(source)
        module.graph.erase_node(node)
    return folded


def _part(module: fx.GraphModule, node: fx.Node, norm: Any) -> None:
    """A norm and its activation one behind the other, so that what sees norms sees this one."""
    path = str(node.target)
    plain: Any = nn.BatchNorm2d(norm.num_features, norm.eps, affine=False, device="meta")
    for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked"):
        setattr(plain, name, getattr(norm, name))
    set_module(module, path, plain.eval())
    set_module(module, f"{path}_act", norm.act)
    with module.graph.inserting_after(node):
        act = module.graph.call_module(f"{path}_act", (node,))
    node.replace_all_uses_with(act)
    act.args = (node,)


def _fold(module: fx.GraphModule, source: fx.Node, norm: nn.Module, calls: Counter[str]) -> bool:
    """Folds into the node's convolution, if it is one; a band of an octave convolution is read by `getitem`."""
    band = ""
    if source.op == "call_function" and source.target is operator.getitem and isinstance(source.args[0], fx.Node):
        band = "hl"[cast(int, source.args[1])] if source.args[1] in (0, 1) else "?"
        source = source.args[0]
    if source.op != "call_module" or calls[str(source.target)] > 1:
        return False
    conv: Any = get_module(module, str(source.target))
    if isinstance(conv, OctConv | OctConvTranspose):
        band = band or ("h" if conv.out_layout.is_dense else "?")
    elif type(conv) not in CONVS or band:
        return False
    if band == "?":
        return False
    scale, shift = scale_and_shift(norm)
    names = ("weight", "bias") if not band else (f"weight_h{band}", f"weight_l{band}", f"bias_{band}")
    _scale(conv, names, scale, shift)
    return True


def scale_and_shift(norm: nn.Module) -> tuple[Tensor, Tensor]:
    """A batch norm in eval mode as `scale·x + shift`, (C,) each, in float64."""
    held = cast(Any, norm)
    deviation = (held.running_var.detach().double() + held.eps).sqrt()
    ones = torch.ones_like(deviation)
    scale = (ones if held.weight is None else held.weight.detach().double()) / deviation
    shift = (0 * ones if held.bias is None else held.bias.detach().double()) - held.running_mean.double() * scale
    return scale, shift


def _scale(conv: nn.Module, names: tuple[str, ...], scale: Tensor, shift: Tensor) -> None:
    *weights, bias_name = names
    like: Tensor | None = None
    for name in weights:
        weight: Tensor | None = getattr(conv, name)
        if weight is None:
            continue
        like = weight
        setattr(conv, name, _parameter(_scaled(conv, weight.detach().double(), scale), weight))
    assert like is not None, f"{type(conv).__name__} has a band without weights"
    bias: Tensor | None = getattr(conv, bias_name)
    total = shift if bias is None else bias.detach().double() * scale + shift
    setattr(conv, bias_name, _parameter(total, like))


def _scaled(conv: nn.Module, weight: Tensor, scale: Tensor) -> Tensor:
    """A weight whose outputs are scaled; a transposed one has them behind its inputs, group by group."""
    places = (1,) * (weight.dim() - 2)
    if not isinstance(conv, (OctConvTranspose, *TRANSPOSED)):
        return weight * scale.view(-1, 1, *places)
    groups = len(scale) // weight.shape[1]
    rows: Tensor = scale.view(groups, 1, -1, *places)
    return cast(Any, weight.unflatten(0, (groups, -1)) * rows).flatten(0, 1)


def _parameter(value: Tensor, like: Tensor) -> nn.Parameter:
    return nn.Parameter(value.to(like.dtype), requires_grad=False)
