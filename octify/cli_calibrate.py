"""The command line's options about calibration images."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer

from octify.calibrate.run import Options
from octify.calibrate_jobs import ImageRequest
from octify.errors import CalibrationError

PLACE = "A folder of images, a .npy or .pt file, or module:function that gives batches."
Place = Annotated[str | None, typer.Option("--calibrate", metavar="SOURCE", help=PLACE)]
Samples = Annotated[int, typer.Option(min=1, help="Use so many images of SOURCE.")]
Target = Annotated[
    float | None, typer.Option(min=0.05, max=1, help="Multiply-adds against dense; chooses alpha layer by layer.")
]
TargetLatency = Annotated[
    float | None, typer.Option(metavar="MS", min=0.001, help="The same by latencies measured here, for this many ms.")
]
Threads = Annotated[int | None, typer.Option(min=1, help="With --target-latency: CPU threads.")]
MaxLoss = Annotated[
    float | None, typer.Option(min=0, help="The outputs' squared error against their variance; as cheap as it allows.")
]
Distil = Annotated[int, typer.Option(metavar="STEPS", min=0, help="Label-free training steps on the same images.")]
Mean = Annotated[str | None, typer.Option(metavar="0.485,0.456,0.406", help="Instead of the model's own.")]
Std = Annotated[str | None, typer.Option(metavar="0.229,0.224,0.225", help="Instead of the model's own.")]
ImageSize = Annotated[str | None, typer.Option("--size", metavar="224x224", help="Images' height and width.")]
RecipeFile = Annotated[Path | None, typer.Option(help="Write what the calibration chose as a recipe.")]
Sensitivity = Annotated[
    bool, typer.Option("--sensitivity", help="With --calibrate: what each layer would lose at several alphas.")
]
Labels = Annotated[bool, typer.Option("--labels", help="With --calibrate: top-1 and top-5, from SOURCE's own labels.")]


def image_request(place: str, samples: int, mean: str | None, std: str | None, size: str | None) -> ImageRequest:
    """What the options say about images.

    Raises:
        CalibrationError: one of them is not written as expected.
    """
    side = None
    if size is not None:
        if not re.fullmatch(r"[1-9]\d{0,4}(x[1-9]\d{0,4})?", size):
            raise CalibrationError(f'--size is "{size}": expected height and width, such as 224x224')
        lengths = [int(part) for part in size.split("x")]
        side = (lengths[0], lengths[-1])
    return ImageRequest(place, samples, _numbers("--mean", mean), _numbers("--std", std), side)


def _numbers(option: str, text: str | None) -> tuple[float, ...] | None:
    if text is None:
        return None
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise CalibrationError(f'{option} is "{text}": expected a number per channel, such as 0.5,0.5,0.5') from None


def options_of(target: float | None, max_loss: float | None, samples: int, distil: int, seed: int) -> Options:
    """What the options say about the calibration."""
    return Options(target=target, max_loss=max_loss, samples=samples, distil=distil, seed=seed)
