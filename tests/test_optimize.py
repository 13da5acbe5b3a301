"""The optimised form computes what the network computes, at the example's size and at others."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable

import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F

import octify
from octify.errors import BackendError, ModelError
from octify.layers import OctConv
from octify.optimize import Optimized, flatten, optimize
from octify.optimize import passes as graph_passes
from octify.recipe import Recipe
from octify.resample import pool_low

NETS = {
    "resnet18": lambda: torchvision.models.resnet18(),
    "resnext": lambda: timm.create_model("resnext26ts"),
    "densenet121": lambda: torchvision.models.densenet121(),
    "mobilenet_v2": lambda: torchvision.models.mobilenet_v2(),
    "mobilenetv1": lambda: timm.create_model("mobilenetv1_100"),
    "se": lambda: timm.create_model("seresnet18"),
    "shufflenet": lambda: torchvision.models.shufflenet_v2_x0_5(),
    "googlenet": lambda: torchvision.models.googlenet(init_weights=False),
}


def ready(net: nn.Module) -> nn.Module:
    """With batch norms that do something."""
    generator = torch.Generator().manual_seed(1)
    for module in net.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            for tensor, low, high in (
                (module.running_mean, -0.2, 0.2),
                (module.running_var, 0.5, 1.5),
                (module.weight, 0.5, 1.5),
                (module.bias, -0.2, 0.2),
            ):
                with torch.no_grad():
                    tensor.copy_(torch.rand(tensor.shape, generator=generator) * (high - low) + low)
    return net.eval()


def relative(found: Tensor, wanted: Tensor) -> float:
    assert found.shape == wanted.shape
    return ((found - wanted).abs().max() / wanted.abs().max()).item()


def converted(name: str, alpha: float = 0.5, kernels: str = "fold") -> nn.Module:
    torch.manual_seed(0)
    recipe = Recipe.from_dict({"version": 1, "defaults": {"alpha": alpha, "min_size": 2, "kernels": kernels}})
    return octify.convert(ready(NETS[name]()), recipe=recipe, example_inputs=(1, 3, 64, 64)).eval()


@pytest.mark.parametrize("name", NETS)
def test_the_eager_form_computes_the_same_at_any_size(name: str) -> None:
    octave = converted(name)
    form = optimize(octave, "eager")
    for size in ((64, 64), (75, 91), (64, 64)):
        image = torch.rand(2, 3, *size)
        with torch.inference_mode():
            assert relative(form(image), octave(image)) < 1e-5, size


@pytest.mark.parametrize("alpha", [0.25, 1.0])
def test_other_alphas_and_the_papers_kernels(alpha: float) -> None:
    for kernels in ("fold", "paper"):
        octave = converted("resnet18", alpha, kernels=kernels)
        image = torch.rand(1, 3, 61, 64)
        with torch.inference_mode():
            assert relative(optimize(octave)(image), octave(image)) < 1e-5


def test_a_dense_network_gets_the_same_passes() -> None:
    net = ready(torchvision.models.resnet18())
    form = optimize(net, "eager", (1, 3, 64, 64))
    image = torch.rand(1, 3, 64, 64)
    with torch.inference_mode():
        assert relative(form(image), net(image)) < 1e-5
    assert form.octify_passes["batch norm into convolutions"] == 20


@pytest.mark.parametrize("dtype,limit", [(torch.bfloat16, 0.1), (torch.float16, 0.02), (torch.float64, 1e-12)])
def test_other_types_within_their_rounding(dtype: torch.dtype, limit: float) -> None:
    octave = converted("resnet18").to(dtype)
    image = torch.rand(2, 3, 64, 64).to(dtype)
    with torch.inference_mode():
        wanted = copy.deepcopy(octave).double()(image.double())
        found = optimize(octave)(image)
    assert found.dtype == dtype and relative(found.double(), wanted) < limit


def test_the_given_network_stays_as_it_is() -> None:
    octave = converted("resnet18").train()
    before = {name: value.clone() for name, value in octave.state_dict().items()}
    optimize(octave)
    assert octave.training and any(isinstance(module, OctConv) for module in octave.modules())
    assert all(torch.equal(value, before[name]) for name, value in octave.state_dict().items())


def flat(name: str = "resnet18") -> Optimized:
    return flatten(converted(name), (torch.empty(1, 3, 64, 64, device="meta"),))


def test_each_pass_leaves_nothing_to_do() -> None:
    form = flat()
    kinds = {type(module) for module in form.modules()}
    assert not kinds & {nn.BatchNorm2d, OctConv, octify.OctConv2d}
    pools = [node.args[0] for node in form.graph.nodes if node.target is pool_low]
    assert len(pools) == len(set(pools)), "one pooling for all readers"
    for step in (graph_passes.drop_idle, graph_passes.share_pools, graph_passes.gather_acts):
        assert step(form) == 0


def test_a_map_that_someone_else_reads_is_not_written_over() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.a, self.b, self.c = (nn.Conv2d(16, 16, 3, padding=1) for _ in range(4))

        def forward(self, x: Tensor) -> Tensor:
            x = torch.relu(self.a(self.stem(x)))
            y = self.b(x) + x
            return torch.relu(self.c(y) + x) * x.mean() + y

    net = Twice().eval()
    octave = octify.convert(net, alpha=0.5, example_inputs=(1, 16, 32, 32)).eval()
    image = torch.rand(1, 16, 32, 32)
    kept = image.clone()
    for model in (net, octave):
        form = optimize(model, "eager", (1, 16, 32, 32))
        with torch.inference_mode():
            assert relative(form(image), model(image)) < 1e-5
            assert relative(form(image), model(image)) < 1e-5, "the second call differs"
    assert torch.equal(image, kept)


UPWARD: dict[int, tuple[type[nn.Module], type[nn.Module], type[nn.Module]]] = {
    1: (nn.Conv1d, nn.ConvTranspose1d, nn.BatchNorm1d),
    2: (nn.Conv2d, nn.ConvTranspose2d, nn.BatchNorm2d),
    3: (nn.Conv3d, nn.ConvTranspose3d, nn.BatchNorm3d),
}


@pytest.mark.parametrize("alpha", [0.0, 0.5])
@pytest.mark.parametrize("groups", [1, 2, 12])
@pytest.mark.parametrize("axes", UPWARD)
def test_norms_fold_into_transposed_layers_group_by_group(axes: int, groups: int, alpha: float) -> None:
    torch.manual_seed(0)
    conv, transposed, norm = UPWARD[axes]
    layer = transposed(12, 12, 3, stride=2, padding=1, groups=groups, bias=groups > 1)
    net = nn.Sequential(conv(3, 12, 1), conv(12, 12, 3, padding=1), layer, norm(12), nn.ReLU(), conv(12, 4, 1))
    shape = (2, 3, *(9,) * (axes - 2), *(32,) * min(2, axes))
    octave = octify.convert(ready(net), alpha=alpha, example_inputs=shape).eval()
    form = flatten(octave, (torch.empty(shape, device="meta"),))
    assert form.octify_passes["batch norm into convolutions"] == 1 + (alpha > 0)
    x = torch.randn(shape)
    with torch.no_grad():
        assert relative(form(x), octave(x)) < 1e-5


def test_an_unknown_backend_names_those_there_are() -> None:
    with pytest.raises(BackendError, match="eager, compile, onnxruntime, openvino"):
        optimize(converted("resnet18"), "tensorrt")


@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a compiler")
def test_the_compiled_form_computes_the_same_with_frozen_weights() -> None:
    net = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 8, 1))
    octave = octify.convert(net, alpha=0.5, example_inputs=(1, 3, 32, 32)).eval()
    form, image = optimize(octave, "compile"), torch.rand(1, 3, 32, 32)
    with torch.inference_mode():
        assert relative(form(image), octave(image)) < 1e-5
        with torch.profiler.profile() as found:
            form(image)
    operators = {event.key for event in found.key_averages()}
    assert operators & {"octify::run", "mkldnn::_convolution_pointwise"}, "neither octify's kernels nor oneDNN's"


class Block(nn.Module):
    """A residual block of any number of axes, with a stride."""

    def __init__(self, axes: int, reads: int, gives: int, stride: int | tuple[int, ...]) -> None:
        super().__init__()
        conv, norm = (getattr(nn, f"{name}{axes}d") for name in ("Conv", "BatchNorm"))
        self.first, self.norm = conv(reads, gives, 3, stride, 1, bias=False), norm(gives)
        self.second, self.down = (
            conv(gives, gives, 3, padding=1, padding_mode="replicate"),
            conv(reads, gives, 1, stride),
        )

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.down(x) + self.second(F.relu(self.norm(self.first(x)))))


class Gated(nn.Module):
    """Squeeze and excitation along an axis, and what is shared by two calls."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.pool, self.fc = nn.AdaptiveAvgPool1d(1), nn.Conv1d(channels, channels, 1)
        self.conv = nn.Conv1d(channels, channels, 5, padding="same", groups=4)

    def forward(self, x: Tensor) -> Tensor:
        x = x * torch.sigmoid(self.fc(self.pool(x)))
        return torch.cat((self.conv(x), self.conv(F.leaky_relu(x, 0.1))), 1) * (1.0 / x.size(1))


