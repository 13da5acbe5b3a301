"""The widths of MobileNet that the libraries do not name."""

from __future__ import annotations

from functools import partial

from timm.models import EfficientNet
from timm.models._efficientnet_builder import decode_arch_def, round_channels
from torch import nn
from torchvision.models import MobileNetV2

# timm's own definition of MobileNetV1: 13 depthwise separable blocks
BLOCKS = [
    ["dsa_r1_k3_s1_c64"],
    ["dsa_r2_k3_s2_c128"],
    ["dsa_r2_k3_s2_c256"],
    ["dsa_r6_k3_s2_c512"],
    ["dsa_r2_k3_s2_c1024"],
]


def mobilenetv1_075() -> nn.Module:
    """MobileNetV1 with three quarters of the channels, on timm's `EfficientNet` as its `mobilenetv1_100`."""
    return EfficientNet(
        block_args=decode_arch_def(BLOCKS),
        num_features=0,
        stem_size=32,
        round_chs_fn=partial(round_channels, multiplier=0.75),
        act_layer=nn.ReLU6,
    )


def mobilenetv2_1125() -> nn.Module:
    """MobileNetV2 with 1.125 of the channels, not rounded to multiples of 8."""
    return MobileNetV2(width_mult=1.125, round_nearest=1)
