"""The command line: commands of a few lines over `octify.jobs`."""

from __future__ import annotations

import contextlib
import json
import re
import sys
from collections.abc import Callable, Generator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from octify import cli_speed, report
from octify.calibrate_jobs import compare_checkpoint, convert_calibrated, list_sensitivities
from octify.cli_calibrate import (
    Distil,
    ImageSize,
    Labels,
    MaxLoss,
    Mean,
    Place,
    RecipeFile,
    Samples,
    Sensitivity,
    Std,
    Target,
    image_request,
    options_of,
)
from octify.errors import CalibrationError, CheckpointError, ModelError, OctifyError, RecipeError
from octify.jobs import (
    Request,
    convert_model,
    inspect_file,
    is_checkpoint,
    list_named_operators,
    list_rules,
    plan_model,
    verify_target,
)
from octify.plan_recipe import recipe_text_of
from octify.recipe import builtin_recipes, load_recipe, recipe_text
from octify.report_calibration import calibration_report, sensitivity_report, verdict_report
from octify.version import __version__
from octify.zoo import list_models

app = typer.Typer(
    help="Turns any PyTorch CNN into an octave-convolution CNN.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
recipes = typer.Typer(help="Recipes: which layer gets which alpha and how.", no_args_is_help=True)
app.add_typer(recipes, name="recipes")

MODEL_HELP = "torchvision or timm name (timm:resnet50), file.py:factory, package.module:factory"
Model = Annotated[str, typer.Argument(metavar="MODEL", help=MODEL_HELP, show_default=False)]
Alpha = Annotated[
    float | None, typer.Option(help="Share of low channels, 0 to 1; 0.25 unless the recipe says otherwise.")
]
RecipeName = Annotated[str | None, typer.Option(metavar="FILE|NAME", help="A recipe file, or one of octify's own.")]
Kernels = Annotated[str | None, typer.Option(metavar="fold|paper", help="fold: trained weights; paper: from scratch.")]
OperatorName = Annotated[str | None, typer.Option(help="octave, compconv or keep; `octify ops` lists them.")]
C0 = Annotated[int | None, typer.Option(help="compconv: input channels at which its depth grows; 128 is usual.")]
Size = Annotated[str | None, typer.Option(metavar="3x224x224", help="One image's shape; the network's own by default.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.")]
Overwrite = Annotated[bool, typer.Option(help="Replace the output if it is there.")]


@app.command()
def convert(
    model: Model,
    alpha: Alpha = None,
    recipe: RecipeName = None,
    kernels: Kernels = None,
    operator: OperatorName = None,
    c0: C0 = None,
    input_size: Size = None,
    pretrained: Annotated[bool, typer.Option(help="Download the library's trained weights.")] = False,
    weights: Annotated[Path | None, typer.Option(help="A state dict: .safetensors, or .pt (read safely).")] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="The checkpoint to write.")] = None,
    overwrite: Overwrite = False,
    seed: Annotated[int, typer.Option(help="For random weights and for the calibration.")] = 0,
    calibrate: Place = None,
    samples: Samples = 512,
    target: Target = None,
    max_loss: MaxLoss = None,
    distil: Distil = 0,
    mean: Mean = None,
    std: Std = None,
    size: ImageSize = None,
    recipe_out: RecipeFile = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Convert a network, and write it as a checkpoint."""
    with working(quiet or as_json) as step:
        shape = parse_size(input_size)
        request = Request(model, alpha, recipe, kernels, shape, pretrained, weights, seed, operator, c0)
        if calibrate is None:
            _need_images(target is not None or max_loss is not None or distil > 0 or recipe_out is not None)
            facts = convert_model(request, output, overwrite, step)
        else:
            images = image_request(calibrate, samples, mean, std, size)
            options = options_of(target, max_loss, samples, distil, seed)
            facts = convert_calibrated(request, images, options, output, overwrite, step)
        if recipe_out is not None:
            write_text(recipe_out, facts["recipe_text"], overwrite)
    render = report.conversion_report if calibrate is None else calibration_report
    print_facts(facts, lambda: render(facts, _weights(request)), as_json, quiet)
    finish([check["passed"] for check in facts["checks"]])


@app.command()
def plan(
    model: Model,
    alpha: Alpha = None,
    recipe: RecipeName = None,
    kernels: Kernels = None,
    operator: OperatorName = None,
    c0: C0 = None,
    input_size: Size = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write the plan as a recipe.")] = None,
    overwrite: Overwrite = False,
    weights: Annotated[Path | None, typer.Option(help="With --sensitivity: a state dict.")] = None,
    pretrained: Annotated[bool, typer.Option(help="With --sensitivity: the library's trained weights.")] = False,
    sensitivity: Sensitivity = False,
    calibrate: Place = None,
    samples: Samples = 128,
    mean: Mean = None,
    std: Std = None,
    size: ImageSize = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Show what convert would do, operation by operation; needs no memory for weights."""
    with working(quiet or as_json) as step:
        request = Request(model, alpha, recipe, kernels, parse_size(input_size), operator=operator, c0=c0)
        if sensitivity:
            _need_images(calibrate is None)
            trained = replace(request, weights=weights, pretrained=pretrained)
            rows = list_sensitivities(trained, image_request(str(calibrate), samples, mean, std, size), step)
    if sensitivity:
        print_facts({"sensitivities": rows}, lambda: sensitivity_report(rows), as_json, quiet)  # pyright: ignore
        return
    with working(quiet or as_json) as step:
        facts, decided, reading = plan_model(request, step)
        if output is not None:
            write_text(output, recipe_text_of(reading, decided), overwrite)
    print_facts(facts, lambda: report.plan_report(facts, decided), as_json, quiet)


