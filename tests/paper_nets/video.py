"""The video networks of the paper: C2D, I3D, I3D with non-local blocks and SlowFast, all after ResNet-50.

Clips are (N, 3, T, H, W). Where the paper leaves a choice open, the networks follow "Non-local Neural Networks"
(Wang et al. 2018, arXiv 1711.07971) and "SlowFast Networks" (Feichtenhofer et al. 2019, arXiv 1812.03982):
max-pooling without padding in the first family (112 to 55), with padding in the second (112 to 56).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

Size = tuple[int, int, int]  # time, height, width
Depth = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], tuple[int, ...]]  # kernel in time, block by block

FLAT: Depth = ((1, 1, 1), (1, 1, 1, 1), (1, 1, 1, 1, 1, 1), (1, 1, 1))
INFLATED: Depth = ((3, 3, 3), (3, 1, 3, 1), (3, 1, 3, 1, 3, 1), (1, 3, 1))
SLOW: Depth = ((1, 1, 1), (1, 1, 1, 1), (3, 3, 3, 3, 3, 3), (3, 3, 3))
FAST: Depth = ((3, 3, 3), (3, 3, 3, 3), (3, 3, 3, 3, 3, 3), (3, 3, 3))


def conv_bn(inner: int, outer: int, kernel: Size, stride: Size = (1, 1, 1)) -> nn.Sequential:
    """Convolution with "half" padding and no bias, and batch norm."""
    padding = (kernel[0] // 2, kernel[1] // 2, kernel[2] // 2)
    return nn.Sequential(nn.Conv3d(inner, outer, kernel, stride, padding, bias=False), nn.BatchNorm3d(outer))


class Bottleneck(nn.Module):
    """t x1x1, 1x3x3 (with the stride), 1x1x1."""

    def __init__(self, inner: int, outer: int, time: int, stride: int) -> None:
        super().__init__()
        width, step = outer // 4, (1, stride, stride)
        self.conv1 = conv_bn(inner, width, (time, 1, 1))
        self.conv2 = conv_bn(width, width, (1, 3, 3), step)
        self.conv3 = conv_bn(width, outer, (1, 1, 1))
        changes = inner != outer or stride > 1
        self.shortcut = conv_bn(inner, outer, (1, 1, 1), step) if changes else nn.Identity()
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.conv2(self.relu(self.conv1(x))))
        return self.relu(self.conv3(y) + self.shortcut(x))


class NonLocal(nn.Module):
    """A non-local block, dot products through a softmax, keys and values from a map of half the size."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        width = channels // 2
        self.pool = nn.MaxPool3d((1, 2, 2))
        self.theta = nn.Conv3d(channels, width, 1)
        self.phi = nn.Conv3d(channels, width, 1)
        self.g = nn.Conv3d(channels, width, 1)
        self.out = nn.Conv3d(width, channels, 1)
        self.norm = nn.BatchNorm3d(channels)
        self.scale = width**-0.5

    def forward(self, x: Tensor) -> Tensor:
        small, theta = self.pool(x), self.theta(x)
        keys, values = torch.flatten(self.phi(small), 2), torch.flatten(self.g(small), 2)
        weight = torch.softmax(torch.matmul(torch.flatten(theta, 2).transpose(1, 2), keys) * self.scale, dim=-1)
        y = torch.matmul(values, weight.transpose(1, 2)).view(theta.shape)
        return x + self.norm(self.out(y))


def stage(inner: int, outer: int, times: tuple[int, ...], stride: int) -> list[nn.Module]:
    """The blocks of one stage; the first one changes size and channels."""
    rest = [Bottleneck(outer, outer, time, 1) for time in times[1:]]
    return [Bottleneck(inner, outer, times[0], stride), *rest]


def with_non_local(blocks: list[nn.Module], channels: int) -> list[nn.Module]:
    """A non-local block behind every second block."""
    return [nn.Sequential(block, NonLocal(channels)) if i % 2 else block for i, block in enumerate(blocks)]


