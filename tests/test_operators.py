"""Operators: CompConv under the same plan as octave, both in one net, and an operator of one's own."""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typer.testing import CliRunner

import octify
from octify import Plan, Recipe, convert, load, plan_of, save
from octify.calibrate.compact import match_moments
from octify.cli import app
from octify.compconv import CompConv2d
from octify.conversion import Conversion
from octify.convert import choose_recipe
from octify.cost import model_cost
from octify.errors import ConversionError, RecipeError
from octify.export import export
from octify.layers import Merge, OctConv2d, Split
from octify.operators import _OPERATORS, Operator, find_operator, register
from octify.plan_recipe import recipe_text_of
from octify.zoo import build_model
from tests.compconv_nets import examine

README = Path(__file__).parents[1] / "README.md"
OWN = Path(__file__).with_name("data") / "own_operator.md"  # what stands in the README between its markers
COMPACT = {"operator": "compconv", "c0": 8}


class Net(nn.Module):
    """A stem, a full, a grouped, a 1x1 and a depthwise convolution, a sum, and one convolution called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(16)
        self.full = nn.Conv2d(16, 32, 3, stride=2, padding=1)
        self.grouped = nn.Conv2d(32, 32, 3, padding=1, groups=4)
        self.point = nn.Conv2d(32, 32, 1)
        self.twice = nn.Conv2d(32, 32, 3, padding=1)
        self.depthwise = nn.Conv2d(32, 32, 3, padding=1, groups=32)
        self.few = nn.Conv2d(32, 4, 3, padding=1)
        self.head = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.stem(x)))
        x = F.relu(self.full(x))
        x = x + self.point(F.relu(self.grouped(x)))
        x = self.depthwise(self.twice(F.relu(self.twice(x))))
        return self.head(self.few(x).mean((2, 3)))


def net() -> Net:
    torch.manual_seed(0)
    model = Net().eval()
    nn.init.uniform_(model.norm.weight, 0.5, 1.5)
    return model


def recipe(text: str) -> Recipe:
    return Recipe.from_yaml(f"version: 1\n{text}", "my.yaml")


IMAGE = (1, 3, 32, 32)
MIXED = """
defaults: {alpha: 0.5, min_size: 1, stem: octave}
layers:
  - {match: twice, operator: compconv, c0: 8}
  - {match: point, operator: keep}
