"""Detectors in the census: made small, converted part by part, given targets in train mode."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from octify.graph import meta_copy
from octify.module import OctaveModule
from tests.zoo.compare import try_run
from tests.zoo.count import macs

SIZE = 320  # converted and counted at; a detector's default of 800 takes minutes
SMALL = (128, 192, 256, SIZE)  # the oracles' sizes, tried in this order
BOXES = 50  # an image: what a thousand would take belongs to Linear layers
Calls = dict[str, list[tuple[Tensor, ...]]]


def is_detector(model: nn.Module) -> bool:
    """Whether a model takes a list of images."""
    return type(model).__module__.startswith("torchvision.models.detection")


def shrink(model: Any, size: int = SIZE) -> Any:
    """Lets a detector work at a small size and on few boxes."""
    model.transform.fixed_size = (size, size)
    if hasattr(model, "rpn"):
        model.rpn._post_nms_top_n = dict.fromkeys(("training", "testing"), BOXES)
    return model


def images(size: int, count: int = 2) -> list[Tensor]:
    """Random images."""
    return [torch.rand(3, size, size) for _ in range(count)]


def small_images(model: nn.Module) -> list[Tensor]:
    """Images of the smallest size at which a detector runs in both modes."""
    model = copy.deepcopy(model)  # in train mode it counts its batch norms' statistics
    for size in SMALL:
        found = images(size)
        shrink(model, size)
        with torch.no_grad():
            if try_run(model.eval(), (found,)) and try_run(model.train(), (found, targets(found))):
                return found
    raise ValueError(f"the source runs on none of {SMALL}")


def record_calls(model: nn.Module, found: Calls) -> list[Any]:
    """Hooks that keep what every module is called with, as meta tensors; the handles that remove them."""

    def keep(path: str) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
            if all(isinstance(value, Tensor) for value in args):
                found.setdefault(path, []).append(tuple(value.detach().to("meta") for value in args))

        return hook

    return [module.register_forward_pre_hook(keep(path)) for path, module in model.named_modules()]


def parts_macs(model: nn.Module, converted: nn.Module, calls: Calls) -> tuple[float, float]:
    """The multiply-adds of the parts before and after, for the same calls: how many boxes there are is chance."""
    sums = [0.0, 0.0]
    for path, part in converted.named_modules():
        if isinstance(part, OctaveModule):
            for index, own in enumerate((model.get_submodule(path), part)):
                ghost = meta_copy(own).eval()
                sums[index] += sum(macs(lambda args=args, ghost=ghost: ghost(*args)) for args in calls.get(path, ()))
    return sums[0], sums[1]


def targets(found: list[Tensor]) -> list[dict[str, Tensor]]:
    """One box an image, with mask and keypoints."""
    side = found[0].shape[-1]
    boxes = torch.tensor([[0.06, 0.1, 0.6, 0.75]]) * side
    return [
        {
            "boxes": boxes,
            "labels": torch.ones(1, dtype=torch.int64),
            "masks": torch.ones(1, side, side, dtype=torch.uint8),
            "keypoints": torch.tensor([[[0.3 * side, 0.3 * side, 1.0]] * 17]),
        }
        for _ in found
    ]
