"""Norms on bands against their definition in double precision, and in networks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import timm.layers as tl
import torch
from timm.layers.grn import GlobalResponseNorm
from timm.layers.norm import LayerNormExp2d
from timm.models.metaformer import GroupNorm1NoBias, LayerNorm2dNoBias
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.convnext import LayerNorm2d as TorchvisionLayerNorm2d

from octify import convert
from octify.layout import Layout
from octify.norms import OctChannelNorm, OctGroupNorm, moments
from octify.recipe import Recipe
from tests.oracles import by_definition, constant_image_error, forms, random_bands, random_layout, scramble, trains

C = 12
NORMS: dict[str, Callable[[], nn.Module]] = {
    "group": lambda: nn.GroupNorm(3, C),
    "group/timm": lambda: tl.GroupNorm(C, 4),
    "group1": lambda: tl.GroupNorm1(C),
    "group1/no bias": lambda: GroupNorm1NoBias(C),
    "group/act": lambda: tl.GroupNormAct(C, 2, act_layer=nn.SiLU),
    "group1/act": lambda: tl.GroupNorm1Act(C),
    "instance": lambda: nn.InstanceNorm2d(C, affine=True),
    "evo s0": lambda: tl.EvoNorm2dS0(C, groups=3),
    "evo s0 without": lambda: tl.EvoNorm2dS0(C, groups=3, apply_act=False),
    "evo s0a": lambda: tl.EvoNorm2dS0a(C, groups=3),
    "evo s0a without": lambda: tl.EvoNorm2dS0a(C, groups=3, apply_act=False),
    "evo s1": lambda: tl.EvoNorm2dS1(C, groups=3),
    "evo s1a": lambda: tl.EvoNorm2dS1a(C, groups=3),
    "evo s2": lambda: tl.EvoNorm2dS2(C, groups=3),
    "evo s2a": lambda: tl.EvoNorm2dS2a(C, groups=3),
    "filter response": lambda: tl.FilterResponseNormTlu2d(C),
    "filter response/act": lambda: tl.FilterResponseNormAct2d(C),
    "global response": lambda: GlobalResponseNorm(C, channels_last=False),
    "prelu": lambda: nn.PReLU(C),
    "prelu/one": lambda: nn.PReLU(),
    "scale": lambda: tl.LayerScale2d(C),
    "layer": lambda: tl.LayerNorm2d(C),
    "layer/torchvision": lambda: TorchvisionLayerNorm2d(C),
    "layer/fp32": lambda: LayerNormExp2d(C),
    "layer/no bias": lambda: LayerNorm2dNoBias(C),
    "layer/act none": lambda: tl.LayerNormAct2d(C, apply_act=False),
    "rms": lambda: tl.RmsNorm2d(C),
    "rms/act none": lambda: tl.RmsNormAct2d(C, apply_act=False),
    "simple": lambda: tl.SimpleNorm2d(C),
}
LAST: dict[str, Callable[[], nn.Module]] = {
    "scale": lambda: tl.LayerScale(C),
    "layer": lambda: nn.LayerNorm(C),
    "layer/timm": lambda: tl.LayerNorm(C),
    "layer/plain": lambda: nn.LayerNorm(C, elementwise_affine=False),
    "rms": lambda: nn.RMSNorm(C, eps=1e-5),
    "rms/no eps": lambda: nn.RMSNorm(C),
    "rms/timm": lambda: tl.RmsNorm(C),
    "simple": lambda: tl.SimpleNorm(C),
    "global response": lambda: GlobalResponseNorm(C),
}


class Call(nn.Module):
    """A function as a module, with a learned factor where it takes one."""

    def __init__(self, function: Callable[..., Tensor], *, last: bool = False) -> None:
        super().__init__()
        self.function, self.last = function, last
        self.weight = nn.Parameter(torch.rand(C))

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, self.weight)


FUNCTIONS: dict[str, Callable[..., Tensor]] = {
    "group": lambda x, w: F.group_norm(x, 3, w, eps=1e-4),
    "normalize": lambda x, w: F.normalize(x, dim=1) * w.view(-1, 1, 1),
}
LAST_FUNCTIONS: dict[str, Callable[..., Tensor]] = {
    "layer": lambda x, w: F.layer_norm(x, (C,), w, None, 1e-4),
    "layer/kw": lambda x, w: F.layer_norm(x, normalized_shape=(C,), bias=w),
    "rms": lambda x, w: F.rms_norm(x, (C,), w, 1e-4),
    "normalize": lambda x, w: F.normalize(x, dim=-1) * w,
}


class Last(nn.Module):
    """A channels-last operation on a channels-first map."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


