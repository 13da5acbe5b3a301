"""What the commands share: their common options, progress, errors as exit codes, and output."""

from __future__ import annotations

import contextlib
import json
import math
import re
import sys
import warnings
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Annotated, Any, cast

import typer
from rich.console import Console

from octify import report
from octify.errors import CalibrationWarning, CheckpointError, ModelError, OctifyError, RecipeError

MODEL_HELP = "torchvision or timm name (timm:resnet50), file.py:factory, package.module:factory"
Model = Annotated[str, typer.Argument(metavar="MODEL", help=MODEL_HELP, show_default=False)]
Alpha = Annotated[
    float | None, typer.Option(help="Share of low channels, 0 to 1; 0.25 unless the recipe says otherwise.")
]
RecipeName = Annotated[str | None, typer.Option(metavar="FILE|NAME", help="A recipe file, or one of octify's own.")]
Kernels = Annotated[
    str | None, typer.Option(metavar="sharp|fold|paper", help="sharp, fold: trained weights; paper: from scratch.")
]
OperatorName = Annotated[str | None, typer.Option(help="octave, compconv or keep; `octify ops` lists them.")]
C0 = Annotated[int | None, typer.Option(help="compconv: input channels at which its depth grows; 128 is usual.")]
Size = Annotated[str | None, typer.Option(metavar="3x224x224", help="One image's shape; the network's own by default.")]
SourceName = Annotated[str | None, typer.Option(metavar="MODEL", help="The network of a checkpoint of your own.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.")]
Overwrite = Annotated[bool, typer.Option(help="Replace the output if it is there.")]


@contextlib.contextmanager
def working(quiet: bool) -> Generator[Callable[[str], None], None, None]:
    """Shows progress on stderr, keeps stdout clean of what others print, and turns octify's errors into exit codes.

    1: the work failed; 2: what was asked for does not exist or cannot be read. Octify's warnings stay on the screen.
    """
    console = Console(stderr=True, quiet=quiet)
    try:
        with (
            contextlib.redirect_stdout(sys.stderr),
            console.status("starting") as status,
            warnings.catch_warnings(),
        ):
            _show_warnings(console)
            yield lambda text: status.update(text)
    except OctifyError as error:
        typer.echo(f"{type(error).__name__}: {error}", err=True)
        raise typer.Exit(2 if isinstance(error, ModelError | RecipeError) else 1) from None
    except KeyboardInterrupt:
        raise typer.Exit(130) from None


def _show_warnings(console: Console) -> None:
    """Prints octify's own warnings as sentences, and leaves others to Python."""
    others = warnings.showwarning

    def show(message: Warning | str, category: type[Warning], *rest: Any, **more: Any) -> None:
        if issubclass(category, CalibrationWarning):
            console.print(f"warning: {message}", style="bold yellow", highlight=False)
        else:
            others(message, category, *rest, **more)

    warnings.showwarning = show
    warnings.simplefilter("always", CalibrationWarning)


def print_facts(facts: dict[str, Any], render: Callable[[], Any], as_json: bool, quiet: bool = False) -> None:
    """Prints facts as JSON or as a table."""
    if as_json:
        sys.stdout.write(json.dumps(_plain(facts), indent=2, allow_nan=False) + "\n")
    elif not quiet:
        report.show(render())


def _plain(value: Any) -> Any:
    """JSON has no word for what is not finite."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in cast("dict[str, Any]", value).items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in cast("list[Any]", value)]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


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