class ResNet50(nn.Module):
    """C2D or I3D: (N, 3, 8, H, W) to (N, 400)."""

    def __init__(self, stem_time: int, times: Depth, non_local: bool = False) -> None:
        super().__init__()
        self.stem = conv_bn(3, 64, (stem_time, 7, 7), (1, 2, 2))
        self.relu = nn.ReLU()
        self.pool = nn.MaxPool3d((1, 3, 3), (1, 2, 2))
        res3, res4 = stage(256, 512, times[1], 2), stage(512, 1024, times[2], 2)
        self.res2 = nn.Sequential(*stage(64, 256, times[0], 1))
        self.pool_time = nn.MaxPool3d((2, 1, 1))
        self.res3 = nn.Sequential(*(with_non_local(res3, 512) if non_local else res3))
        self.res4 = nn.Sequential(*(with_non_local(res4, 1024) if non_local else res4))
        self.res5 = nn.Sequential(*stage(1024, 2048, times[3], 2))
        self.mean = nn.AdaptiveAvgPool3d(1)
        self.fc = nn.Linear(2048, 400)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool_time(self.res2(self.pool(self.relu(self.stem(x)))))
        x = self.res5(self.res4(self.res3(x)))
        return self.fc(torch.flatten(self.mean(x), 1))


class Pathway(nn.Module):
    """One path of SlowFast: its layers, without the way they are joined."""

    def __init__(self, width: int, extra: int, stem_time: int, times: Depth) -> None:
        super().__init__()
        pool = nn.MaxPool3d((1, 3, 3), (1, 2, 2), (0, 1, 1))
        self.stem = nn.Sequential(*conv_bn(3, width, (stem_time, 7, 7), (1, 2, 2)), nn.ReLU(), pool)
        self.res2 = nn.Sequential(*stage(width + extra, 4 * width, times[0], 1))
        self.res3 = nn.Sequential(*stage(4 * (width + extra), 8 * width, times[1], 2))
        self.res4 = nn.Sequential(*stage(8 * (width + extra), 16 * width, times[2], 2))
        self.res5 = nn.Sequential(*stage(16 * (width + extra), 32 * width, times[3], 2))


class Lateral(nn.Module):
    """From the fast path to the slow one: a convolution over time whose stride is the ratio of the frame rates."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv3d(channels, 2 * channels, (5, 1, 1), (8, 1, 1), (2, 0, 0), bias=False)
        self.norm = nn.BatchNorm3d(2 * channels)
        self.relu = nn.ReLU()

    def forward(self, slow: Tensor, fast: Tensor) -> Tensor:
        return torch.cat([slow, self.relu(self.norm(self.conv(fast)))], dim=1)


class SlowFast(nn.Module):
    """SlowFast 4x16: 32 frames for the fast path (an eighth of the channels), every eighth for the slow one."""

    def __init__(self) -> None:
        super().__init__()
        self.slow = Pathway(64, 16, 1, SLOW)
        self.fast = Pathway(8, 0, 5, FAST)
        self.lateral = nn.ModuleList([Lateral(channels) for channels in (8, 32, 64, 128)])
        self.mean = nn.AdaptiveAvgPool3d(1)
        self.fc = nn.Linear(2048 + 256, 400)

    def forward(self, clip: Tensor) -> Tensor:
        slow, fast = self.slow.stem(clip[:, :, ::8]), self.fast.stem(clip)
        slow, fast = self.slow.res2(self.lateral[0](slow, fast)), self.fast.res2(fast)
        slow, fast = self.slow.res3(self.lateral[1](slow, fast)), self.fast.res3(fast)
        slow, fast = self.slow.res4(self.lateral[2](slow, fast)), self.fast.res4(fast)
        slow, fast = self.slow.res5(self.lateral[3](slow, fast)), self.fast.res5(fast)
        means = torch.cat([torch.flatten(self.mean(slow), 1), torch.flatten(self.mean(fast), 1)], dim=1)
        return self.fc(means)


def c2d() -> nn.Module:
    """ResNet-50 on single frames, joined by temporal pooling behind res2 and by the mean at the end."""
    return ResNet50(1, FLAT)


def i3d() -> nn.Module:
    """C2D with a 5x7x7 stem and with 3x1x1 instead of 1x1x1 in every second block."""
    return ResNet50(5, INFLATED)


def i3d_nl() -> nn.Module:
    """I3D with two non-local blocks in res3 and three in res4."""
    return ResNet50(5, INFLATED, non_local=True)


def slowfast() -> nn.Module:
    """SlowFast-R50 4x16."""
    return SlowFast()