CASES: dict[str, Callable[[], nn.Module]] = {
    **NORMS,
    **{f"last {name}": lambda make=make: Last(make()) for name, make in LAST.items()},
    **{f"function {name}": lambda f=f: Call(f) for name, f in FUNCTIONS.items()},
    **{f"last function {name}": lambda f=f: Last(Call(f)) for name, f in LAST_FUNCTIONS.items()},
}


def exact_to(name: str) -> float:
    """timm computes the variances of EvoNorm and the filter response in single precision."""
    return 1e-5 if name.startswith(("evo", "filter")) else 1e-9


LAYOUTS = [Layout.last(C, 3), random_layout(C, 5, 1), random_layout(C, 11, 2), Layout.last(C, C)]


class Sandwich(nn.Module):
    """A norm between two pointwise convolutions: whatever layout a recipe names reaches the norm as it is."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.before, self.norm, self.after = nn.Conv2d(C, C, 1), norm, nn.Conv2d(C, C, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.norm(self.before(x)))


def norm_of(source: nn.Module, layout: Layout, size: tuple[int, int]) -> Callable[[Tensor, Tensor], Any]:
    """What the converter puts in a norm's place, as a function of both bands."""
    net = Sandwich(source).double()
    recipe = Recipe.from_dict(
        {
            "version": 1,
            "defaults": {"alpha": 0.5, "stem": "octave", "min_size": 1},
            "layers": [{"match": "before", "layout": str(layout)}],
        }
    )
    converted = convert(net, recipe=recipe, example_inputs=torch.empty(1, C, *size, dtype=torch.float64))
    nodes = list(converted.graph.nodes)
    start = next(i for i, node in enumerate(nodes) if node.op == "call_module" and node.target == "before")
    stop = next(i for i, node in enumerate(nodes) if node.op == "call_module" and node.target == "after")

    def run(high: Tensor, low: Tensor) -> tuple[Tensor, Tensor]:
        values: dict[Any, Any] = {nodes[start]: (high, low)}
        for node in nodes[start + 1 : stop]:
            args, kwargs = (torch.fx.node.map_arg(part, lambda n: values[n]) for part in (node.args, node.kwargs))
            if node.op == "call_module":
                values[node] = converted.get_submodule(node.target)(*args, **kwargs)
            elif node.op == "get_attr":
                values[node] = converted.get_parameter(node.target)
            elif node.op == "call_method":
                values[node] = getattr(args[0], node.target)(*args[1:], **kwargs)
            else:
                values[node] = node.target(*args, **kwargs)
        return tuple(values[node] for node in nodes[stop].args)

    return run


@pytest.mark.parametrize("size", [(8, 6), (7, 9), (1, 5)])
@pytest.mark.parametrize("name", CASES)
def test_a_norm_of_bands_is_the_norm_of_the_map_they_stand_for(name: str, size: tuple[int, int]) -> None:
    for seed, layout in enumerate(LAYOUTS):
        torch.manual_seed(seed)
        source = scramble(CASES[name]())
        high, low = random_bands(layout, size)
        wanted = by_definition(source, high, low, layout)
        given = norm_of(source, layout, size)(high, low)
        for band, expected in zip(given, wanted, strict=True):
            torch.testing.assert_close(band, expected, rtol=exact_to(name), atol=exact_to(name))


