"""Five small networks of different build for 64x64 pictures, written plainly as people write them.

All of them keep maps of 64, 32 and 16 pixels in their first three stages (those can be split) and 8 in the last (which
stays dense at the default min_size).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from tests.fidelity.data import CLASSES


def conv_bn(c_in: int, c_out: int, kernel: int = 3, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    conv = nn.Conv2d(c_in, c_out, kernel, stride, kernel // 2, groups=groups, bias=False)
    return [conv, nn.BatchNorm2d(c_out)]


class Classifier(nn.Module):
    """Global average pooling and a linear layer."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(channels, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(torch.flatten(self.pool(x), 1))


# ---- residual -------------------------------------------------------------------------------------------------------


class BasicBlock(nn.Module):
    """ResNet's: two 3x3 convolutions beside a shortcut."""

    def __init__(self, c_in: int, c_out: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv_bn(c_in, c_out, 3, stride)
        self.conv2, self.bn2 = conv_bn(c_out, c_out)
        self.relu = nn.ReLU(inplace=True)
        same = stride == 1 and c_in == c_out
        self.downsample = None if same else nn.Sequential(*conv_bn(c_in, c_out, 1, stride))

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        y += shortcut
        return self.relu(y)


def residual() -> nn.Module:
    """A ResNet-14 of width 16."""
    blocks = [BasicBlock(16, 16, 1)]
    for c_in, c_out in ((16, 32), (32, 64), (64, 128)):
        blocks += [BasicBlock(c_in, c_out, 2)]
    blocks[2:2] = [BasicBlock(32, 32, 1)]
    blocks[4:4] = [BasicBlock(64, 64, 1)]
    return nn.Sequential(*conv_bn(3, 16), nn.ReLU(inplace=True), *blocks, Classifier(128))


# ---- inverted residual ----------------------------------------------------------------------------------------------


class SqueezeExcite(nn.Module):
    """EfficientNet's channel gate, written with 1x1 convolutions."""

    def __init__(self, channels: int, squeezed: int) -> None:
        super().__init__()
        self.reduce = nn.Conv2d(channels, squeezed, 1)
        self.expand = nn.Conv2d(squeezed, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        gate = x.mean((2, 3), keepdim=True)
        gate = torch.relu(self.reduce(gate))
        return x * torch.sigmoid(self.expand(gate))


class InvertedResidual(nn.Module):
    """MobileNetV3's and EfficientNet's: expand, depthwise, gate, project."""

    def __init__(self, c_in: int, c_out: int, stride: int, ratio: int, kernel: int) -> None:
        super().__init__()
        hidden = c_in * ratio
        self.expand = nn.Sequential(*conv_bn(c_in, hidden, 1), nn.SiLU()) if ratio > 1 else nn.Identity()
        self.depthwise = nn.Sequential(*conv_bn(hidden, hidden, kernel, stride, hidden), nn.SiLU())
        self.gate = SqueezeExcite(hidden, max(c_in // 4, 4))
        self.project = nn.Sequential(*conv_bn(hidden, c_out, 1))
        self.shortcut = stride == 1 and c_in == c_out

    def forward(self, x: Tensor) -> Tensor:
        y = self.project(self.gate(self.depthwise(self.expand(x))))
        return x + y if self.shortcut else y


def inverted() -> nn.Module:
    """An EfficientNet of a quarter of B0's width, 3x3 and 5x5 depthwise kernels mixed."""
    rows = (
        (12, 12, 1, 1, 3),
        (12, 20, 2, 3, 3),
        (20, 20, 1, 3, 5),
        (20, 40, 2, 4, 5),
        (40, 40, 1, 4, 3),
        (40, 64, 2, 4, 3),
    )
    blocks = [InvertedResidual(*row) for row in rows]
    last = [*conv_bn(64, 160, 1), nn.SiLU()]
    return nn.Sequential(*conv_bn(3, 12), nn.SiLU(), *blocks, *last, Classifier(160))


# ---- dense concatenation --------------------------------------------------------------------------------------------


class DenseLayer(nn.Module):
    """DenseNet's bottleneck layer: norm, activation and convolution twice, then concatenation."""

    def __init__(self, channels: int, growth: int) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(channels)
        self.conv1 = nn.Conv2d(channels, 2 * growth, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(2 * growth)
        self.conv2 = nn.Conv2d(2 * growth, growth, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(torch.relu(self.norm1(x)))
        y = self.conv2(torch.relu(self.norm2(y)))
        return torch.cat([x, y], 1)


class Transition(nn.Sequential):
    """DenseNet's: fewer channels, half the size."""

    def __init__(self, c_in: int, c_out: int) -> None:
        conv = nn.Conv2d(c_in, c_out, 1, bias=False)
        super().__init__(nn.BatchNorm2d(c_in), nn.ReLU(inplace=True), conv, nn.AvgPool2d(2))


def concatenation(growth: int = 12) -> nn.Module:
    """A DenseNet-BC of growth 12."""
    layers: list[nn.Module] = conv_bn(3, 16)[:1]
    channels = 16
    for i, depth in enumerate((2, 3, 4, 3)):
        if i:
            layers += [Transition(channels, channels * 3 // 4)]
            channels = channels * 3 // 4
        layers += [DenseLayer(channels + k * growth, growth) for k in range(depth)]
        channels += depth * growth
    return nn.Sequential(*layers, nn.BatchNorm2d(channels), nn.ReLU(inplace=True), Classifier(channels))


# ---- grouped --------------------------------------------------------------------------------------------------------


class GroupedBlock(nn.Module):
    """RegNetX's and ResNeXt's: 1x1, grouped 3x3, 1x1 beside a shortcut."""

    def __init__(self, c_in: int, c_out: int, stride: int, group: int = 8) -> None:
        super().__init__()
        self.conv1 = nn.Sequential(*conv_bn(c_in, c_out, 1), nn.ReLU(inplace=True))
        self.conv2 = nn.Sequential(*conv_bn(c_out, c_out, 3, stride, c_out // group), nn.ReLU(inplace=True))
        self.conv3 = nn.Sequential(*conv_bn(c_out, c_out, 1))
        same = stride == 1 and c_in == c_out
        self.downsample = nn.Identity() if same else nn.Sequential(*conv_bn(c_in, c_out, 1, stride))
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.downsample(x) + self.conv3(self.conv2(self.conv1(x))))


def grouped() -> nn.Module:
    """A RegNetX of group width 8."""
    rows = ((16, 24, 1), (24, 48, 2), (48, 48, 1), (48, 96, 2), (96, 96, 1), (96, 160, 2))
    blocks = [GroupedBlock(*row) for row in rows]
    return nn.Sequential(*conv_bn(3, 16), nn.ReLU(inplace=True), *blocks, Classifier(160))


# ---- no batch norm --------------------------------------------------------------------------------------------------


def plain() -> nn.Module:
    """A VGG with biases and no norm."""
    layers: list[nn.Module] = []
    c_in = 3
    for i, (width, depth) in enumerate(((16, 2), (32, 2), (64, 2), (128, 2))):
        layers += [nn.MaxPool2d(2)] if i else []
        for _ in range(depth):
            conv = nn.Conv2d(c_in, width, 3, padding=1)
            nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")
            nn.init.zeros_(conv.bias)  # pyright: ignore[reportArgumentType]
            layers += [conv, nn.ReLU(inplace=True)]
            c_in = width
    return nn.Sequential(*layers, Classifier(c_in))


NETS: dict[str, Callable[[], nn.Module]] = {
    "residual": residual,
    "inverted": inverted,
    "concatenation": concatenation,
    "grouped": grouped,
    "plain": plain,
}


def make_net(name: str, seed: int = 0) -> nn.Module:
    """An untrained net whose initial weights depend on the seed only."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return NETS[name]()
