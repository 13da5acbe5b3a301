"""On a GPU a converted network makes nothing of its own on the CPU: fake tensors tell, where there is no GPU."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

import octify
from octify.graph import sharing_copy
from octify.optimize.build import flatten
from octify.oracles import tensors_in
from octify.zoo import build_model, input_shape

NAMES = (
    "resnet18", "mobilenet_v3_small", "shufflenet_v2_x0_5", "squeezenet1_1", "googlenet", "timm:convnext_atto",
    "timm:resnetblur18", "timm:skresnet18", "timm:test_nfnet", "timm:test_mambaout", "timm:tf_mixnet_s",
    "timm:hrnet_w18_small", "timm:resnet50_gn", "timm:ghostnet_100", "timm:cs3darknet_focus_s", "timm:resnest14d",
)  # fmt: skip


def moved(model: nn.Module) -> nn.Module:
    """As `model.cuda()`: parameters and buffers, and nothing else; the mode must be on."""
    copied = sharing_copy(model)
    for module in copied.modules():
        held = cast(Any, module)
        for name, tensor in held._parameters.items():
            if tensor is not None:
                held._parameters[name] = nn.Parameter(torch.empty_like(tensor, device="cuda"))
        for name, tensor in held._buffers.items():
            if tensor is not None:
                held._buffers[name] = torch.empty_like(tensor, device="cuda")
    return copied


def runs(model: nn.Module, shape: tuple[int, ...]) -> None:
    with FakeTensorMode(allow_non_fake_inputs=True):
        outputs: list[Tensor] = tensors_in(moved(model)(torch.empty(2, *shape, device="cuda")))
        assert {output.device.type for output in outputs} == {"cuda"}


@pytest.mark.parametrize("name", NAMES)
def test_the_converted_network_and_its_inference_form_stay_there(name: str) -> None:
    source = build_model(name)
    (shape,) = input_shape(source)
    octave = octify.convert(source, alpha=0.5)
    runs(octave.train(), shape)
    runs(octave.eval(), shape)
    with torch.no_grad():
        runs(flatten(octave, (torch.empty(1, *shape, device="meta"),)), shape)


def test_what_stays_behind_is_found() -> None:
    class Forgets(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + torch.zeros(x.shape)

    with pytest.raises(Exception, match="cpu"):
        runs(Forgets(), (3, 8, 8))