@pytest.mark.parametrize("spatial, size", [(1, (9,)), (2, (3, 7, 6))])
def test_norms_of_sequences_and_of_clips(spatial: int, size: tuple[int, ...]) -> None:
    layout = random_layout(C, 5)
    high, low = random_bands(layout, size, spatial=spatial)
    group = scramble(nn.GroupNorm(3, C))
    wanted = by_definition(group, high, low, layout, spatial=spatial)
    given = OctGroupNorm(layout, spatial, 3, group.eps).take(group)(high, low)  # pyright: ignore
    torch.testing.assert_close(given, wanted, rtol=1e-9, atol=1e-9)
    wanted = by_definition(
        lambda x: F.layer_norm(x.movedim(1, -1), (C,)).movedim(-1, 1), high, low, layout, spatial=spatial
    )
    given = OctChannelNorm(layout, spatial, 1, "layer", 1e-5)(high, low)
    torch.testing.assert_close(given, wanted, rtol=1e-9, atol=1e-9)


def test_a_large_common_offset_costs_no_digits() -> None:
    layout = random_layout(C, 5)
    high, low = (band.float() + 1000 for band in random_bands(layout, (8, 8)))
    wanted = by_definition(tl.LayerNorm2d(C), high, low, layout)
    given = OctChannelNorm(layout, 2, 1, "layer", 1e-6)(high, low)
    torch.testing.assert_close(given, wanted, rtol=1e-3, atol=1e-3)


class Net(nn.Module):
    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.expand, self.norm, self.conv = nn.Conv2d(16, C, 1), norm, nn.Conv2d(C, 16, 3, padding=1)
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.conv(self.norm(self.expand(x)))
        return self.head(x.mean((2, 3)))


@pytest.mark.parametrize("alpha", [0.25, 0.6])
@pytest.mark.parametrize("name", [name for name in CASES if name not in ("instance", "group/act", "group1/act")])
def test_a_network_with_the_norm_keeps_a_constant_image(name: str, alpha: float) -> None:
    torch.manual_seed(0)
    assert constant_image_error(Net(CASES[name]()), alpha=alpha) < exact_to(name)


@pytest.mark.parametrize("name", CASES)
def test_a_network_with_the_norm_is_converted_through_it_and_trains(name: str) -> None:
    torch.manual_seed(0)
    converted = trains(Net(CASES[name]()), alpha=0.5)
    made = forms(converted)
    assert made["expand"] == made["conv"] == "octave"
    assert not [target for target in made if target.startswith("octify_")]
    assert "dense" not in {form for target, form in made.items() if target.startswith(("norm", "permute"))}


def test_state_dict_keys_of_a_norm_stay() -> None:
    converted = convert(Net(nn.GroupNorm(3, C)), alpha=0.5, example_inputs=(1, 3, 32, 32))
    keys = {key for key in converted.state_dict() if key.startswith("norm.")}
    assert keys == {"norm.weight", "norm.bias"}


def test_an_activation_behind_a_layer_norm_is_noted_as_approximate() -> None:
    converted = convert(Net(tl.LayerNormAct2d(C)), alpha=0.5, example_inputs=(1, 3, 32, 32))
    notes = converted.octify_plan.get("norm").notes  # pyright: ignore
    assert any("approximate on the low band" in note for note in notes)


@pytest.mark.parametrize("kind", [tl.EvoNorm2dB0, tl.EvoNorm2dB1, tl.EvoNorm2dB2])
def test_norms_with_running_variances_keep_a_constant_image(kind: Any) -> None:
    torch.manual_seed(0)
    assert constant_image_error(scramble(Net(kind(C))), alpha=0.5) < 1e-5
    trains(Net(kind(C)), alpha=0.5)


def test_gradients_through_the_statistics() -> None:
    x = torch.randn(2, 3, 4, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(moments, (x,), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(moments, (x,))
    for found, wanted in zip(moments(x), reversed(torch.var_mean(x, (2, 3), correction=0)), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
