"""The commands about recipes."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from octify import report
from octify.cli_base import MODEL_HELP, Alpha, Json, Overwrite, Size, parse_size, print_facts, working, write_text
from octify.jobs import Request
from octify.recipe import builtin_recipes, load_recipe, recipe_text

recipes = typer.Typer(help="Recipes: which layer gets which alpha and how.", no_args_is_help=True)


@recipes.command("ls")
def recipes_ls(as_json: Json = False) -> None:
    """List octify's own recipes."""
    rows = [{"name": name, "description": load_recipe(name).description.strip()} for name in builtin_recipes()]
    print_facts({"recipes": rows}, lambda: report.names_table([list(row.values()) for row in rows]), as_json)


@recipes.command("cat")
def recipes_cat(name: Annotated[str, typer.Argument(show_default=False)]) -> None:
    """Print one of octify's own recipes."""
    with working(True):
        text = recipe_text(name)
    sys.stdout.write(text)


@recipes.command("cp")
def recipes_cp(
    name: Annotated[str, typer.Argument(show_default=False)],
    file: Annotated[Path, typer.Argument(show_default=False)],
    overwrite: Overwrite = False,
) -> None:
    """Copy one of octify's own recipes into a file, to edit."""
    with working(True):
        write_text(file / f"{Path(name).name}.yaml" if file.is_dir() else file, recipe_text(name), overwrite)


@recipes.command("validate")
def recipes_validate(
    recipe: Annotated[str, typer.Argument(metavar="FILE|NAME", show_default=False)],
    model: Annotated[str | None, typer.Argument(metavar="[MODEL]", help=f"Check it against: {MODEL_HELP}")] = None,
    alpha: Alpha = None,
    input_size: Size = None,
) -> None:
    """Check a recipe, and whether its patterns match a network's layers."""
    with working(True):
        load_recipe(recipe, alpha)
        if model is not None:
            Request(model, alpha, recipe, None, parse_size(input_size)).read("meta")
    typer.echo(f"{recipe} is a valid recipe{f' for {model}' if model else ''}")
