"""Networks by name: found, built the same everywhere, never downloaded unasked, and refused in words."""

from __future__ import annotations

import copy
import pickle
import socket
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
from safetensors.torch import save_file
from torch import nn

from octify.errors import ModelError
from octify.zoo import build_model, input_shape, list_models, preprocessing, resolve

FACTORIES = """
from neighbour import width
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, width, 3)
        self.norm = nn.BatchNorm2d(width)
    def forward(self, x):
        return self.norm(self.conv(x))

def build():
    return Net()

def number():
    return 3

def broken():
    raise KeyError("what")

constant = 3
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with a user's file of networks, worked in."""
    (tmp_path / "my nets.py").write_text(FACTORIES)
    (tmp_path / "neighbour.py").write_text("width = 4\n")
    package = tmp_path / "some_package"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "nets.py").write_text(FACTORIES)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise OSError("no network in this test")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def state_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return model.state_dict()


def same_state(first: nn.Module, second: nn.Module) -> bool:
    one, other = state_of(first), state_of(second)
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(
    ("name", "full"),
    [
        ("resnet18", "torchvision:resnet18"),
        ("timm:resnet18", "timm:resnet18"),
        ("resnet26", "timm:resnet26"),
        ("resnet26.bt_in1k", "timm:resnet26.bt_in1k"),
        ("torchvision:raft_small", "torchvision:raft_small"),
        ("a/b c.py:make", "a/b c.py:make"),
        ("a.b:make", "a.b:make"),
    ],
)
def test_names_are_read(name: str, full: str) -> None:
    assert str(resolve(name)) == full


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("resnet5O", r'"resnet5O" is no network of torchvision or timm.\n  closest   .*resnet50'),
        ("timm:resnet_50", r'"resnet_50" is no network of timm.\n  closest   resnet50'),
        ("torchvision:resnet26", r"is no network of torchvision"),
        ("xyzzyxyzzy", r"octify models lists them"),
        ("", r"is no network"),
        (":", r"expected file.py:factory or package.module:factory"),
        ("a.py:", r"expected file.py:factory"),
        ("nets.py", r"expected nets.py:factory"),
        ("a/weights.pt", r"expected file.py:factory"),
    ],
)
def test_unknown_names_are_refused_with_the_closest(name: str, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        resolve(name)


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize(
    "name",
    [
        "squeezenet1_1",
        "quantized_mobilenet_v2",
        "ssdlite320_mobilenet_v3_large",
        "lraspp_mobilenet_v3_large",
        "raft_small",
    ],
)
def test_torchvision_networks_of_every_kind_are_built_without_a_download(name: str) -> None:
    model = build_model(f"torchvision:{name}")
    assert not any(parameter.is_meta for parameter in model.parameters())
    assert sum(p.numel() for p in model.parameters()) == sum(
        p.numel() for p in build_model(name, device="meta").parameters()
    )


def test_quantized_names_give_networks_in_floating_point() -> None:
    model = build_model("quantized_resnet18", device="meta")
    own = torchvision.models.resnet18(weights=None)
    assert {name: v.shape for name, v in state_of(model).items()} == {n: v.shape for n, v in state_of(own).items()}


@pytest.mark.parametrize("name", ["torchvision:resnet18", "timm:resnet18"])
def test_a_seed_gives_the_library_s_own_weights_and_leaves_the_random_state(name: str) -> None:
    torch.manual_seed(5)
    own = torchvision.models.resnet18() if name.startswith("torchvision") else timm.create_model("resnet18")
    before = torch.get_rng_state()
    assert same_state(build_model(name, seed=5), own)
    assert torch.equal(torch.get_rng_state(), before)
    assert not same_state(build_model(name, seed=6), own)


@pytest.mark.parametrize(
    "name", ["regnet_y_400mf", "efficientnet_b0", "timm:convnext_atto", "timm:mobilevit_xs", "timm:levit_conv_128s"]
)
def test_the_meta_device_has_every_weight(name: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = build_model(name, device="meta")
    assert all(tensor.is_meta for tensor in [*model.parameters(), *model.buffers()])
    assert {n: (v.shape, v.dtype) for n, v in state_of(model).items()} == {
        n: (v.shape, v.dtype) for n, v in state_of(build_model(name)).items()
    }


@pytest.mark.parametrize(
    ("name", "shapes"),
    [
        ("resnet50", ((3, 224, 224),)),
        ("inception_v3", ((3, 299, 299),)),
        ("quantized_inception_v3", ((3, 299, 299),)),
        ("efficientnet_b4", ((3, 380, 380),)),
        ("mnasnet0_75", ((3, 224, 224),)),
        ("vit_h_14", ((3, 224, 224),)),
        ("fcn_resnet50", ((3, 520, 520),)),
        ("r3d_18", ((3, 16, 112, 112),)),
        ("s3d", ((3, 16, 224, 224),)),
        ("ssd300_vgg16", ((3, 300, 300),)),
        ("fasterrcnn_mobilenet_v3_large_320_fpn", ((3, 320, 320),)),
        ("raft_small", ((3, 128, 128), (3, 128, 128))),
        ("timm:dm_nfnet_f0", ((3, 192, 192),)),
        ("timm:test_resnet", ((3, 160, 160),)),
    ],
)
def test_default_input_by_name_and_by_network(name: str, shapes: tuple[tuple[int, ...], ...]) -> None:
    assert input_shape(name) == shapes
    model = build_model(name, device="meta")
    assert input_shape(model) == shapes
    assert preprocessing(model) == preprocessing(name)


def test_how_images_are_prepared() -> None:
    found = preprocessing("resnet50")
    assert found is not None
    assert (found.mean, found.size, found.interpolation) == ((0.485, 0.456, 0.406), (224, 224), "bilinear")
    found = preprocessing("timm:inception_v3")
    assert found is not None
    assert (found.mean, found.size, found.resize) == ((0.5, 0.5, 0.5), (299, 299), 341)
    assert found.interpolation == "bicubic"
    assert preprocessing(nn.Conv2d(3, 3, 1)) is None
    assert input_shape(nn.Conv2d(3, 3, 1)) == ((3, 224, 224),)


@pytest.mark.parametrize(
    "spec", ["my nets.py:build", "my nets.py:Net", "some_package.nets:build", "{}/my nets.py:build"]
)
def test_factories_of_files_and_modules(folder: Path, spec: str) -> None:
    model = build_model(spec.format(folder))
    assert model(torch.zeros(1, 3, 8, 8)).shape == (1, 4, 6, 6)
    assert same_state(copy.deepcopy(model), model)
    assert same_state(pickle.loads(pickle.dumps(model)), model)


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("my nets.py:number", r"my nets.py:number gave int: expected an nn.Module"),
        ("my nets.py:broken", r"my nets.py:broken failed: KeyError: 'what'"),
        ("my nets.py:absent", r"has nothing to call named absent"),
        ("my nets.py:constant", r"has nothing to call named constant"),
        ("absent.py:build", r"there is no file absent.py"),
        ("no_such_package.nets:build", r"cannot be imported: ModuleNotFoundError"),
    ],
)
def test_factories_that_give_no_network(spec: str, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        build_model(spec)


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize("name", ["torchvision:squeezenet1_1", "timm:test_resnet"])
def test_pretrained_weights_without_a_network(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # else it tries for most of a minute
    with pytest.raises(ModelError, match=r"(?s)its pretrained weights cannot be had.*pass a file of weights"):
        build_model(name, pretrained=True)


def test_a_factory_has_no_pretrained_weights(folder: Path) -> None:
    with pytest.raises(ModelError, match="no pretrained weights of its own"):
        build_model(f"{folder}/my nets.py:build", pretrained=True)


def as_safetensors(state: dict[str, torch.Tensor], path: Path) -> Path:
    save_file(state, path / "weights.safetensors")
    return path / "weights.safetensors"


def as_pt(state: Any, path: Path) -> Path:
    torch.save(state, path / "weights.pt")
    return path / "weights.pt"


def as_trained(state: dict[str, torch.Tensor], path: Path) -> Path:
    return as_pt({"epoch": 3, "state_dict": {f"module.{name}": value for name, value in state.items()}}, path)


@pytest.mark.parametrize("write", [as_safetensors, as_pt, as_trained])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_weights_from_a_file(folder: Path, device: str, write: Callable[..., Path]) -> None:
    source = build_model("my nets.py:build", seed=1)
    source(torch.randn(2, 3, 8, 8))
    path = write(state_of(source), folder)
    assert same_state(build_model("my nets.py:build", weights=path, device=device), source)


def test_weights_that_do_not_fit(folder: Path) -> None:
    source = build_model("my nets.py:build")
    state = state_of(source)
    with pytest.raises(ModelError, match=r"lacks norm\.weight"):
        build_model("my nets.py:build", weights=as_pt({k: v for k, v in state.items() if k != "norm.weight"}, folder))
    with pytest.raises(ModelError, match=r"has extra, which the network lacks"):
        build_model("my nets.py:build", weights=as_pt({**state, "extra": torch.ones(1)}, folder))
    with pytest.raises(ModelError, match=r"has conv\.bias of shape \(9,\), expected \(4,\)"):
        build_model("my nets.py:build", weights=as_pt({**state, "conv.bias": torch.ones(9)}, folder))
    with pytest.raises(ModelError, match="and 4 more"):
        build_model(
            "my nets.py:build", weights=as_pt({"x": torch.ones(1), **{k: state[k] for k in ["norm.weight"]}}, folder)
        )


class Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return (Path("exploded").touch, ())


def test_weights_that_are_none(folder: Path) -> None:
    for content in (Bomb(), nn.Conv2d(1, 1, 1), {"a": 3}, [torch.ones(1)], {}):
        with pytest.raises(ModelError, match=r"weights\.pt: (cannot be read as|holds no) (a )?state dict"):
            build_model("my nets.py:build", weights=as_pt(content, folder))
    assert not (folder / "exploded").exists()
    for name in ("empty.safetensors", "empty.pt"):
        (folder / name).write_bytes(b"")
        with pytest.raises(ModelError, match="cannot be read as a state dict"):
            build_model("my nets.py:build", weights=folder / name)
    with pytest.raises(ModelError, match="no such file of weights"):
        build_model("my nets.py:build", weights="absent.pt")


def test_listing() -> None:
    every = list_models()
    assert len(every) == len(set(every)) == len(torchvision.models.list_models()) + len(timm.list_models())
    assert list_models("torchvision:resnet?8") == ["torchvision:resnet18"]
    assert "timm:seresnext26d_32x4d" in list_models("resnext26")
    assert list_models("no such network") == []
