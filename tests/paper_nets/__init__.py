"""Every network of the paper under its recipe's name: those of torchvision and timm, and those neither has."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import timm
import torchvision
from torch import nn

from . import mobile, residual, video

IMAGE, CLIP, LONG_CLIP = (1, 3, 224, 224), (1, 3, 8, 224, 224), (1, 3, 32, 224, 224)


def from_torchvision(name: str) -> Callable[[], nn.Module]:
    """The constructor of an untrained torchvision network."""
    return partial(torchvision.models.get_model, name, weights=None)


def from_timm(name: str) -> Callable[[], nn.Module]:
    """The constructor of an untrained timm network."""
    return partial(timm.create_model, name, pretrained=False)


BUILDERS: dict[str, Callable[[], nn.Module]] = {
    "resnet26": from_timm("resnet26"),
    "resnet50": from_torchvision("resnet50"),
    "resnet101": from_torchvision("resnet101"),
    "resnet152": from_torchvision("resnet152"),
    "resnet200": from_timm("resnet200"),
    "resnext50_32x4d": from_torchvision("resnext50_32x4d"),
    "resnext101_32x4d": from_timm("resnext101_32x4d"),
    "seresnet50": from_timm("seresnet50"),
    "densenet121": from_torchvision("densenet121"),
    "mobilenetv1_075": mobile.mobilenetv1_075,
    "mobilenetv1_100": from_timm("mobilenetv1_100"),
    "mobilenetv2_100": from_torchvision("mobilenet_v2"),
    "mobilenetv2_1125": mobile.mobilenetv2_1125,
    "resnet152_v1f": residual.resnet152_v1f,
    "resnet152_v1e_se": residual.resnet152_v1e_se,
    "c2d": video.c2d,
    "i3d": video.i3d,
    "i3d_nl": video.i3d_nl,
    "slowfast": video.slowfast,
    "glore": residual.glore,
}
"""Constructors by the name of the recipe in `recipes/paper`."""

INPUTS = dict.fromkeys(BUILDERS, IMAGE) | {"c2d": CLIP, "i3d": CLIP, "i3d_nl": CLIP, "slowfast": LONG_CLIP}
"""The shape of an example input, batch axis included."""


def build(name: str) -> nn.Module:
    """The network in `eval` mode; under `torch.device("meta")` it costs no memory."""
    return BUILDERS[name]().eval()
