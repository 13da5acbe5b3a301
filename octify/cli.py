"""The command line: commands of a few lines over `octify.jobs`."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated

import typer

from octify import cli_speed, report
from octify.calibrate_jobs import LatencyRequest, compare_checkpoint, convert_calibrated, list_sensitivities
from octify.cli_base import (
    C0,
    MODEL_HELP,
    Alpha,
    Json,
    Kernels,
    Model,
    OperatorName,
    Overwrite,
    Quiet,
    RecipeName,
    Size,
    SourceName,
    finish,
    parse_size,
    print_facts,
    working,
    write_text,
)
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
    TargetLatency,
    Threads,
    image_request,
    options_of,
)
from octify.cli_recipes import recipes
from octify.errors import CalibrationError
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
app.add_typer(recipes, name="recipes")


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
    target_latency: TargetLatency = None,
    threads: Threads = None,
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
            wishes = (target, target_latency, max_loss, distil or None, recipe_out)
            _need_images(any(wish is not None for wish in wishes))
            facts = convert_model(request, output, overwrite, step)
        else:
            images = image_request(calibrate, samples, mean, std, size)
            options = options_of(target, max_loss, samples, distil, seed)
            wish = None if target_latency is None else LatencyRequest(target_latency, threads)
            facts = convert_calibrated(request, images, options, output, overwrite, step, wish)
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
    source: SourceName = None,
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
        shape = parse_size(input_size)
        request = Request(model, alpha, recipe, kernels, shape, operator=operator, c0=c0, source=source)
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
    source: SourceName = None,
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
        shape = parse_size(input_size)
        request = Request(target, alpha, recipe, kernels, shape, operator=operator, c0=c0, source=source)
        checks = verify_target(request, step)
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


@app.callback(invoke_without_command=True)
def root(version: Annotated[bool, typer.Option("--version", help="Print the version.", is_eager=True)] = False) -> None:
    """Turns any PyTorch CNN into an octave-convolution CNN."""
    if version:
        typer.echo(f"octify {__version__}")
        raise typer.Exit()


def _need_images(lacking: bool) -> None:
    """Refuses options that do nothing without images."""
    if lacking:
        raise CalibrationError("this needs calibration images: add --calibrate SOURCE")


def _weights(request: Request) -> str:
    if request.pretrained:
        return "pretrained weights"
    if request.weights:
        return f"weights of {request.weights}"
    return f"random weights (seed {request.seed})" if request.weights_are_random else "its factory's weights"


cli_speed.register(app, working, print_facts, parse_size)


def main() -> None:
    """The entry point."""
    app()