@app.command()
def inspect(
    file: Annotated[Path, typer.Argument(help="A checkpoint of octify's.", show_default=False)],
    as_json: Json = False,
) -> None:
    """Show what a checkpoint holds."""
    with working(True):
        facts = inspect_file(file)
    print_facts(facts, lambda: report.checkpoint_report(facts), as_json)


@app.command()
def verify(
    target: Annotated[
        str, typer.Argument(metavar="FILE|MODEL", help=f"A checkpoint, or: {MODEL_HELP}", show_default=False)
    ],
    alpha: Alpha = None,
    recipe: RecipeName = None,
    kernels: Kernels = None,
    operator: OperatorName = None,
    c0: C0 = None,
    input_size: Size = None,
    source: Annotated[
        str | None, typer.Option(metavar="MODEL", help="The network of a checkpoint of your own.")
    ] = None,
    weights: Annotated[Path | None, typer.Option(help="With --calibrate: the source's state dict.")] = None,
    calibrate: Place = None,
    labels: Labels = False,
    samples: Samples = 512,
    mean: Mean = None,
    std: Std = None,
    size: ImageSize = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Run the invariants and oracles; exit 1 if one fails. With --calibrate, compare with the source on images."""
    if calibrate is not None:
        with working(quiet or as_json) as step:
            images = image_request(calibrate, samples, mean, std, size)
            verdict = compare_checkpoint(target, source, weights, images, labels, step)
        print_facts(verdict.to_dict(), lambda: verdict_report(verdict), as_json, quiet)
        return
    if is_checkpoint(target) and (alpha is not None or c0 is not None or recipe or kernels or operator or input_size):
        raise typer.BadParameter(
            "a checkpoint has its own recipe: leave out --alpha, --recipe, --kernels, --operator, --c0, --input-size"
        )
    with working(quiet or as_json) as step:
        request = Request(target, alpha, recipe, kernels, parse_size(input_size), operator=operator, c0=c0)
        checks = verify_target(request, source, step)
    facts = {"target": target, "passed": all(c.passed for c in checks), "checks": [asdict(c) for c in checks]}
    print_facts(facts, lambda: report.checks_table(checks), as_json, quiet)
    finish([check.passed for check in checks])


@app.command()
def models(
    pattern: Annotated[str, typer.Argument(help="A glob, or a part of the name.")] = "", as_json: Json = False
) -> None:
    """List the networks of torchvision and timm."""
    names = list_models(pattern)
    print_facts({"models": names}, lambda: report.names_table([[name] for name in names]), as_json)
    finish([bool(names)])


@app.command()
def ops(as_json: Json = False) -> None:
    """List the operators that take a layer's place, and the operations with a rule for bands; others stay dense."""
    facts = {"operators": list_named_operators(), "operations": list_rules()}
    print_facts(facts, lambda: report.tables(facts), as_json)


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


@app.callback(invoke_without_command=True)
def root(version: Annotated[bool, typer.Option("--version", help="Print the version.", is_eager=True)] = False) -> None:
    """Turns any PyTorch CNN into an octave-convolution CNN."""
    if version:
        typer.echo(f"octify {__version__}")
        raise typer.Exit()


@contextlib.contextmanager
def working(quiet: bool) -> Generator[Callable[[str], None], None, None]:
    """Shows progress on stderr, keeps stdout clean of what others print, and turns octify's errors into exit codes.

    1: the work failed; 2: what was asked for does not exist or cannot be read.
    """
    console = Console(stderr=True, quiet=quiet)
    try:
        with contextlib.redirect_stdout(sys.stderr), console.status("starting") as status:
            yield lambda text: status.update(text)
    except OctifyError as error:
        typer.echo(f"{type(error).__name__}: {error}", err=True)
        raise typer.Exit(2 if isinstance(error, ModelError | RecipeError) else 1) from None
    except KeyboardInterrupt:
        raise typer.Exit(130) from None


def print_facts(facts: dict[str, Any], render: Callable[[], Any], as_json: bool, quiet: bool = False) -> None:
    """Prints facts as JSON or as a table."""
    if as_json:
        sys.stdout.write(json.dumps(facts, indent=2) + "\n")
    elif not quiet:
        report.show(render())


def finish(passed: list[bool]) -> None:
    """Exit code 1 if something failed."""
    if not all(passed):
        raise typer.Exit(1)


def parse_size(text: str | None) -> tuple[int, ...] | None:
    """`3x224x224` as numbers.

    Raises:
        ModelError: it is no shape of this kind.
    """
    if text is None:
        return None
    if not re.fullmatch(r"[1-9]\d{0,5}(x[1-9]\d{0,5}){1,3}", text):
        raise ModelError(f'input size is "{text}": expected channels and sizes, such as 3x224x224')
    return tuple(int(part) for part in text.split("x"))


def write_text(path: Path, text: str, overwrite: bool) -> None:
    """Writes a file, an existing one only if that is allowed.

    Raises:
        CheckpointError: it is there already, or cannot be written.
    """
    if path.exists() and not overwrite:
        raise CheckpointError(f"{path} is there already: write elsewhere, or allow overwriting it (--overwrite)")
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise CheckpointError(f"{path} cannot be written: {error.strerror}") from error


def _need_images(lacking: bool) -> None:
    """Refuses options that do nothing without images."""
    if lacking:
        raise CalibrationError("this needs calibration images: add --calibrate SOURCE")


def _weights(request: Request) -> str:
    if request.pretrained:
        return "pretrained weights"
    return f"weights of {request.weights}" if request.weights else f"random weights (seed {request.seed})"


cli_speed.register(app, working, print_facts, parse_size)


def main() -> None:
    """The entry point."""
    app()
