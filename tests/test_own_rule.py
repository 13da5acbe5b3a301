"""The README's example of a rule for a module of one's own runs, and does what the text says."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from octify import convert, plan_of
from octify.oracles import ReplicatePadding
from octify.rules.base import MODULES

README = Path(__file__).parents[1] / "README.md"
OWN = Path(__file__).with_name("data") / "own_rule.md"  # what stands in the README between its markers


def example() -> str:
    """The Python of the example."""
    return re.findall(r"```python\n(.*?)```", OWN.read_text(), re.S)[0]


@pytest.fixture
def names() -> Iterator[dict[str, Any]]:
    """What the example defines; its rule is forgotten afterwards."""
    before = dict(MODULES)
    found: dict[str, Any] = {}
    exec(example(), found)
    yield found
    MODULES.clear()
    MODULES.update(before)


def net(gate: nn.Module) -> nn.Module:
    """Two blocks with the module between them."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 16, 3, padding=1), gate, nn.Conv2d(16, 16, 3, padding=1),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(),
    ).eval()  # fmt: skip


def test_the_readme_has_the_example() -> None:
    if "<!-- rule:begin -->" in (README.read_text() if README.exists() else ""):
        text = README.read_text().partition("<!-- rule:begin -->")[2].partition("<!-- rule:end -->")[0]
        assert text.strip() == OWN.read_text().strip()


def test_a_rule_takes_fewer_than_fifteen_lines() -> None:
    rule = example().partition("class OncePerBand")[2]
    assert len([line for line in rule.splitlines() if line.strip()]) < 15


def test_with_the_rule_the_module_runs_on_the_bands(names: dict[str, Any]) -> None:
    model = net(names["ErfGate"]())
    converted = convert(model, example_inputs=(1, 3, 32, 32))
    forms = {op.target: op.form for op in plan_of(converted).ops}
    assert forms["2"] == "bands" and forms["3"] == "octave"
    image = 9 * torch.rand(2, 3, 1, 1).expand(2, 3, 32, 32)
    with torch.no_grad(), ReplicatePadding():
        assert torch.allclose(converted(image), model(image), atol=1e-5)


def test_without_it_the_operation_stays_dense_and_is_named(names: dict[str, Any]) -> None:
    del MODULES[names["ErfGate"]]
    plan = plan_of(convert(net(names["ErfGate"]()), example_inputs=(1, 3, 32, 32)))
    assert [op.reason for op in plan.ops if op.kind == "opaque"] == ["no rule for function special_erf"]
