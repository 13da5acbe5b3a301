"""The networks of the main job: every check at small sizes, several alphas, and back from a checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import octify
from octify.conversion import Conversion
from octify.jobs import count_adapters, name_source
from octify.oracles import TOLERANCE, constant_error, tensors_in
from octify.recipe import Recipe
from octify.verify import all_checks, runs, shake, small_inputs
from octify.zoo import build_model

NO_ADAPTER = (
    "resnet18", "resnet50", "wide_resnet50_2", "resnext50_32x4d", "densenet121", "vgg16_bn", "timm:resnet26",
    "timm:seresnet50", "timm:resnetv2_50", "timm:mobilenetv1_100",
)  # fmt: skip
OTHERS = (
    "alexnet", "googlenet", "inception_v3", "squeezenet1_1", "mobilenet_v2", "mobilenet_v3_large", "mnasnet1_0",
    "efficientnet_b0", "regnet_y_400mf", "shufflenet_v2_x1_0", "convnext_tiny", "fcn_resnet50", "deeplabv3_resnet50",
    "timm:cspresnet50",
)  # fmt: skip
NETWORKS = (*NO_ADAPTER, *OTHERS)
ALPHAS = (0.125, 0.5, 0.75)
EXPECTED = {
    "no merge followed by a split", "no split whose only use is a merge", "every module call is used",
    "the trace equals the source", "alpha 0: same output", "alpha 0: same keys", "equal on constant images",
    "equal on 2x2 blocks, layer by layer", "runs at odd sizes",
}  # fmt: skip


@pytest.mark.parametrize("name", NETWORKS)
def test_every_check_passes(name: str) -> None:
    checks = all_checks(Conversion.read(build_model(name), Recipe.uniform(0.25)))
    assert not [check for check in checks if not check.passed]
    assert {check.name for check in checks} >= EXPECTED, "a check was left out"
    trained = any(check.name == "gradients reach every parameter" for check in checks)
    assert trained or name in ("inception_v3", "googlenet"), "auxiliary heads alone need larger images to train"


@pytest.mark.parametrize("name", NETWORKS)
def test_other_alphas_and_back_from_a_file(name: str, tmp_path: Path) -> None:
    source = shake(build_model(name)).eval()
    for alpha in (ALPHAS[NETWORKS.index(name) % 3], 1.0):
        reading = Conversion.read(source, Recipe.uniform(alpha))
        model = reading.run()
        inputs = small_inputs(source, reading.flows)
        assert inputs is not None
        error = constant_error(source, model, inputs)
        assert error < TOLERANCE or constant_error(*in_double(source, model), [x.double() for x in inputs]) < TOLERANCE
        if alpha < 1 and name in NO_ADAPTER:
            assert count_adapters(reading, model) == {"split": 0, "merge": 0}
    name_source(model, name)
    octify.save(model, tmp_path / "m.safetensors")
    again = octify.load(tmp_path / "m.safetensors")
    with torch.no_grad():
        pairs = zip(tensors_in(model(*inputs)), tensors_in(again(*inputs)), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)


def in_double(*models: nn.Module) -> list[nn.Module]:
    import copy

    return [copy.deepcopy(model).double() for model in models]


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2", "shufflenet_v2_x1_0"])
@pytest.mark.parametrize("kernels", ["paper", "fold"])
@pytest.mark.parametrize("recipe", ["resnet", "uniform"])
def test_built_in_recipes_and_both_kinds_of_kernels(name: str, kernels: str, recipe: str) -> None:
    if recipe == "resnet" and name != "resnet18":
        pytest.skip("the recipe names a ResNet's layers")
    chosen = octify.load_recipe(recipe, 0.5).with_defaults(kernels=kernels)
    checks = all_checks(Conversion.read(build_model(name), chosen))
    assert not [check for check in checks if not check.passed]


def test_half_precision_runs() -> None:
    model = octify.convert(build_model("resnet18").to(torch.bfloat16), alpha=0.5)
    assert {tensor.dtype for tensor in model.parameters()} == {torch.bfloat16}
    assert runs(model, [torch.randn(1, 3, 65, 97, dtype=torch.bfloat16)])
