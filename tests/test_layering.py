"""Imports go to a lower level only."""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).parents[1] / "octify"

# From the bottom up; a module may import any of the lines above its own. "rules.*" are the families of rules.
LEVELS = """\
errors
layout patterns yaml_source
recipe_parts recipe_errors
recipe
kernels resample bands graph modes
routes
octconv compconv
layers
compweights ops
rules.base
trace ties
rules.*
rules
plan
rewrite check
convert
report zoo checkpoint cost bench export
cli
""".splitlines()
LEVEL = {name: level for level, line in enumerate(LEVELS) for name in line.split()}


def level_of(name: str) -> int | None:
    return LEVEL.get("rules.*" if name.startswith("rules.") and name not in LEVEL else name)


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
    upward = [
        f"{dotted(path)} imports {other}"
        for path in files
        for other in sorted(imports_of(path, dotted(path)) - {dotted(path)})
        if (level_of(other) or 0) >= (level_of(dotted(path)) or 0)
    ]
    assert not upward


def test_the_command_line_alone_has_typer_and_rich_only_where_things_are_printed() -> None:
    allowed = {"typer": {"cli"}, "rich": {"cli", "report"}}
    for path in ROOT.rglob("*.py"):
        text = path.read_text()
        for library, places in allowed.items():
            assert dotted(path).split("_")[0] in places or f"import {library}" not in text, (path, library)
            assert dotted(path).split("_")[0] in places or f"from {library}" not in text, (path, library)