"""


# Figures


@pytest.mark.parametrize(
    ("name", "choice", "gmacs", "parameters"),
    [
        ("resnet50", {"c0": 128}, 2.906, 16.8),
        ("resnet50", {"c0": 64}, 2.741, 16.4),
        ("resnet50", {"c0": 256}, 3.094, 18.4),
        ("resnet50", {"c0": 512}, 3.171, 19.9),
        ("resnet50", {"recipe": "compconv/resnet50"}, 2.906, 16.8),
        ("resnet50", {"recipe": "compconv/resnet50_all"}, 1.723, 10.6),
        ("vgg16", {"recipe": "compconv/vgg16"}, 5.328, 126.8),
    ],
)
def test_what_the_paper_s_formula_comes_to(name: str, choice: dict[str, Any], gmacs: float, parameters: float) -> None:
    operator = None if "recipe" in choice else "compconv"
    made = convert(build_model(name, device="meta"), operator=operator, **choice)
    cost = model_cost(made, (torch.empty(1, 3, 224, 224),))  # pyright: ignore
    assert (round(cost.gmacs, 3), round(cost.parameters / 1e6, 1)) == (gmacs, parameters)


# What is taken


def test_what_it_takes_and_why_not() -> None:
    plan = plan_of(convert(net(), operator="compconv", c0=8, example_inputs=IMAGE))
    forms = {op.target: (op.form, op.reason) for op in plan.convolutions}
    assert forms["stem"] == ("dense", "the first convolution on the image")
    assert forms["full"] == forms["twice"] == ("compconv", "")
    assert forms["grouped"] == forms["depthwise"] == ("dense", "compconv has no groups")
    assert forms["point"] == ("dense", "1x1 (kernels: all takes it)")
    assert forms["few"][0] == "dense" and "14 units, found 4 output channels" in forms["few"][1]
    assert plan.headline == (
        "Net: 2 of 7 convolutions compconv; "
        "no exact transfer of weights to compconv: drawn with the layers' variance, calibrate or train"
    )
    assert str(plan).splitlines()[0] == plan.headline
    assert Plan.from_dict(plan.to_dict()) == plan


def test_pointwise_convolutions_and_the_stem_on_request() -> None:
    text = "defaults: {operator: compconv, kernels: all, c0: 8, stem: octave}\nlayers: [{match: few, keep: dense}]"
    forms = {op.target: op.form for op in plan_of(convert(net(), recipe=recipe(text), example_inputs=IMAGE)).ops}
    assert [forms[name] for name in ("stem", "point", "full")] == ["compconv"] * 3
    assert forms["few"] == "dense"


def test_depth_and_draws_are_in_the_plan() -> None:
    made = convert(net(), operator="compconv", c0=16, example_inputs=IMAGE)
    options = {op.target: op.options for op in plan_of(made).converted}
    assert options["full"] == {"depth": 1, "seed": zlib.crc32(b"full")}
    assert options["twice"] == {"depth": 2, "seed": zlib.crc32(b"twice")}
    again = convert(net(), operator="compconv", c0=16, example_inputs=IMAGE)
    pairs = zip(made.state_dict().values(), again.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert isinstance(made.get_submodule("twice"), CompConv2d)


def test_equal_layers_do_not_share_their_draws() -> None:
    model = nn.Sequential(*(nn.Conv2d(8, 8, 3) for _ in range(3)))
    made = convert(model, operator="compconv", example_inputs=(1, 8, 16, 16))
    one, two = (made.get_submodule(f"{name}.tail").weight for name in "12")
    assert not torch.equal(one, two)  # pyright: ignore


def test_depth_zero_is_the_source_bit_for_bit() -> None:
    model, image = net(), torch.randn(2, 3, 33, 31)
    text = "defaults: {operator: compconv, options: {depth: 0}}"
    made = convert(model, recipe=recipe(text), example_inputs=IMAGE)
    with torch.no_grad():
        assert torch.equal(made(image), model(image))
    assert list(made.state_dict()) == list(model.state_dict())
    assert plan_of(made).reasons()["depth 0"] == 4


# Both operators in one net


def test_a_net_may_hold_both(tmp_path: Path) -> None:
    made = convert(net(), recipe=recipe(MIXED), example_inputs=IMAGE)
    kinds = {name: type(made.get_submodule(name)) for name in ("full", "grouped", "point", "twice")}
    assert kinds == {"full": OctConv2d, "grouped": OctConv2d, "point": nn.Conv2d, "twice": CompConv2d}
    assert {Split, Merge} & {type(module) for module in made.modules()}
    assert re.match(r"Net: \d of 7 convolutions changed, \d octave and 1 compconv; no exact", plan_of(made).headline)
    odd = torch.randn(2, 3, 37, 29)
    save(made, tmp_path / "net.safetensors")
    again = load(tmp_path / "net.safetensors", net())
    with torch.no_grad():
        assert torch.equal(made(odd), again(odd))
    made.train()(odd).square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in made.parameters())


def test_a_plan_s_recipe_gives_it_again() -> None:
    reading = Conversion.read(net(), recipe(MIXED), IMAGE)
    text = recipe_text_of(reading, reading.plan())
    again = Conversion.read(net(), Recipe.from_yaml(text), IMAGE).plan()
    decided = [
        [(op.name, op.form, op.reads, op.gives, op.options) for op in plan.ops] for plan in (reading.plan(), again)
    ]
    assert decided[0] == decided[1]


def test_octave_around_it_is_exact_where_the_layers_are_given() -> None:
    """Maps of one colour: with CompConv's layers in the source already, octave around them changes nothing."""
    source = net().double()
    made = convert(source, recipe=recipe(MIXED), example_inputs=IMAGE)
    dense = convert(source, operator="keep", example_inputs=IMAGE)
    dense.set_submodule("twice", made.get_submodule("twice"))  # pyright: ignore
    image = torch.rand(2, 3, 1, 1, dtype=torch.float64).expand(2, 3, 32, 32)
    with torch.no_grad(), octify.oracles.ReplicatePadding():  # pyright: ignore
        assert torch.allclose(made(image), dense(image), rtol=1e-9, atol=1e-9)


# Everything around


@pytest.mark.parametrize("name", ["squeezenet1_1", "timm:repvgg_a0", "mnasnet0_5"])
def test_some_of_the_thirty_nets(name: str, tmp_path: Path) -> None:
    examine(name, exports=False, folder=tmp_path)


def test_exports(tmp_path: Path) -> None:
    made = convert(net(), operator="compconv", c0=8, example_inputs=IMAGE)
    written = export(made, tmp_path / "net.onnx")
    assert written.error < 1e-4 and written.dynamic == ("batch", "size")


def test_submodules_of_a_net_that_does_not_trace() -> None:
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = net()

        def forward(self, x: Tensor) -> Tensor:
            return self.body(x if float(x.sum()) > 0 else -x)

    made = convert(Branching().eval(), operator="compconv", c0=8, example_inputs=IMAGE)
    assert isinstance(made.get_submodule("body.full"), CompConv2d)
    assert "no exact transfer" in plan_of(made).headline
    assert {op.options["seed"] for op in plan_of(made).converted} == {
        zlib.crc32(b"body.full"),
        zlib.crc32(b"body.twice"),
    }


