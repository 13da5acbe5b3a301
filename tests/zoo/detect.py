"""Detectors in the census: made small, converted part by part, given targets in train mode."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from octify.convert import apply_parts
from octify.errors import TraceError
from octify.parts import find_parts, plan_parts
from octify.plan import Plan
from octify.recipe import Recipe

SIZE = (320, 320)


def is_detector(model: nn.Module) -> bool:
    """Whether a model takes a list of images."""
    return type(model).__module__.startswith("torchvision.models.detection")


def shrink(model: Any) -> Any:
    """Lets a detector work at a small size; its default of 800 takes minutes."""
    model.transform.fixed_size = SIZE
    return model


def converted_parts(model: nn.Module, recipe: Recipe, example: tuple[Tensor, ...]) -> tuple[nn.Module, Plan]:
    """A detector converted as `convert` does it, and its plan; also at alpha 0."""
    parts = find_parts(model, example, recipe, TraceError("a detector"))
    decided = plan_parts(model, parts)
    return apply_parts(model, parts, decided, example), decided


def targets(model: Any, images: list[Tensor]) -> list[dict[str, Tensor]]:
    """One box an image, with mask and keypoints."""
    height, width = SIZE
    boxes = torch.tensor([[20.0, 30.0, 200.0, 240.0]])
    return [
        {
            "boxes": boxes,
            "labels": torch.ones(1, dtype=torch.int64),
            "masks": torch.ones(1, height, width, dtype=torch.uint8),
            "keypoints": torch.tensor([[[100.0, 100.0, 1.0]] * 17]),
        }
        for _ in images
    ]
