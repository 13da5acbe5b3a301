"""The commands that measure and export: `octify bench` and `octify export`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from octify.bench import Settings, bench, only_faster, profile, reach_latency
from octify.checkpoint import check_target
from octify.cli_base import SourceName
from octify.conversion import Conversion
from octify.errors import BackendError, ModelError
from octify.export import export
from octify.jobs import Request, is_checkpoint, open_checkpoint
from octify.recipe import Recipe
from octify.report_speed import bundles_table, comparisons_table, profiles_table

Working = Callable[[bool], Any]
Shape = Callable[[str | None], tuple[int, ...] | None]
TABLES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "comparisons": comparisons_table,
    "profiles": profiles_table,
    "bundles": bundles_table,
}


def register(app: typer.Typer, working: Working, print_facts: Callable[..., None], parse_size: Shape) -> None:
    """Adds the commands to the program."""

    @app.command("bench")
    def bench_command(  # pyright: ignore[reportUnusedFunction]
        model: Annotated[str, typer.Argument(metavar="MODEL|FILE", show_default=False)],
        alpha: Annotated[float | None, typer.Option(help="Share of low channels.")] = None,
        recipe: Annotated[str | None, typer.Option(metavar="FILE|NAME", help="A recipe.")] = None,
        input_size: Annotated[str | None, typer.Option(metavar="3x224x224", help="One image's shape.")] = None,
        source: SourceName = None,
        backend: Annotated[str, typer.Option(help="eager,compile,onnxruntime,openvino: one or several.")] = "eager",
        threads: Annotated[int | None, typer.Option(help="CPU threads.")] = None,
        batch: Annotated[int, typer.Option(help="Images a call.")] = 1,
        device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
        dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
        channels_last: Annotated[bool | None, typer.Option(help="Memory format; the usually faster one.")] = None,
        train: Annotated[bool, typer.Option(help="Forward, backward and step.")] = False,
        optimize: Annotated[bool, typer.Option(help="Both networks through octify.optimize.")] = True,
        rounds: Annotated[int, typer.Option(help="Pairs to measure.")] = 30,
        by_kind: Annotated[bool, typer.Option("--profile", help="What each kind of operation takes.")] = False,
        layers: Annotated[bool, typer.Option("--layers", help="Each bundle of convolutions octave and dense.")] = False,
        only_faster: Annotated[bool, typer.Option("--only-faster", help="The same; keep what wins.")] = False,
        target_latency: Annotated[float | None, typer.Option(help="ms: the least alpha that gets there.")] = None,
        output: Annotated[Path | None, typer.Option("--output", "-o", help="The recipe to write.")] = None,
        overwrite: Annotated[bool, typer.Option(help="Replace the output if it is there.")] = False,
        as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
        quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.")] = False,
    ) -> None:
        """Measure dense against octave on this machine, call by call in turn."""
        with working(quiet or as_json) as step:
            request = Request(model, alpha, recipe, None, parse_size(input_size), source=source)
            options: dict[str, Any] = {
                "threads": threads,
                "device": device,
                "dtype": dtype,
                "channels_last": channels_last,
            }
            options |= {"train": train, "optimized": optimize}
            backends = [name.strip() for name in backend.split(",") if name.strip()]
            searches = layers or only_faster or target_latency is not None
            if searches and by_kind:
                raise BackendError("--profile counts what one pair of networks does: leave the options that choose out")
            if searches:
                settings = Settings(backend=backends[0], **options).checked()
                facts = _search(request, settings, target_latency, output, overwrite, rounds, step)
            else:
                dense, octave = _pair(request)
                measure, name = (profile, "profiles") if by_kind else (bench, "comparisons")
                found = measure(dense, octave, backends=backends, batch=batch, rounds=rounds, progress=step, **options)
                facts = {"model": model, name: [each.to_dict() for each in found]}
        table = next(table for name, table in TABLES.items() if name in facts)
        print_facts(facts, lambda: table(facts), as_json, quiet)

    @app.command("export")
    def export_command(  # pyright: ignore[reportUnusedFunction]
        checkpoint: Annotated[str, typer.Argument(metavar="FILE", help="A checkpoint.", show_default=False)],
        output: Annotated[Path, typer.Option("--output", "-o", help="The file to write.", show_default=False)],
        format: Annotated[str | None, typer.Option(metavar="onnx|pt2|openvino", help="By the ending, else.")] = None,
        multiple: Annotated[
            int, typer.Option(help="Take multiples of it only; at 32 ONNX Runtime is faster than at any size.")
        ] = 1,
        source: SourceName = None,
        overwrite: Annotated[bool, typer.Option(help="Replace the output if it is there.")] = False,
        as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
        quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.")] = False,
    ) -> None:
        """Write a checkpoint for another runtime: optimised, checked there, and free of octify."""
        with working(quiet or as_json) as step:
            step(f"exporting {checkpoint}")
            found: Any = open_checkpoint(checkpoint, source)[2] if source else checkpoint
            done = export(found, output, format, overwrite=overwrite, multiple=multiple)
        facts = {**asdict(done), "path": str(done.path)}
        open_axes = " and ".join(done.dynamic) or "nothing"
        steps = f" in steps of {done.multiple}" if "size" in done.dynamic and done.multiple > 1 else ""
        text = f"{done.path}: {done.format}, {open_axes} open{steps}, off by {done.error:.1e} of the greatest output"
        print_facts(facts, lambda: text, as_json, quiet)


def _pair(request: Request) -> tuple[Any, Any]:
    """The dense network, and the octave one made of it or loaded."""
    if is_checkpoint(request.model):
        header, source, octave = open_checkpoint(request.model, request.source)
        reading = Conversion.read(source, Recipe.uniform(0.0), header.origin.example())
        return reading.apply(reading.plan()), octave
    reading = request.read()
    octave = reading.run()
    plain = Conversion.read(reading.model, Recipe.uniform(0.0), reading.example)
    return plain.apply(plain.plan()), octave


def _search(
    request: Request,
    settings: Settings,
    target: float | None,
    output: Path | None,
    overwrite: bool,
    rounds: int,
    step: Callable[[str], None],
) -> dict[str, Any]:
    if is_checkpoint(request.model):
        raise ModelError(f"{request.model} is converted already: name its source to choose where to convert it")
    if output is not None:
        check_target(output, overwrite)
    reading = request.read()
    arguments = (reading.example, settings, min(rounds, 10), step)
    if target is None:
        found = only_faster(reading.model, reading.recipe, *arguments)
    else:
        found = reach_latency(reading.model, reading.recipe, target, *arguments)
    if output is not None:
        output.write_text(found.text, encoding="utf-8")
    return {
        "model": request.model,
        "dense_ms": found.dense_ms,
        "octave_ms": found.octave_ms,
        "bundles": [asdict(bundle) for bundle in found.bundles],
        "recipe": found.text,
        "output": output and str(output),
    }
