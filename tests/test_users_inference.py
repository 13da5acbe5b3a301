"""The inference form and the calibration of networks as users write them: heads, attention, sequences."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import octify

SIZES = ((2, 3, 64, 64), (1, 3, 80, 64), (3, 3, 47, 61))


def block(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(inputs, outputs, 3, stride, 1)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU())


def body(*widths: int) -> nn.Sequential:
    return nn.Sequential(*(block(first, second) for first, second in pairwise(widths)))


class Viewed(nn.Module):
    """A classifier's vectors as a view of a map of several positions."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.pool, self.fc = body(3, 16, 32, 32), nn.AdaptiveAvgPool2d(4), nn.Linear(512, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.body(x))
        return self.fc(x.view(x.size(0), -1))


class Boxes(nn.Module):
    """A detection head: turned, laid out anew, viewed."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = body(3, 16, 32, 32), nn.Conv2d(32, 18, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.head(self.body(x))
        batch, _, height, width = x.shape
        x = x.view(batch, 3, 6, height, width).permute(0, 1, 3, 4, 2).contiguous()
        return x.view(batch, -1, 6)


class Selective(nn.Module):
    """Branches weighed by what means over one axis after the other say."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.one, self.two = block(3, 16, 2), block(16, 24), nn.Conv2d(16, 24, 3, padding=2, dilation=2)
        self.gates, self.fc = nn.ModuleList(nn.Linear(24, 24) for _ in range(2)), nn.Linear(24, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        maps = torch.stack([self.one(x), self.two(x)], 1)
        mean = maps.sum(1).mean(-1).mean(-1)
        weights = torch.stack([gate(mean) for gate in self.gates], 1).softmax(1)[..., None, None]
        return self.fc((maps * weights).sum(1).mean(3).mean(2))


class Attentive(nn.Module):
    """Channel and spatial attention by means and maxima, and attention along each axis."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.body, self.last = block(3, 16, 2), body(16, 32, 32), block(32, 16)
        self.shared = nn.Sequential(nn.Conv2d(32, 8, 1), nn.ReLU(), nn.Conv2d(8, 32, 1))
        self.place, self.rows, self.columns = nn.Conv2d(2, 1, 7, padding=3), nn.Conv2d(32, 32, 1), nn.Conv2d(32, 32, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(self.stem(x))
        x = x * (self.shared(F.adaptive_avg_pool2d(x, 1)) + self.shared(F.adaptive_max_pool2d(x, 1))).sigmoid()
        places = torch.cat((x.mean(1, keepdim=True), torch.max(x, 1, keepdim=True)[0]), 1)
        x = x * self.place(places).sigmoid()
        x = x * self.rows(F.adaptive_avg_pool2d(x, (None, 1))).sigmoid()
        return self.last(x * self.columns(F.adaptive_avg_pool2d(x, (1, None))).sigmoid())


class Sequence(nn.Module):
    """A temporal network: one axis, causal by padding and cutting, the last step read."""

    def __init__(self) -> None:
        super().__init__()
        widths = ((8, 32), (32, 32), (32, 32))
        self.layers = nn.ModuleList(
            nn.Conv1d(first, second, 3, padding=2 << index, dilation=1 << index)
            for index, (first, second) in enumerate(widths)
        )
        self.skip, self.fc = nn.Conv1d(8, 32, 1), nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = x
        for index, layer in enumerate(self.layers):
            y = torch.relu(layer(y)[:, :, : -(2 << index)])
        return self.fc((y + self.skip(x))[:, :, -1])


class Clip(nn.Module):
    """Space and time apart."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv3d(3, 16, (1, 5, 5), (1, 2, 2), (0, 2, 2))
        self.space, self.time = nn.Conv3d(16, 24, (1, 3, 3), padding=(0, 1, 1)), nn.Conv3d(24, 32, (3, 1, 1))
        self.norm, self.last, self.fc = nn.BatchNorm3d(24), nn.Conv3d(32, 32, 3, 2, 1), nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.space(torch.relu(self.stem(x)))))
        return self.fc(F.adaptive_avg_pool3d(self.last(torch.relu(self.time(x))), 1).flatten(1))


NETS: dict[type[nn.Module], tuple[tuple[int, ...], ...]] = {
    Viewed: SIZES, Boxes: SIZES, Selective: SIZES, Attentive: SIZES,
    Sequence: ((2, 8, 64), (1, 8, 77)), Clip: ((2, 3, 6, 48, 48), (1, 3, 5, 37, 41)),
}  # fmt: skip


@pytest.mark.parametrize("kind", NETS)
def test_the_inference_form_follows_at_every_size_and_in_every_memory_format(kind: type[nn.Module]) -> None:
    torch.manual_seed(0)
    source, sizes = kind().eval(), NETS[kind]
    octave = octify.convert(source, alpha=0.5, example_inputs=sizes[0]).eval()
    dense = octify.optimize(source, example_inputs=sizes[0])
    fast = octify.optimize(octave)  # at the size that it was converted at
    last = {4: torch.channels_last, 5: torch.channels_last_3d}
    with torch.no_grad():
        for size in sizes:
            x = torch.randn(size)
            for image in (x, x.contiguous(memory_format=last.get(x.dim(), torch.contiguous_format))):
                assert _error(octave(x), fast(image)) < 2e-5
                assert _error(source(x), dense(image)) < 2e-5


@pytest.mark.parametrize("kind", NETS)
def test_a_calibration_runs_through(kind: type[nn.Module]) -> None:
    torch.manual_seed(0)
    source, shape = kind().eval(), NETS[kind][0]
    images = [torch.randn(4, *shape[1:]) for _ in range(4)]
    octave = octify.convert(source, calibration=images, target=0.85)
    assert 0.8 < octave.octify_report.cost < 0.8501  # pyright: ignore[reportAttributeAccessIssue]


class Styled(nn.Module):
    """Two inputs, and in training a branch that evaluation goes without."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.body, self.style = block(3, 16, 2), body(16, 32, 32, 32), nn.Linear(4, 32)
        self.last = nn.Conv2d(32, 8, 3, padding=1)

    def forward(self, x: Tensor, style: Tensor) -> Tensor:
        x = self.body(self.stem(x)) * self.style(style)[..., None, None]
        return self.last(x + 0.1 * torch.randn_like(x)) if self.training else self.last(x)


def test_a_budget_is_what_evaluation_runs_and_a_batch_says_what_the_inputs_are() -> None:
    torch.manual_seed(0)
    batches = [(torch.randn(4, 3, 64, 64), torch.randn(4, 4)) for _ in range(4)]
    octave = octify.convert(Styled(), calibration=batches, target=0.7)
    assert 0.69 < octave.octify_report.cost <= 0.7  # pyright: ignore[reportAttributeAccessIssue]


def _error(wanted: Tensor, found: Tensor) -> float:
    return float((wanted - found).abs().max() / wanted.abs().max())