def test_calibration_fits_it() -> None:
    model, images = net(), torch.randn(24, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    losses = [
        convert(model, **COMPACT, calibration=images, fit=fit, statistics=False).octify_report.loss  # pyright: ignore
        for fit in (False, True)
    ]
    assert losses[1] < 0.5 * losses[0]


def test_the_norm_behind_gets_the_dense_network_s_moments() -> None:
    torch.manual_seed(0)
    conv, norm, image = nn.Conv2d(8, 12, 3, bias=False), nn.BatchNorm2d(12).eval(), torch.randn(4, 8, 16, 16)
    comp = CompConv2d(8, 12, 3, bias=False, c0=8)
    wanted = norm(dense := conv(image))
    match_moments(comp, [(image[:1], dense[:1].detach()), (image[1:], dense[1:].detach())], norm)
    found = norm(comp(image))
    for moment in (torch.mean, torch.std):
        assert torch.allclose(moment(found, (0, 2, 3)), moment(wanted, (0, 2, 3)), atol=1e-4)


def test_the_command_line_says_it_first() -> None:
    ran = CliRunner().invoke(app, ["plan", "resnet18", "--operator", "compconv", "--c0", "64"])
    assert ran.exit_code == 0 and "no exact transfer of weights" in ran.stdout.splitlines()[0]
    assert "compconv" in CliRunner().invoke(app, ["ops"]).stdout


# What it refuses


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("defaults: {operator: compcon}", r"defaults: there is no operator compcon.*\n  closest   compconv"),
        ("defaults: {operator: compconv, c0: 0}", "c0 is 0: expected greater than or equal to 1"),
        ("defaults: {operator: compconv, options: {depth: 4}}", "defaults: depth is 4: expected 0 to 3"),
        ("layers:\n  - {match: full, operator: compconv, options: {depth: x}}", r"my.yaml:3: depth is 'x'"),
        ("defaults: {operator: compconv, options: {depht: 2}}", "no option depht: expected c0, depth, shuffle_groups"),
        ("defaults: {operator: compconv, options: {shuffle_groups: 0}}", "shuffle_groups is 0: expected 1 or more"),
        ("defaults: {alpha: 0.5, c0: 4}", "operator octave has no option c0"),
    ],
)
def test_recipes_that_make_no_sense(text: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        convert(net(), recipe=recipe(text), example_inputs=IMAGE)


def test_arguments_that_make_no_sense() -> None:
    with pytest.raises(RecipeError, match="operator compconv has no alpha"):
        choose_recipe(None, 0.5, None, "compconv")
    with pytest.raises(RecipeError, match="no operator"):
        choose_recipe(None, None, None, "mine")
    few = nn.Sequential(nn.ReLU(), nn.Conv2d(8, 4, 3))
    deep = recipe("defaults: {operator: compconv, options: {depth: 2}, stem: octave}")
    with pytest.raises(ConversionError, match=r"0 of 1 convolutions converted(.|\n)*found 4 output channels"):
        convert(few, recipe=deep, example_inputs=(1, 8, 9, 9))


# One's own


@pytest.fixture
def own() -> Iterator[str]:
    """The example's Python, run; its operator is forgotten afterwards."""
    text = re.findall(r"```python\n(.*?)```", OWN.read_text(), re.S)[0]
    exec(text, {})
    yield text
    del _OPERATORS["separable"]


def test_one_s_own_operator(own: str, tmp_path: Path) -> None:
    assert len([line for line in own.partition("class Separable")[2].splitlines() if line.strip()]) < 20
    rule = recipe("defaults: {alpha: 0.25}\nlayers: [{match: twice, operator: separable, options: {bias: false}}]")
    made = convert(net(), recipe=rule, example_inputs=IMAGE)
    assert plan_of(made).headline.endswith("no exact transfer of weights to separable: train")
    assert isinstance(made.get_submodule("twice.0"), nn.Conv2d) and made.get_submodule("twice.1").bias is None
    save(made, tmp_path / "net.safetensors")
    again, image = load(tmp_path / "net.safetensors", net()), torch.randn(1, 3, 35, 41)
    with torch.no_grad():
        assert torch.equal(made(image), again(image))


def test_a_file_with_an_operator_that_is_not_registered(own: str, tmp_path: Path) -> None:
    save(convert(net(), operator="separable", example_inputs=IMAGE), tmp_path / "net.safetensors")
    kept = _OPERATORS.pop("separable")
    with pytest.raises(octify.errors.CheckpointError, match="there is no operator separable"):  # pyright: ignore
        load(tmp_path / "net.safetensors", net())
    register(kept)


def test_names_are_taken_once() -> None:
    with pytest.raises(ValueError, match="there is an operator octave already"):
        register(find_operator("octave"))

    class Dense(Operator):
        name = "dense"

    with pytest.raises(ValueError, match="a word of the plan's"):
        register(Dense())


def test_the_readme_has_the_example() -> None:
    if "<!-- operator:begin -->" in (README.read_text() if README.exists() else ""):
        text = README.read_text().partition("<!-- operator:begin -->")[2].partition("<!-- operator:end -->")[0]
        assert text.strip() == OWN.read_text().strip()
