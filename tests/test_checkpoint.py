"""Checkpoints come back bit for bit, and every file that is none, or a damaged one, is named as such."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import octify
from octify.checkpoint import _digest
from octify.errors import CheckpointError, ModelError
from octify.zoo import build_model

SHAPE = (1, 3, 64, 64)


class Tied(nn.Module):
    """Two heads over one weight, a persistent and a hidden buffer, a plain tensor, and a convolution to convert."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.body = nn.Conv2d(16, 16, 3, padding=1)
        self.first = nn.Linear(16, 16)
        self.second = nn.Linear(16, 16, bias=False)
        self.second.weight = self.first.weight
        self.register_buffer("shift", torch.randn(16))
        self.register_buffer("hidden", torch.randn(16), persistent=False)
        self.plain = torch.randn(16)

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(torch.relu(self.stem(x))).mean((2, 3))
        return self.second(self.first(x) + self.shift * self.hidden) + self.plain


def converted(model: nn.Module, alpha: float = 0.25) -> nn.Module:
    return octify.convert(model, alpha=alpha, example_inputs=SHAPE).eval()


def outputs(model: nn.Module, image: Tensor) -> Tensor:
    with torch.no_grad():
        return model(image)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of a custom network."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("checkpoint") / "tied.safetensors"
    octify.save(converted(Tied()), path)
    return path


@pytest.mark.parametrize("name", ["torchvision:resnet18", "timm:resnet10t", "torchvision:googlenet"])
def test_library_networks_come_back_by_name(name: str, tmp_path: Path) -> None:
    model = converted(build_model(name))
    octify.save(model, tmp_path / "m.safetensors")
    again = octify.load(tmp_path / "m.safetensors")
    image = torch.randn(SHAPE)
    assert not again.training
    assert torch.equal(outputs(model, image), outputs(again, image))
    assert list(model.state_dict()) == list(again.state_dict())
    assert octify.plan_of(again) == octify.plan_of(model)


def test_a_changed_head_is_no_network_of_the_library(tmp_path: Path) -> None:
    for model in (torchvision.models.resnet18(num_classes=7), timm.create_model("resnet10t", num_classes=7)):
        path = tmp_path / f"{type(model).__module__}.safetensors"
        octify.save(converted(model), path)
        with pytest.raises(CheckpointError, match="model="):
            octify.load(path)
        assert octify.load(path, model=model) is not model


def test_a_custom_network_brings_ties_buffers_and_constants_back(saved: Path) -> None:
    torch.manual_seed(1)
    source = Tied()
    before = {name: tensor.clone() for name, tensor in source.state_dict().items()}
    again = octify.load(saved, model=source)
    torch.manual_seed(0)
    model = converted(Tied())
    image = torch.randn(SHAPE)
    assert torch.equal(outputs(model, image), outputs(again, image))
    assert again.first.weight is again.second.weight
    assert all(torch.equal(before[name], tensor) for name, tensor in source.state_dict().items()), "the source changed"
    with pytest.raises(CheckpointError, match=r"Tied.*model="):
        octify.load(saved)


def test_the_file_holds_the_state_dict_under_its_own_names(saved: Path) -> None:
    torch.manual_seed(0)
    state, stored = converted(Tied()).state_dict(), load_file(saved)
    assert {name for name in stored if not name.startswith("octify.")} == set(state) - {"second.weight"}
    assert all(torch.equal(stored[name], state[name]) for name in stored if name in state)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_types_are_kept(dtype: torch.dtype, tmp_path: Path) -> None:
    model = converted(Tied().to(dtype))
    octify.save(model, tmp_path / "m.safetensors")
    source = Tied()
    again = octify.load(tmp_path / "m.safetensors", model=source)
    image = torch.randn(SHAPE, dtype=dtype)
    assert torch.equal(outputs(model, image), outputs(again, image))
    assert source.stem.weight.dtype == torch.float32


def test_memory_format_and_mode_are_kept(tmp_path: Path) -> None:
    model = converted(build_model("timm:resnet10t").to(memory_format=torch.channels_last)).train()
    octify.save(model, tmp_path / "m.safetensors")
    again = octify.load(tmp_path / "m.safetensors")
    assert again.training
    strides = {name: tensor.stride() for name, tensor in model.state_dict().items()}
    assert strides == {name: tensor.stride() for name, tensor in again.state_dict().items()}
    image = torch.randn(SHAPE).to(memory_format=torch.channels_last)
    assert torch.equal(outputs(model.eval(), image), outputs(again.eval(), image))


