"""Imports go to a lower level only."""

from __future__ import annotations

import ast
from graphlib import TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).parents[1] / "octify"

# From the bottom up; a module may import what stands in a line above its own. A package has one line for all its
# modules, which may import each other; only the rules' families ("rules.*") may not.
LEVELS = """\
errors version
layout patterns yaml_source inputs weights
recipe_parts recipe_errors zoo
recipe origin
kernels resample bands graph
routes ops reparametrized functional
modes
octbase compconv pooling
octconv compweights
transposed linear
layers
rules.base
tracer ties norms operators rules.select rules.elementwise
shaped
trace
module
rules.*
rules
flows
plan
rewrite check
parts cost branches
calibrate
convert
conversion
optimize runtimes
tensors oracles plan_recipe program
checkpoint verify
export
bench
jobs report
calibrate_jobs report_calibration report_speed
cli_base
cli_calibrate cli_speed cli_recipes
cli
""".splitlines()
LEVEL = {name: level for level, line in enumerate(LEVELS) for name in line.split()}


def level_of(name: str) -> int | None:
    package = name.partition(".")[0]
    return LEVEL.get(name, LEVEL["rules.*"] if package == "rules" else LEVEL.get(package))


def may_import(name: str, other: str) -> bool:
    together = name.partition(".")[0] == other.partition(".")[0] != "rules"
    return together or (level_of(other) or 0) < (level_of(name) or 0)


def imports_of(path: Path, name: str) -> set[str]:
    """The modules of octify that a file imports, anywhere in it, as names below octify."""
    found: set[str] = set()
    package = ["octify", *name.split(".")] if path.name == "__init__.py" else ["octify", *name.split(".")[:-1]]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            found |= {f"{module}.{alias.name}" for alias in node.names} | {module}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    files = {dotted(file) for file in ROOT.rglob("*.py")}
    return {below for below in (module.removeprefix("octify.") for module in found) if below in files}


def dotted(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def test_imports_go_to_a_lower_level_only() -> None:
    files = [path for path in sorted(ROOT.rglob("*.py")) if dotted(path) not in ("__init__", "__main__")]
    unknown = [dotted(path) for path in files if level_of(dotted(path)) is None]
    assert not unknown, f"give these a level in {__file__}: {unknown}"
    imports = {dotted(path): imports_of(path, dotted(path)) - {dotted(path)} for path in files}
    upward = [f"{name} imports {other}" for name in imports for other in imports[name] if not may_import(name, other)]
    assert not sorted(upward)
    TopologicalSorter(imports).prepare()  # no circles within a package either


def test_the_command_line_alone_has_typer_and_rich_only_where_things_are_printed() -> None:
    allowed = {"typer": {"cli"}, "rich": {"cli", "report"}}
    for path in ROOT.rglob("*.py"):
        text = path.read_text()
        for library, places in allowed.items():
            assert dotted(path).split("_")[0] in places or f"import {library}" not in text, (path, library)
            assert dotted(path).split("_")[0] in places or f"from {library}" not in text, (path, library)
