"""An exported file computes the same in its own runtime, or it is not there."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from timm.layers.conv2d_same import Conv2dSame
from torch import Tensor, nn

import octify
import octify.runtimes
from octify.errors import BackendError, CheckpointError
from octify.runtimes import open_exported

SHAPE = (1, 3, 32, 32)
ENDINGS = {"onnx": "net.onnx", "pt2": "net.pt2", "openvino": "net.xml"}


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU())
        self.one = nn.Sequential(nn.Conv2d(16, 16, 1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1))
        self.down = nn.Conv2d(16, 32, 3, 2, 1)
        self.head = nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = torch.relu(self.one(x) + x)
        return self.head(self.down(x).mean((2, 3)))


def octave(model: nn.Module | None = None) -> nn.Module:
    torch.manual_seed(0)
    recipe = octify.Recipe.from_dict({"version": 1, "defaults": {"alpha": 0.5, "min_size": 2, "stem": "octave"}})
    return octify.convert(model or Small(), recipe=recipe, example_inputs=SHAPE).eval()


@pytest.mark.parametrize("format", ENDINGS)
def test_a_file_agrees_in_its_own_runtime_at_any_size(format: str, tmp_path: Path) -> None:
    net = octave()
    done = octify.export(net, tmp_path / ENDINGS[format])
    assert done.format == format and done.dynamic == ("batch", "size") and done.error <= 1e-4
    assert {path.name for path in tmp_path.iterdir()} == {ENDINGS[format]} | (
        {"net.bin"} if format == "openvino" else set()
    )
    run = open_exported(done.path, format, 1)
    for shape in ((1, 3, 32, 32), (3, 3, 27, 41)):
        image = torch.rand(shape)
        with torch.inference_mode():
            wanted = net(image)
        assert (run(image)[0] - wanted).abs().max() <= 1e-4 * wanted.abs().max()


class OneSize(Small):
    """A classifier that looks at every position: it takes one size."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(32 * 16 * 16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.down(self.one(self.stem(x)))
        return self.head(x.view(x.size(0), -1))


class Stacked(Small):
    """Python counts what it makes, so it is traced along the example's branches; they are those of every size."""

    def forward(self, x: Tensor) -> Tensor:
        parts = list(self.one(self.stem(x)).chunk(2, 1))
        return self.head(self.down(torch.cat([*parts[::-1]], 1)).mean((2, 3)))


class Halved(Small):
    """Takes even sizes only."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.one(self.stem(x))
        small = nn.functional.interpolate(nn.functional.max_pool2d(x, 2), scale_factor=2.0)
        return self.head(self.down(x + small).mean((2, 3)))


@pytest.mark.parametrize(
    ("kind", "open_axes"), [(OneSize, ("batch",)), (Stacked, ("batch", "size")), (Halved, ("batch", "size"))]
)
def test_a_file_leaves_open_what_the_network_takes(
    kind: type[nn.Module], open_axes: tuple[str, ...], tmp_path: Path
) -> None:
    net = octave(kind())
    done = octify.export(net, tmp_path / "net.onnx")
    assert done.dynamic == open_axes and done.error <= 1e-4
    image = torch.rand(2, 3, 32, 32)
    with torch.inference_mode():
        wanted = net(image)
    assert (open_exported(done.path, "onnx", 1)(image)[0] - wanted).abs().max() <= 1e-4 * wanted.abs().max()


@pytest.mark.parametrize("format", ["onnx", "pt2"])
def test_a_file_for_multiples_upsamples_by_a_factor_and_refuses_other_sizes(format: str, tmp_path: Path) -> None:
    net = octave()
    done = octify.export(net, tmp_path / ENDINGS[format], multiple=4)
    assert done.dynamic == ("batch", "size") and done.multiple == 4
    run = open_exported(done.path, format, 1)
    image = torch.rand(3, 3, 20, 44)
    with torch.inference_mode():
        wanted = net(image)
    assert (run(image)[0] - wanted).abs().max() <= 1e-4 * wanted.abs().max()
    with pytest.raises(Exception, match=r"."):  # each runtime has an error of its own
        run(torch.rand(1, 3, 21, 44))
    with pytest.raises(BackendError, match="1x3x32x32: expected a height and width divisible by 5"):
        octify.export(net, tmp_path / ENDINGS[format], multiple=5, overwrite=True)
    with pytest.raises(BackendError, match="call reshape on the model"):
        octify.export(net, tmp_path / "net.xml", multiple=4)


@pytest.mark.parametrize("multiple,constant", [(1, False), (4, True)])
def test_upsampling_is_by_a_constant_where_sizes_allow_it(multiple: int, constant: bool, tmp_path: Path) -> None:
    import onnx

    octify.export(octave(), tmp_path / "net.onnx", multiple=multiple)
    graph = onnx.load(tmp_path / "net.onnx").graph
    kept = {entry.name for entry in graph.initializer}
    resizes = [node for node in graph.node if node.op_type == "Resize"]
    assert resizes and all((node.input[2] in kept) is constant for node in resizes)


class Same(Small):
    """Padded by its input's size, as TensorFlow does: the stem dense, a strided layer octave."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(Conv2dSame(3, 16, 3, 2), nn.BatchNorm2d(16), nn.ReLU())
        self.down = Conv2dSame(16, 32, 3, 2)


