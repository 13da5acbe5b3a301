"""What a network of torchvision or timm takes: the shape of its images and how they are prepared."""

from __future__ import annotations

import importlib
import math
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn

Shape = tuple[int, ...]

DEFAULT: Shape = (3, 224, 224)
CLIP = 16  # frames; video networks name the size of a frame only
IMAGES = {"OpticalFlow": 2}  # how many a network takes, by torchvision's name of the preparation


@dataclass(frozen=True)
class Preprocessing:
    """How an image becomes a network's input: shorter side to `resize`, centre crop to `size`, then mean and std."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    size: tuple[int, int]
    resize: int
    interpolation: str


def shapes_of(model: nn.Module) -> tuple[Shape, ...] | None:
    """The shape of each input, without the batch, that a model was made for, if it is one of the libraries'."""
    config = _timm_config(model)
    if config.get("input_size"):
        return (tuple(config["input_size"]),)
    if _is_detector(model):
        height, width = _detector_size(model)
        return ((3, height, width),)
    return shapes_of_weights(_weights_of(model))


def shapes_of_weights(weights: Iterable[Any]) -> tuple[Shape, ...] | None:
    """The smallest inputs that some of torchvision's weights were made for.

    The smallest, because a network's larger ones can belong to weights that change the network (ViT's image size).
    """
    found = [shapes for entry in weights if (shapes := _entry_shapes(entry))]
    return min(found, default=None)


def preprocessing_of(model: nn.Module) -> Preprocessing | None:
    """How images are prepared for a model of the libraries."""
    config = _timm_config(model)
    if config.get("mean") and config.get("input_size"):
        return preprocessing_of_config(config)
    if _is_detector(model):
        size = _detector_size(model)
        transform: Any = model.transform
        return Preprocessing(tuple(transform.image_mean), tuple(transform.image_std), size, min(size), "bilinear")
    return preprocessing_of_weights(_weights_of(model))


def preprocessing_of_config(config: dict[str, Any]) -> Preprocessing:
    """How timm prepares images, from a network's `pretrained_cfg`."""
    height, width = config["input_size"][-2:]
    resize = math.floor(min(height, width) / config.get("crop_pct", 0.875))
    interpolation = str(config.get("interpolation", "bicubic"))
    return Preprocessing(tuple(config["mean"]), tuple(config["std"]), (height, width), resize, interpolation)


def preprocessing_of_weights(weights: Iterable[Any]) -> Preprocessing | None:
    """How torchvision prepares images for the weights with the smallest of them."""
    known = [
        (shapes[0][-2:], entry.transforms())
        for entry in weights
        if (shapes := _entry_shapes(entry)) and hasattr(entry.transforms(), "mean")
    ]
    if not known:
        return None
    (height, width), transform = min(known, key=lambda pair: pair[0])
    mean, std, resize = tuple(transform.mean), tuple(transform.std), min(transform.resize_size)
    return Preprocessing(mean, std, (height, width), resize, transform.interpolation.value)


def _timm_config(model: nn.Module) -> dict[str, Any]:
    config: Any = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None) or {}
    return config.to_dict() if hasattr(config, "to_dict") else config


def _is_detector(model: nn.Module) -> bool:
    return type(model).__module__.startswith("torchvision.models.detection") and hasattr(model, "transform")


def _detector_size(model: nn.Module) -> tuple[int, int]:
    """Detectors resize by themselves; at this size they change nothing."""
    transform: Any = model.transform
    height, width = transform.fixed_size or (transform.min_size[-1], transform.min_size[-1])
    return height, width


def _weights_of(model: nn.Module) -> list[Any]:
    """The weights that torchvision has for a model: those of its size where its file has several networks."""
    module = type(model).__module__
    if not module.startswith("torchvision.models."):
        return []
    enum: Any = importlib.import_module("torchvision.models").WeightsEnum
    kinds: list[Any] = [kind for kind in vars(sys.modules[module]).values() if isinstance(kind, type)]
    entries = [entry for kind in kinds if issubclass(kind, enum) and kind.__module__ == module for entry in kind]
    count = sum(parameter.numel() for parameter in model.parameters())
    return [entry for entry in entries if entry.meta["num_params"] == count] or entries


def _entry_shapes(entry: Any) -> tuple[Shape, ...] | None:
    transform = entry.transforms()
    size = list(getattr(transform, "crop_size", None) or getattr(transform, "resize_size", None) or ())
    size = size or [length for length in entry.meta.get("min_size", ()) if length > 1]
    if not size:
        return None
    height, width = size[0], size[-1]
    if type(transform).__name__ == "VideoClassification":
        return ((3, CLIP, height, width),)
    return ((3, height, width),) * IMAGES.get(type(transform).__name__, 1)
