"""The command line by typer's runner: what it prints, writes and exits with, and every mistake a user can make."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner, Result

import octify
from octify.cli import app
from octify.zoo import build_model

SMALL = ["timm:resnet10t", "--input-size", "3x96x96"]
KEYS = [
    "model", "source", "input_size", "alpha", "recipe", "convolutions", "adapters", "parameters", "gmacs",
    "activation_mib", "checks", "seconds", "output",
]  # fmt: skip
MY_NET = """
import torch
from torch import nn

def factory():
    print("a factory that chatters")
    return nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(),
        nn.Conv2d(16, 8, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())

def broken():
    raise RuntimeError("no such luck")

def nothing():
    return 3
"""


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def result_of(*arguments: object) -> dict[str, Any]:
    found = run(*arguments, "--json")
    assert found.exit_code == 0, found.stderr
    return json.loads(found.stdout)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("cli") / "m.safetensors"
    facts = result_of("convert", *SMALL, "--alpha", 0.5, "-o", path)
    assert facts["output"] == str(path)
    return path


@pytest.fixture
def my_net(tmp_path: Path) -> Path:
    path = tmp_path / "my net.py"
    path.write_text(MY_NET)
    return path


def test_the_json_of_convert_has_exactly_these_keys() -> None:
    facts = result_of("convert", *SMALL, "--alpha", 0.5)
    assert list(facts) == KEYS
    assert facts["model"] == facts["source"] == "timm:resnet10t"
    assert (facts["input_size"], facts["alpha"], facts["output"]) == ([3, 96, 96], 0.5, None)
    found = facts["convolutions"]
    assert list(found) == ["total", "octave", "dense", "reasons"]
    assert found["octave"] + found["dense"] == found["total"]
    assert sum(found["reasons"].values()) == found["dense"]
    assert list(facts["adapters"]) == ["split", "merge"]
    assert list(facts["parameters"]) == ["before", "after"]
    for key in ("gmacs", "activation_mib"):
        assert facts[key]["ratio"] == pytest.approx(facts[key]["after"] / facts[key]["before"], abs=2e-3)
    assert all(check["passed"] and list(check) == ["name", "passed", "value"] for check in facts["checks"])


def test_figures_of_the_paper_are_met() -> None:
    for alpha, gmacs in ((0.25, 3.1035), (0.5, 2.3671)):
        facts = result_of("plan", "resnet50", "--recipe", "resnet", "--kernels", "paper", "--alpha", alpha)
        assert facts["gmacs"]["after"] == gmacs
        assert facts["parameters"] == {"before": 25557032, "after": 25557032}
        folded = result_of("plan", "resnet50", "--recipe", "resnet", "--alpha", alpha)
        assert folded["gmacs"]["after"] <= gmacs
        assert folded["parameters"]["after"] <= 25557032


def test_convert_reports_to_people() -> None:
    found = run("convert", *SMALL)
    assert found.exit_code == 0
    for text in ("convolutions", "multiply-adds", "activation memory", "equal on constant images", "random weights"):
        assert text in found.stdout
    assert run("convert", *SMALL, "--quiet").stdout == ""


def test_plan_is_convert_without_checks_and_with_operations() -> None:
    facts = result_of("plan", "resnet18")
    assert [key for key in facts if key != "operations"] == [k for k in KEYS if k not in ("checks", "output")]
    assert {"name", "target", "reads", "gives", "reason"} <= set(facts["operations"][0])
    text = run("plan", "resnet18").stdout
    assert "layer2.0.conv1" in text
    assert "64h -> 96h32l" in text


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("resnet18", ["--alpha", "0.5"]),
        ("resnext50_32x4d", ["--recipe", "resnet"]),
        ("mobilenet_v3_large", []),
        ("resnet50", ["--recipe", "paper/resnet50", "--alpha", "0.5"]),
    ],
)
def test_a_plan_written_as_a_recipe_gives_the_same_plan(name: str, options: list[str], tmp_path: Path) -> None:
    path = tmp_path / "my.yaml"
    first = result_of("plan", name, *options, "-o", path)
    second = result_of("plan", name, "--recipe", path)

    def decisions(facts: dict[str, Any]) -> list[tuple[Any, ...]]:
        return [(op["name"], op["form"], op["reads"], op["gives"], op["options"]) for op in facts["operations"]]

    assert decisions(first) == decisions(second)
    lines = path.read_text().splitlines()
    assert sum("match:" in line for line in lines) == first["convolutions"]["total"]
    assert run("recipes", "validate", path, name).exit_code == 0


def test_an_edited_plan_changes_the_layer_that_was_edited(tmp_path: Path) -> None:
    path = tmp_path / "my.yaml"
    result_of("plan", "resnet18", "-o", path)
    path.write_text(path.read_text().replace("match: layer2.0.conv1, alpha: 0.25", "match: layer2.0.conv1, alpha: 0.5"))
    operations = {op["target"]: op for op in result_of("plan", "resnet18", "--recipe", path)["operations"]}
    assert operations["layer2.0.conv1"]["gives"] == ["64h64l"]
    assert operations["layer2.1.conv1"]["gives"] == ["96h32l"]


def test_inspect_and_verify_a_checkpoint(checkpoint: Path) -> None:
    facts = result_of("inspect", checkpoint)
    assert facts["source"] == "timm:resnet10t"
    assert facts["alpha"] == 0.5
    assert "timm:resnet10t" in run("inspect", checkpoint).stdout
    checked = result_of("verify", checkpoint)
    assert checked["passed"]
    assert {"alpha 0: same output", "equal on constant images"} <= {check["name"] for check in checked["checks"]}
    octify.load(checkpoint)
    stored = result_of("plan", checkpoint)
    assert stored["source"] == "timm:resnet10t"
    assert stored["operations"] == facts["operations"]


def test_verify_exits_with_one_if_a_check_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    from octify import octconv

    real = octconv.OctConv._to_low
    monkeypatch.setattr(octconv.OctConv, "_to_low", lambda self, *args: real(self, *args).flip(-1))
    found = run("verify", *SMALL, "--json")
    assert found.exit_code == 1
    assert not json.loads(found.stdout)["passed"]


def test_weights_seed_and_file(tmp_path: Path) -> None:
    model = build_model("timm:resnet10t", seed=3)
    torch.save(model.state_dict(), tmp_path / "w.pt")
    for index, options in enumerate((["--seed", "3"], ["--weights", tmp_path / "w.pt"])):
        result_of("convert", *SMALL, *options, "-o", tmp_path / f"{index}.safetensors")
    first, second = (octify.load(tmp_path / f"{index}.safetensors").state_dict() for index in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_network_of_ones_own(my_net: Path, tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    source = f"{my_net}:factory"
    facts = result_of("convert", source, "--input-size", "3x32x32", "-o", path)
    assert facts["source"] == source
    assert run("inspect", path).exit_code == 0
    refused = run("verify", path)
    assert refused.exit_code == 1
    assert "model=" in refused.stderr and f"--source {source}" in refused.stderr
    assert run("verify", path, "--source", source).exit_code == 0
    assert run("plan", path, "--source", source).exit_code == 0
    assert run("export", path, "--source", source, "-o", tmp_path / "m.pt2").exit_code == 0
    assert run("bench", path, "--source", source, "--rounds", "1").exit_code == 0


def test_what_there_is(tmp_path: Path) -> None:
    assert "torchvision:resnet18" in run("models", "resnet18").stdout
    assert run("models", "no-such-net").exit_code == 1
    assert "Conv2d" in run("ops").stdout
    assert "uniform" in run("recipes", "ls").stdout
    text = run("recipes", "cat", "resnet").stdout
    assert run("recipes", "cp", "resnet", tmp_path / "mine.yaml").exit_code == 0
    assert (tmp_path / "mine.yaml").read_text() == text
    assert run("recipes", "validate", tmp_path / "mine.yaml", "resnet18").exit_code == 0
    assert run("--version").stdout.strip() == f"octify {octify.__version__}"


MISTAKES: list[tuple[list[str], int, str]] = [
    (["convert", "resnet5"], 2, "closest"),
    (["convert", "timm:nothing_at_all"], 2, "no network of timm"),
    (["convert", "resnet18", "--alpha", "1.5"], 2, "0 to 1"),
    (["convert", "resnet18", "--alpha", "nan"], 2, "0 to 1"),
    (["convert", "resnet18", "--alpha", "much"], 2, "alpha"),
    (["convert", "resnet18", "--kernels", "strange"], 2, "fold"),
    (["convert", "resnet18", "--recipe", "no-such"], 2, "neither a file nor a recipe"),
    (["convert", "resnet18", "--recipe", "{tmp}/bad.yaml"], 2, "bad.yaml:3"),
    (["convert", "vgg11", "--recipe", "resnet"], 2, "names no module of VGG"),
    (["convert", "resnet18", "--input-size", "224"], 2, "such as 3x224x224"),
    (["convert", "resnet18", "--input-size", "1x64x64"], 2, "does not run on an input of 1x1x64x64"),
    (["convert", "resnet18", "--input-size", "3x16x16"], 1, "0 of 20 convolutions converted"),
    (["convert", "resnet18", "--weights", "{tmp}/none.pt"], 2, "no such file"),
    (["convert", "resnet18", "--weights", "{tmp}/bad.yaml"], 2, "cannot be read"),
    (["convert", "resnet18", "-o", "{tmp}/missing/m.safetensors"], 1, "no directory"),
    (["convert", "resnet18", "-o", "{tmp}"], 1, "is a directory"),
    (["convert", "resnet18", "-o", "{tmp}/bad.yaml"], 1, "--overwrite"),
    (["convert", "{checkpoint}"], 2, "converted already"),
    (["convert", "{net}:broken"], 2, "no such luck"),
    (["convert", "{net}:nothing"], 2, "expected an nn.Module"),
    (["convert", "{net}:missing"], 2, "missing"),
    (["convert", "no_such_package:factory"], 2, "cannot be imported"),
    (["plan", "resnet18", "-o", "{tmp}/bad.yaml"], 1, "--overwrite"),
    (["inspect", "{tmp}/bad.yaml"], 1, "no .safetensors file"),
    (["inspect", "{tmp}/none.safetensors"], 1, "no such file"),
    (["verify", "{tmp}/none.safetensors"], 1, "no such file"),
    (["verify", "{checkpoint}", "--alpha", "0.5"], 2, "own recipe"),
    (["plan", "{checkpoint}", "--alpha", "0.5"], 2, "its own plan"),
    (["recipes", "cat", "nope"], 2, "no recipe"),
    (["recipes", "cp", "resnet", "{tmp}/bad.yaml"], 1, "--overwrite"),
    (["recipes", "validate", "stages", "vgg11"], 2, "names no module"),
    (["convert"], 2, "MODEL"),
    (["nonsense"], 2, "nonsense"),
]


@pytest.mark.parametrize(("arguments", "code", "text"), MISTAKES, ids=lambda value: str(value)[:40])
def test_mistakes(arguments: list[str], code: int, text: str, tmp_path: Path, my_net: Path, checkpoint: Path) -> None:
    (tmp_path / "bad.yaml").write_text("version: 1\ndefaults:\n  alhpa: 0.25\n")
    places = {"tmp": tmp_path, "net": my_net, "checkpoint": checkpoint}
    before = {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    found = run(*(argument.format(**places) for argument in arguments))
    assert found.exit_code == code, found.output
    assert found.stdout == "", "mistakes are told on stderr"
    assert text in " ".join(found.stderr.split())
    assert "Traceback" not in found.stderr
    assert found.exception is None or isinstance(found.exception, SystemExit)
    assert before.items() <= {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}.items()


def test_convert_by_images_says_what_is_expected_and_warns(tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text(MY_NET)
    np.save(tmp_path / "images.npy", np.random.default_rng(0).normal(size=(12, 3, 32, 32)).astype(np.float32))
    given = ["convert", tmp_path / "net.py:factory", "--input-size", "3x32x32", "--calibrate", tmp_path / "images.npy"]
    found = run(*given, "--target", 0.8)
    assert found.exit_code == 0 and "expected on new images: " in found.stdout and "by 4 that nothing" in found.stdout
    facts = json.loads(run(*given, "--target", 0.8, "--json").stdout)["calibration"]
    assert facts["expected"]["judges"] == 4 and facts["verdict"] in " ".join(found.stdout.split())
    missed = run(*given, "--target", 0.1)
    assert missed.exit_code == 1 and "out of reach" in missed.stderr


def test_random_weights_are_nothing_to_keep() -> None:
    given = ("--calibrate", "nowhere")
    assert "warning: the weights of timm:resnet10t are random" in run("convert", *SMALL, *given).stderr
    own = run("convert", "net.py:factory", "--calibrate", "nowhere")
    assert own.exit_code and "warning" not in own.stderr