def test_padding_by_the_input_s_size_stays_open_in_a_file(tmp_path: Path) -> None:
    net = octave(Same())
    done = octify.export(net, tmp_path / "net.pt2")
    assert done.dynamic == ("batch", "size") and done.error <= 1e-5
    program = torch.export.load(done.path)
    assert not [node for node in program.graph.nodes if "batch_norm" in str(node.target)]
    run = open_exported(done.path, "pt2")
    for size in ((31, 33), (34, 36)):
        image = torch.rand(2, 3, *size)
        assert (run(image)[0] - net(image)).abs().max() <= 1e-5 * net(image).abs().max()


@pytest.mark.parametrize("dtype,limit", [(torch.float64, 1e-12), (torch.bfloat16, 5e-2)])
def test_a_network_of_another_precision_is_written_in_it(dtype: torch.dtype, limit: float, tmp_path: Path) -> None:
    done = octify.export(octave().to(dtype), tmp_path / "net.pt2")
    assert done.error <= limit
    image = torch.rand(SHAPE).to(dtype)
    assert open_exported(done.path, "pt2")(image)[0].dtype == dtype


def test_a_file_runs_without_octify(tmp_path: Path) -> None:
    net = octave()
    octify.export(net, tmp_path / "net.pt2")
    image = torch.rand(SHAPE)
    torch.save((image, net(image).detach()), tmp_path / "pair.pt")
    script = (
        "import sys, torch; sys.modules['octify'] = None\n"
        "image, wanted = torch.load('pair.pt')\n"
        "found = torch.export.load('net.pt2').module()(image)\n"
        "assert torch.allclose(found, wanted, atol=1e-5), (found - wanted).abs().max()\n"
    )
    subprocess.run([sys.executable, "-c", script], cwd=tmp_path, check=True)


def test_a_file_says_what_it_is(tmp_path: Path) -> None:
    import onnx

    net = octave()
    octify.export(net, tmp_path / "net.onnx")
    said = {entry.key: entry.value for entry in onnx.load(tmp_path / "net.onnx").metadata_props}
    assert said["octify.octify"] == octify.__version__
    assert octify.Recipe.from_yaml(said["octify.recipe"]) == net.octify_recipe
    assert octify.Plan.from_dict(json.loads(said["octify.plan"])) == net.octify_plan


def test_a_missing_runtime_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(BackendError, match=r"onnxruntime is not installed: pip install octify\[export\]"):
        octify.export(octave(), tmp_path / "net.onnx")
    assert not list(tmp_path.iterdir())


def test_where_nothing_can_be_written_nothing_is(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="there is no directory"):
        octify.export(octave(), tmp_path / "no" / "net.onnx")
    (tmp_path / "net.pt2").write_text("mine")
    with pytest.raises(CheckpointError, match="there already"):
        octify.export(octave(), tmp_path / "net.pt2")
    assert (tmp_path / "net.pt2").read_text() == "mine"
    with pytest.raises(BackendError, match="expected one of onnx, pt2, openvino"):
        octify.export(octave(), tmp_path / "net.tflite")


def test_a_full_disk_leaves_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def full(program: object, path: Path, metadata: object) -> None:
        path.write_text("half")
        raise OSError(28, "No space left on device")

    monkeypatch.setitem(octify_export_writers(), "pt2", full)
    with pytest.raises(CheckpointError, match="No space left"):
        octify.export(octave(), tmp_path / "net.pt2")
    assert not list(tmp_path.iterdir())


def octify_export_writers() -> dict[str, object]:
    return sys.modules["octify.export"].WRITERS  # type: ignore[no-any-return]


def test_an_operation_that_onnx_lacks_is_named_and_nothing_is_written(tmp_path: Path) -> None:
    class Odd(Small):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + torch.special.bessel_j0(x).mean()

    with pytest.raises(BackendError, match="bessel"):
        octify.export(octave(Odd()), tmp_path / "net.onnx")
    assert not list(tmp_path.iterdir())


def test_a_file_that_computes_something_else_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    real = octify.runtimes.OPENERS["pt2"]

    def wrong(path: str, threads: int | None) -> octify.runtimes.Run:
        run = real(path, threads)
        return lambda *inputs: [value * 1.001 for value in run(*inputs)]

    monkeypatch.setitem(octify.runtimes.OPENERS, "pt2", wrong)
    with pytest.raises(BackendError, match="computes something else at 1x3x32x32"):
        octify.export(octave(), tmp_path / "net.pt2")
    assert not list(tmp_path.iterdir())
