"""Every row of the paper: converted by octify with a recipe and nothing else, at the paper's cost."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import nn
from torchvision.models.mobilenetv2 import Conv2dNormActivation, MobileNetV2

import octify
from octify.layers import OctConv
from octify.recipe import Recipe
from tests.paper_nets import IMAGE, INPUTS, build
from tests.paper_nets.measure import count_parameters, gmacs, measure, run
from tests.paper_nets.rows import FURTHER, Row, rows


def meets(found: float, text: str) -> bool:
    """Whether a number is the given one to the digits given."""
    digits = len(text.partition(".")[2])
    return abs(found - float(text)) <= 0.5 * 10**-digits + 1e-9


@pytest.mark.parametrize("row", rows(), ids=lambda row: row.name)
def test_row(row: Row) -> None:
    found = measure(row)
    assert found.parameters == found.dense_parameters
    assert not row.params_m or meets(found.parameters / 1e6, row.params_m)
    assert not row.expected or meets(found.gmacs, row.expected), f"{found.gmacs:.5f} is not {row.expected}"
    assert (found.ratio < 1) == (row.alpha > 0)
    assert found.memory == pytest.approx(found.planned_memory, rel=0.02)  # odd maps round up
    if row.paper and (row.net, row.alpha) not in FURTHER:
        assert found.gmacs == pytest.approx(float(row.paper), rel=0.015 if row.gmacs else 0.03)


@pytest.mark.parametrize(
    ("width", "round_nearest", "alpha", "cost"), [(1, 8, 0.375, "0.25403"), (1.125, 1, 0.5, "0.29276")]
)
def test_mobilenetv2_as_in_the_paper_expands_the_stem_too(
    width: float, round_nearest: int, alpha: float, cost: str
) -> None:
    with torch.device("meta"):
        model = MobileNetV2(width_mult=width, round_nearest=round_nearest).eval()
        first = model.features[1].conv
        channels = first[0][0].in_channels
        expansion = Conv2dNormActivation(channels, channels, kernel_size=1, activation_layer=nn.ReLU6).eval()
    model.features[1].conv = nn.Sequential(expansion, *first)
    tree = octify.load_recipe("paper/mobilenetv2_100", alpha=alpha).to_dict()
    tree["layers"] = [{"regex": r"features\.([1-9]|1[0-3])\.conv\.[01]", "alpha": alpha}]
    octave = octify.convert(model, recipe=Recipe.from_dict(tree), example_inputs=IMAGE)
    assert meets(gmacs(octave, IMAGE), cost)


@functools.cache
def oct_resnet50(size: int = 224, **defaults: object) -> nn.Module:
    """Oct-ResNet-50 at alpha 0.5 on the meta device, converted at an image size, with defaults for the recipe's."""
    with torch.device("meta"):
        model = build("resnet50")
    recipe = octify.load_recipe("paper/resnet50", alpha=0.5).with_defaults(**defaults)
    return octify.convert(model, recipe=recipe, example_inputs=(1, 3, size, size))


def octave_layers(model: nn.Module) -> dict[str, OctConv]:
    return {name: module for name, module in model.named_modules() if isinstance(module, OctConv)}


@pytest.mark.parametrize("left_out", [("hl",), ("lh",), ("hl", "lh")])
def test_paths_left_out_take_their_cost_and_their_weights_with_them(left_out: tuple[str, ...]) -> None:
    full, less = oct_resnet50(), oct_resnet50(paths=tuple(p for p in ("hh", "hl", "lh", "ll") if p not in left_out))
    layers = octave_layers(full)
    cost, sizes = run(full, list(layers), IMAGE)
    saved = parameters = 0
    for name, layer in octave_layers(less).items():
        for path in left_out:
            before, after = (getattr(found, f"weight_{path}") for found in (layers[name], layer))
            if before is None or after is not None:  # without it the band would have no path at all
                continue
            # Low maps are convolved on the low grid, which at stride 2 is the high output's.
            high = sizes[name][0].shape
            side = high[-1] if path == "lh" and max(layer.stride) > 1 else high[-1] // 2
            parameters += before.numel()
            saved += before.numel() * side**2
    assert parameters > 0
    assert count_parameters(full) - count_parameters(less) == parameters
    assert cost - gmacs(less, IMAGE) == pytest.approx(saved / 1e9, rel=1e-9)


@pytest.mark.parametrize(
    "net",
    ["resnet26", "resnext50_32x4d", "seresnet50", "densenet121", "mobilenetv1_075", "mobilenetv2_100", "glore", "c2d",
     "i3d_nl", "slowfast"],
)  # fmt: skip
def test_a_constant_image_comes_out_as_from_the_dense_net(net: str) -> None:
    """Without borders pooling and upsampling lose nothing, so a wrong channel or a wrong path shows."""
    torch.manual_seed(0)
    model = build(net).double()
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Conv3d)):
            module.padding_mode = "replicate"
    shape = (*INPUTS[net][:-2], 64, 64)
    octave = octify.convert(model, recipe=octify.load_recipe(f"paper/{net}"), example_inputs=shape)
    image = torch.randn(1, 3, *(1,) * (len(shape) - 2), dtype=torch.float64).expand(shape)
    with torch.no_grad():
        due = model(image)
        torch.testing.assert_close(octave(image), due, rtol=1e-9, atol=1e-9 * float(due.abs().max()))


def test_downsampling_by_a_stride_is_another_network_with_the_same_weights() -> None:
    torch.manual_seed(0)
    model, image = build("resnet26"), torch.randn(1, 3, 64, 64)
    recipe = octify.load_recipe("paper/resnet26", alpha=0.5)
    pooled, strided = (
        octify.convert(model, recipe=given, example_inputs=tuple(image.shape))
        for given in (recipe, recipe.with_defaults(downsample="stride"))
    )
    weights, others = (
        {key.replace("weight_hh", "weight"): value for key, value in net.state_dict().items()}
        for net in (pooled, strided)
    )
    assert weights.keys() == others.keys()
    assert all(torch.equal(weights[key], value) for key, value in others.items())
    assert set(octave_layers(pooled)) - set(octave_layers(strided)) == {"layer4.0.conv2"}  # dense, yet pooled before
    with torch.no_grad():
        first, second = pooled(image), strided(image)
    assert first.shape == second.shape and not torch.allclose(first, second)


@pytest.mark.parametrize("size", [320, 416, 500, 600, 740])
def test_a_net_converted_at_256_runs_at_the_sizes_of_table_4(size: int) -> None:
    shape = (1, 3, size, size)
    assert gmacs(oct_resnet50(size=256), shape) == gmacs(oct_resnet50(size=size), shape)


def test_a_net_converted_at_256_computes_at_330_what_one_converted_at_330_does() -> None:
    torch.manual_seed(0)
    model, image = build("resnet26"), torch.randn(1, 3, 330, 330)
    recipe = octify.load_recipe("paper/resnet26", alpha=0.5)
    at_256, at_330 = (octify.convert(model, recipe=recipe, example_inputs=(1, 3, size, size)) for size in (256, 330))
    with torch.no_grad():
        assert torch.equal(at_256(image), at_330(image))