def along_one_axis() -> nn.Module:
    """Convolutions, norms, poolings and what only knows lines."""
    return nn.Sequential(
        nn.Conv1d(4, 16, 7, 2, 3), nn.BatchNorm1d(16), nn.ReLU(), nn.MaxPool1d(3, 2, 1), Block(1, 16, 16, 1),
        nn.GroupNorm(4, 16), nn.SiLU(), nn.AvgPool1d(2), Block(1, 16, 32, 2), Gated(32), nn.PReLU(64),
        nn.Conv1d(64, 32, 3, padding=2, dilation=2, padding_mode="circular"), nn.InstanceNorm1d(32), nn.GELU(),
        nn.Conv1d(32, 16, 3), nn.AdaptiveMaxPool1d(3), nn.Flatten(), nn.Linear(48, 5),
    )  # fmt: skip


class Video(nn.Conv3d):
    """A user's own name for a convolution."""


AXES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], tuple[int, ...]]] = {
    "line": (along_one_axis, (4, 200), (4, 237)),
    "clip": (
        lambda: nn.Sequential(Video(3, 16, 3, (1, 2, 2), 1), nn.ReLU(), Block(3, 16, 16, 1), Block(3, 16, 32, 2)),
        (3, 6, 32, 32),
        (3, 7, 35, 29),
    ),
    "strides by axis": (
        lambda: nn.Sequential(
            nn.Conv2d(3, 16, 3, 1, 1), Block(2, 16, 16, (1, 2)), Block(2, 16, 32, (2, 1)), Block(2, 32, 32, (1, 3))
        ),
        (3, 48, 48),
        (3, 37, 61),
    ),
}


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("name", AXES)
def test_maps_of_one_axis_of_clips_and_strides_by_axis(name: str, alpha: float) -> None:
    torch.manual_seed(0)
    build, size, other = AXES[name]
    octave = octify.convert(ready(build()), alpha=alpha, example_inputs=(1, *size)).eval()
    form = optimize(octave)
    for shape in ((1, *size), (3, *size), (2, *other)):
        x = torch.randn(shape)
        with torch.no_grad():
            assert relative(form(x), octave(x)) < 1e-5, shape
    if name == "line":
        assert form.octify_passes["maps of one axis as rows"] > 20
        assert not [module for module in form.modules() if isinstance(module, nn.Conv1d)]


