"""Batch norm re-estimated on the calibration images, kept only where images that nobody fitted to say it helps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from octify.calibrate.data import output_loss
from octify.calibrate.walk import Chunk
from octify.module import OctaveModule

Norm = nn.modules.batchnorm._BatchNorm  # pyright: ignore[reportPrivateUsage]


def norms_of(model: nn.Module) -> list[Norm]:
    """The batch norms with running statistics."""
    return [module for module in model.modules() if isinstance(module, Norm) and module.running_mean is not None]


def estimate_norms(converted: OctaveModule, chunks: Sequence[Chunk]) -> None:
    """Puts the mean over all chunks in the place of every batch norm's running statistics."""
    norms = norms_of(converted)
    before = [(norm.momentum, norm.training, norm.num_batches_tracked) for norm in norms]
    for norm in norms:
        norm.momentum = None
        norm.num_batches_tracked = torch.zeros(1, dtype=torch.int64)
        norm.train()
    with torch.no_grad():
        for chunk in chunks:
            converted(*chunk)
    for norm, (momentum, training, batches) in zip(norms, before, strict=True):
        norm.momentum, norm.num_batches_tracked = momentum, batches
        norm.train(training)


def try_norms(
    converted: OctaveModule, chunks: Sequence[Chunk], held: Sequence[Chunk], dense: Sequence[Any]
) -> tuple[float, float]:
    """The loss on held-back images before and after re-estimation, which is undone if it does not help."""
    state = {name: value.clone() for name, value in converted.named_buffers()}
    before = output_loss(dense, run_model(converted, held))
    estimate_norms(converted, chunks)
    after = output_loss(dense, run_model(converted, held))
    if not after < before:
        with torch.no_grad():
            for name, value in converted.named_buffers():
                value.copy_(state[name])
    return before, after


def run_model(model: nn.Module, chunks: Sequence[Chunk]) -> list[Any]:
    """What a model gives for each chunk, without gradients."""
    with torch.no_grad():
        return [model(*chunk) for chunk in chunks]


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    """Copies of all tensors that a state dict holds."""
    return {name: value.detach().clone() for name, value in model.state_dict().items()}
