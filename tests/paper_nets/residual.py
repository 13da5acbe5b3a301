"""The two large ResNet-152 of the paper, and ResNet-50 with global reasoning units."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torchvision.models import resnet50
from torchvision.models.resnet import ResNet

Shortcut = tuple[int, int]  # channels in and out


def conv_bn(channels: Shortcut, kernel: int, stride: int = 1, relu: bool = True) -> nn.Sequential:
    """Convolution with "half" padding and no bias, batch norm and, if asked for, ReLU."""
    layers: list[nn.Module] = [
        nn.Conv2d(*channels, kernel, stride, kernel // 2, bias=False),
        nn.BatchNorm2d(channels[1]),
    ]
    return nn.Sequential(*layers, nn.ReLU()) if relu else nn.Sequential(*layers)


class Gate(nn.Module):
    """Squeeze and excitation with a sixteenth of the channels."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.conv1 = nn.Conv2d(channels, channels // 16, 1)
        self.relu = nn.ReLU()
        self.conv2 = nn.Conv2d(channels // 16, channels, 1)
        self.sigmoid = nn.Sigmoid()

    def forward(self, x: Tensor) -> Tensor:
        return x * self.sigmoid(self.conv2(self.relu(self.conv1(self.pool(x)))))


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 with the stride in the last convolution.

    With a gate the block opens with a batch norm without weights (on the shortcut as well): the paper's authors found
    that ResNet-152 with gates trains badly without it.
    """

    def __init__(self, channels: Shortcut, stride: int, gate: bool) -> None:
        super().__init__()
        inner, outer = channels[1] // 4, channels[1]
        changes = stride > 1 or channels[0] != outer
        self.norm = nn.BatchNorm2d(channels[0], affine=False) if gate else nn.Identity()
        self.conv1 = conv_bn((channels[0], inner), 1)
        self.conv2 = conv_bn((inner, inner), 3)
        self.conv3 = conv_bn((inner, outer), 1, stride, relu=False)
        self.gate = Gate(outer) if gate else nn.Identity()
        opening: list[nn.Module] = [nn.BatchNorm2d(channels[0], affine=False)] if gate else []
        shortcut = nn.Sequential(*opening, *conv_bn(channels, 1, stride, relu=False))
        self.shortcut = shortcut if changes else nn.Identity()
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        y = self.gate(self.conv3(self.conv2(self.conv1(self.norm(x)))))
        return self.relu(y + self.shortcut(x))


class StemBottleneck(nn.Module):
    """The residual block with stride 2 that stands for max-pooling in `resnet152_v1f`: 64-32-32-64."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = conv_bn((64, 32), 1)
        self.conv2 = conv_bn((32, 32), 3, 2)
        self.conv3 = conv_bn((32, 64), 1, relu=False)
        self.shortcut = conv_bn((64, 64), 1, 2, relu=False)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.conv3(self.conv2(self.conv1(x))) + self.shortcut(x))


class LargeResNet152(nn.Module):
    """Deep stem, four stages, global average and a linear layer; (N, 3, H, W) to (N, 1000)."""

    def __init__(self, stem: nn.Module, gate: bool) -> None:
        super().__init__()
        self.stem = stem
        self.layer1 = stage(3, (64, 256), 1, gate)
        self.layer2 = stage(8, (256, 512), 2, gate)
        self.layer3 = stage(36, (512, 1024), 2, gate)
        self.layer4 = stage(3, (1024, 2048), 2, gate)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(2048, 1000)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer4(self.layer3(self.layer2(self.layer1(self.stem(x)))))
        return self.fc(torch.flatten(self.pool(x), 1))


def stage(blocks: int, channels: Shortcut, stride: int, gate: bool) -> nn.Sequential:
    """A first block that changes size and channels, and `blocks - 1` that keep them."""
    outer = channels[1]
    rest = [Bottleneck((outer, outer), 1, gate) for _ in range(blocks - 1)]
    return nn.Sequential(Bottleneck(channels, stride, gate), *rest)


def resnet152_v1f() -> nn.Module:
    """ResNet-152 without max-pooling: 3x3(8), 3x3(32, stride 2), 3x3(64), then a bottleneck with stride 2."""
    stem = nn.Sequential(conv_bn((3, 8), 3), conv_bn((8, 32), 3, 2), conv_bn((32, 64), 3), StemBottleneck())
    return LargeResNet152(stem, gate=False)


def resnet152_v1e_se() -> nn.Module:
    """ResNet-152 with gates: 3x3(32, stride 2), 3x3(32), 3x3(64), then max-pooling."""
    pool = nn.MaxPool2d(3, 2, 1)
    stem = nn.Sequential(conv_bn((3, 32), 3, 2), conv_bn((32, 32), 3), conv_bn((32, 64), 3), pool)
    return LargeResNet152(stem, gate=True)


class GlobalReasoning(nn.Module):
    """A global reasoning unit (Chen et al. 2019, arXiv 1811.12814): project to nodes, reason, project back.

    `nodes` is a quarter of the channels and their state is half of the channels wide, as in the authors' code.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        nodes, state = channels // 4, channels // 2
        self.state = nn.Conv2d(channels, state, 1)
        self.project = nn.Conv2d(channels, nodes, 1)
        self.between_nodes = nn.Conv1d(nodes, nodes, 1)
        self.relu = nn.ReLU()
        self.between_states = nn.Conv1d(state, state, 1, bias=False)
        self.extend = nn.Conv2d(state, channels, 1, bias=False)
        self.norm = nn.BatchNorm2d(channels, eps=1e-4)

    def forward(self, x: Tensor) -> Tensor:
        state = self.state(x)
        nodes = torch.flatten(self.project(x), 2)
        graph = torch.matmul(torch.flatten(state, 2), nodes.transpose(1, 2))
        graph = self.between_nodes(graph.transpose(1, 2)).transpose(1, 2) + graph
        graph = self.between_states(self.relu(graph))
        back = torch.matmul(graph, nodes).view(state.shape)
        return x + self.norm(self.extend(back))


def glore() -> nn.Module:
    """ResNet-50 with a global reasoning unit behind the first, third and fifth block of the stage at 1/16.

    The paper only says "three units in Res4"; the places are those of the authors' video network.
    """
    net: ResNet = resnet50()
    blocks = list(net.layer3.children())
    units: dict[int, Callable[[], nn.Module]] = {place: lambda: GlobalReasoning(1024) for place in (0, 2, 4)}
    with_units = [nn.Sequential(block, units[i]()) if i in units else block for i, block in enumerate(blocks)]
    net.layer3 = nn.Sequential(*with_units)
    return net