class Pyramid(nn.Module):
    """Two maps by name."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 32, 3))
        self.second = nn.Sequential(nn.ReLU(), nn.Conv2d(32, 32, 3, 2, 1), nn.ReLU(), nn.Conv2d(32, 32, 3))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        first = self.first(x)
        return {"fine": first, "coarse": self.second(first)}


class Head(nn.Module):
    """Reads all maps of a list."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.last = nn.Conv2d(32, 32, 3, padding=1), nn.Conv2d(32, 8, 1)

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        return [self.last(torch.relu(self.body(x))) for x in maps]


class Detector(nn.Module):
    """Decides by values, so that it is converted part by part; the third part only runs where there is something."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone, self.head = Pyramid(), Head()
        self.refine = nn.Sequential(nn.Conv2d(8, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.Conv2d(16, 8, 1))

    def forward(self, images: list[Tensor]) -> list[Tensor]:
        x = torch.stack([image * 2 - 1 for image in images])
        found = self.head(list(self.backbone(x).values()))
        return [*found, self.refine(found[0])] if float(x.max()) > 100 else found


def test_an_example_that_the_network_does_not_take_is_named() -> None:
    octave = octify.convert(ready(torchvision.models.resnet18()), alpha=0.5)
    with pytest.raises(ModelError, match="does not run on 1x5x64x64"):
        optimize(octave, example_inputs=(1, 5, 64, 64))


@pytest.mark.parametrize("backend", ["eager", "compile"])
def test_parts_get_a_form_each(backend: str) -> None:
    source = ready(Detector())
    octave = octify.convert(source, alpha=0.5, example_inputs=(1, 3, 96, 96)).eval()
    form = optimize(octave, backend)
    before = {name: value.clone() for name, value in octave.state_dict().items()}
    for size in ((96, 96), (75, 103)):
        images = [torch.randn(3, *size) for _ in range(2)]
        with torch.no_grad():
            for found, wanted in zip(form(images), octave(images), strict=True):
                assert relative(found, wanted) < 1e-5
    assert isinstance(form, Detector)
    assert not [module for module in form.backbone.modules() if isinstance(module, OctConv)]
    assert all(torch.equal(before[name], value) for name, value in octave.state_dict().items())
    dense = optimize(source, backend, (1, 3, 96, 96))
    with torch.no_grad():
        for found, wanted in zip(dense(images), source(images), strict=True):
            assert relative(found, wanted) < 1e-5
    with pytest.raises(ModelError, match="part by part"):
        optimize(octave, "onnxruntime")
