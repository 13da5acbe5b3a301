"""About forty small networks of the census, through the same function that fills its rows."""

from __future__ import annotations

import subprocess
import sys
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn

from octify.graph import meta_copy
from octify.zoo import build_model
from tests.zoo.census import _Worker  # pyright: ignore[reportPrivateUsage]
from tests.zoo.compare import with_gradient
from tests.zoo.measure import _batch_norm, measure  # pyright: ignore[reportPrivateUsage]
from tests.zoo.summary import CLOSE, depends_on_position, number

SMALL = {  # the least share of eligible multiply-adds that is octave
    "torchvision:alexnet": 0.9,
    "torchvision:fasterrcnn_mobilenet_v3_large_fpn": 0.9,
    "torchvision:googlenet": 0.9,
    "torchvision:mnasnet0_5": 0.9,
    "torchvision:mobilenet_v2": 0.9,
    "torchvision:mobilenet_v3_small": 0.9,
    "torchvision:regnet_x_400mf": 0.9,
    "torchvision:resnet18": 0.9,
    "torchvision:shufflenet_v2_x0_5": 0.9,
    "torchvision:squeezenet1_1": 0.9,
    "timm:convnext_zepto_rms": 0.9,
    "timm:convnextv2_atto": 0.9,
    "timm:cs3darknet_focus_s": 0.9,
    "timm:dla46x_c": 0.9,
    "timm:ecaresnext26t_32x4d": 0.9,
    "timm:efficientformerv2_s0": 0.0,
    "timm:efficientvim_m1": 0.9,
    "timm:efficientvit_b0": 0.0,
    "timm:ghostnet_050": 0.9,
    "timm:hgnetv2_b0": 0.9,
    "timm:lcnet_035": 0.9,
    "timm:legacy_seresnet18": 0.9,
    "timm:mobilenetv1_100": 0.9,
    "timm:mobilenetv4_conv_small_035": 0.9,
    "timm:nf_regnet_b0": 0.9,
    "timm:regnetz_005": 0.9,
    "timm:repvgg_a0": 0.9,
    "timm:resnest14d": 0.9,
    "timm:resnet10t": 0.9,
    "timm:resnetblur18": 0.9,
    "timm:rexnet_100": 0.9,
    "timm:semnasnet_050": 0.9,
    "timm:skresnet18": 0.9,
    "timm:starnet_s050": 0.9,
    "timm:test_byobnet": 0.9,
    "timm:test_coatnet": 0.0,
    "timm:test_efficientnet_gn": 0.9,
    "timm:test_mambaout": 0.0,
    "timm:test_nfnet": 0.9,
    "timm:tf_mobilenetv3_small_minimal_100": 0.9,
    "timm:tinynet_e": 0.9,
}


@pytest.mark.parametrize("name", SMALL)
def test_every_column_of_the_census(name: str) -> None:
    row = measure(name)
    assert (row.converted, row.runs_default) == ("yes", "yes"), row.reason
    assert row.runs_other in ("yes", "-"), row.reason
    assert row.oracle1 == "exact", row.reason
    error = number(row.oracle2)
    assert error is not None and (error < CLOSE or depends_on_position(row)), row.reason
    assert (row.train_step, row.save_load) == ("yes", "equal"), row.reason
    assert float(row.octave_share) >= SMALL[name], row.reason
    assert float(row.mac_ratio) < 1


STUCK = """
import sys, time
for name in sys.stdin:
    print('{"library": "timm", "name": "resnet18", "converted": "yes"}', flush=True)
    time.sleep(60)
"""


def test_a_row_is_kept_without_its_oracles_when_time_runs_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def start(worker: _Worker) -> None:
        command = [sys.executable, "-c", STUCK]
        worker.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    monkeypatch.setattr(_Worker, "_start", start)
    row = _Worker(seconds=3, gib=1).measure("timm:resnet18")
    assert row.converted == "yes" and row.reason == "oracles: not run, more than 3 s"


class Detached(nn.Module):
    """A network that trains its last layers alone."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.norm(self.first(x).detach()))


@pytest.mark.parametrize("name", ["resnet18", "timm:test_nfnet", "detached"])
def test_meta_tensors_tell_what_a_train_step_reaches(name: str) -> None:
    net = Detached() if name == "detached" else build_model(name)
    image = torch.rand(2, 3, 64, 64)
    real = with_gradient(net.train(), lambda model: model(image))
    with patch.object(torch, "batch_norm", _batch_norm):
        assert with_gradient(meta_copy(net).train(), lambda model: model(image.to("meta"))) == real
    everything = {name for name, _ in net.named_parameters()}
    assert everything - real == ({"first.weight", "first.bias"} if name == "detached" else set())