def test_the_same_model_gives_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        octify.save(converted(build_model("timm:resnet10t")), tmp_path / f"{name}.safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


def test_a_loaded_model_saves_to_the_same_bytes(saved: Path, tmp_path: Path) -> None:
    octify.save(octify.load(saved, model=Tied()), tmp_path / "m.safetensors")
    assert (tmp_path / "m.safetensors").read_bytes() == saved.read_bytes()


def test_an_existing_file_is_overwritten_only_if_asked(saved: Path) -> None:
    before, model = saved.read_bytes(), octify.load(saved, model=Tied())
    with pytest.raises(CheckpointError, match="--overwrite"):
        octify.save(model, saved)
    assert saved.read_bytes() == before
    octify.save(model, saved, overwrite=True)
    assert saved.read_bytes() == before
    assert list(saved.parent.iterdir()) == [saved], "something was left beside it"


def test_a_write_that_fails_leaves_what_was_there(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "m.safetensors"
    path.write_bytes(b"before")

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(CheckpointError, match=r"cannot be written.*No space"):
        octify.save(octify.load(saved, model=Tied()), path, overwrite=True)
    assert path.read_bytes() == b"before"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("where", ["missing/m.safetensors", "."])
def test_places_where_no_file_can_be_are_refused(where: str, saved: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="directory"):
        octify.save(octify.load(saved, model=Tied()), tmp_path / where)


def entry_of(path: Path) -> dict[str, Any]:
    """What octify wrote into a file's metadata."""
    with safe_open(path, "pt") as file:
        return json.loads(file.metadata()["octify"])


def altered(saved: Path, path: Path, **changes: Any) -> Path:
    """A copy with other metadata."""
    save_file(load_file(saved), path, {"octify": json.dumps({**entry_of(saved), **changes})})
    return path


def header_with(saved: Path, **changes: Any) -> str:
    """The text of a header with other contents."""
    return json.dumps({**json.loads(entry_of(saved)["header"]), **changes}, sort_keys=True, separators=(",", ":"))


def test_damaged_and_foreign_files(saved: Path, tmp_path: Path) -> None:
    data, path = saved.read_bytes(), tmp_path / "m.safetensors"
    for cut in (0, 4, 100, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:cut])
        with pytest.raises(CheckpointError, match="truncated"):
            octify.load(path)
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(CheckpointError, match="altered"):
        octify.load(path)
    save_file({"weight": torch.zeros(3)}, path)
    with pytest.raises(CheckpointError, match="no checkpoint of octify"):
        octify.load(path)
    with pytest.raises(CheckpointError, match="no such file"):
        octify.load(tmp_path / "none.safetensors")


def test_altered_plans_newer_formats_and_nonsense(saved: Path, tmp_path: Path) -> None:
    text = header_with(saved, recipe={"version": 1, "defaults": {"alpha": 0.5}})
    with pytest.raises(CheckpointError, match="altered"):
        octify.load(altered(saved, tmp_path / "a.safetensors", header=text))
    with pytest.raises(CheckpointError, match="newer"):
        octify.load(altered(saved, tmp_path / "b.safetensors", format=99))
    for nonsense in ("{}", "[]", "no json", header_with(saved, plan={"ops": [1]})):
        path = altered(saved, tmp_path / "c.safetensors", header=nonsense, digest=_digest(nonsense, load_file(saved)))
        with pytest.raises(CheckpointError, match="holds no plan"):
            octify.load(path)


def test_another_model_is_refused(saved: Path) -> None:
    class Wider(Tied):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Conv2d(16, 16, 5, padding=2)

    with pytest.raises(CheckpointError, match="Tied, which Wider is not"):
        octify.load(saved, model=Wider())
    with pytest.raises(CheckpointError, match="operations"):
        octify.load(saved, model=build_model("timm:resnet10t"))
    with pytest.raises(ModelError, match="is no network"):
        octify.load(saved, model=Wider)  # pyright: ignore


def test_a_file_names_no_code_to_run(saved: Path, tmp_path: Path) -> None:
    """A source that is no library's is never imported, whatever the file says."""
    evil = tmp_path / "evil.py"
    evil.write_text("raise SystemExit('ran')\n")
    text = header_with(saved, source=f"{evil}:factory")
    path = altered(saved, tmp_path / "m.safetensors", header=text, digest=_digest(text, load_file(saved)))
    with pytest.raises(CheckpointError, match="must not run code"):
        octify.load(path)


def test_what_cannot_be_saved(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="not converted by octify"):
        octify.save(nn.Conv2d(3, 3, 1), tmp_path / "m.safetensors")
    ghost = octify.convert(build_model("torchvision:resnet18", device="meta"))
    with pytest.raises(CheckpointError, match="meta device"):
        octify.save(ghost, tmp_path / "m.safetensors")
    assert not list(tmp_path.iterdir())
