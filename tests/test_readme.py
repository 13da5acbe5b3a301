"""What the README shows is what happens: its Python runs, its recipes are valid, its figures and options are real."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import typer.main
from typer.testing import CliRunner

from octify.cli import app
from octify.jobs import Request, plan_model
from octify.recipe import Recipe

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


def blocks(language: str, text: str = README) -> list[str]:
    """The fenced blocks of a language, in order."""
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def section(title: str) -> str:
    """The text below a heading, up to the next one of its rank."""
    return README.split(f"## {title}\n", 1)[1].split("\n## ", 1)[0]


def test_the_python_runs_as_one_session(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    for block in blocks("python", section("In Python")):
        exec(compile(block, "README.md", "exec"), names)
    assert (tmp_path / "m.safetensors").is_file()


@pytest.mark.parametrize("block", blocks("yaml"))
def test_the_recipes_are_valid(block: str) -> None:
    if "separable" in block:
        pytest.skip("its operator is the reader's own: the tests of operators run it")
    Recipe.from_yaml(block)


def test_the_demo_prints_what_the_first_screen_shows() -> None:
    shown = blocks("text")[0]
    facts, _, _ = plan_model(Request("resnet50", 0.25), lambda text: None)
    found = facts["convolutions"]
    assert f"{found['octave']} of {found['total']} octave" in shown
    for reason, count in found["reasons"].items():
        assert f"{count} dense: {reason}" in shown
    for side in ("before", "after"):
        assert f"{facts['parameters'][side]:,}" in shown
        assert f"{facts['gmacs'][side]:.3f} G" in shown
        assert f"{facts['activation_mib'][side]:.3f} MiB" in shown
    assert "octify convert resnet50 --alpha 0.25" in README


COMMANDS: Any = typer.main.get_command(app)


def options_of(name: str) -> set[str]:
    return {
        text for parameter in COMMANDS.commands[name].params for text in (*parameter.opts, *parameter.secondary_opts)
    }


@pytest.mark.parametrize("line", sorted(set(re.findall(r"octify ((?:[a-z]+) [^`\n]*)", README))))
def test_commands_and_options_exist(line: str) -> None:
    name = line.split()[0]
    if name not in COMMANDS.commands:
        pytest.skip("prose")
    if name != "recipes":
        asked = set(re.findall(r"(?<=\s)--?[a-z][a-z0-9-]*", line))
        assert asked <= options_of(name)
    assert CliRunner().invoke(app, [name, "--help"]).exit_code == 0


def test_the_table_names_options_of_each_command() -> None:
    rows = re.findall(r"^\| `octify (\w+)[^|]*\|(.*)\|$", section("On the command line"), re.MULTILINE)
    assert {name for name, _ in rows} >= {"convert", "plan", "inspect", "verify", "models"}
    for name, text in rows:
        asked = {option.strip() for option in re.findall(r"(?<=`)--?[a-z][a-z-]*", text)}
        assert asked <= options_of(name), name


def test_places_for_generated_tables_are_marked() -> None:
    for name in ("zoo", "paper", "fidelity", "bench", "rule", "operator"):
        assert README.index(f"<!-- {name}:begin -->") < README.index(f"<!-- {name}:end -->")
