"""What the commands do with calibration images: convert by them, compare on them, say what each layer would lose."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from octify.bench import Settings, measure_latency
from octify.calibrate.data import example_of_batches, read_images
from octify.calibrate.levers import find_levers
from octify.calibrate.parts import compare_parts, record_parts
from octify.calibrate.rank import channel_loss
from octify.calibrate.run import RANKING_IMAGES, Calibration, Options
from octify.calibrate.sensitivity import SHARES, measure_curves
from octify.calibrate.source import Source, load_source
from octify.calibrate.verdict import Verdict, compare
from octify.checkpoint import check_target, load, read_checkpoint, save, source_in
from octify.conversion import Conversion
from octify.convert import calibrate_by_parts, finish, plan_of
from octify.errors import CalibrationError, CalibrationWarning
from octify.flows import Flows
from octify.graph import named_modules
from octify.inputs import Preprocessing
from octify.jobs import Request, describe, is_checkpoint, name_source
from octify.module import OctaveModule
from octify.parts import Parts
from octify.plan import make_plan
from octify.verify import quick_checks
from octify.zoo import build_model, preprocessing, resolve

Step = Callable[[str], None]


@dataclass(frozen=True)
class ImageRequest:
    """Where images come from and how they are prepared; `size` is (height, width)."""

    place: str
    samples: int = 512
    mean: Sequence[float] | None = None
    std: Sequence[float] | None = None
    size: tuple[int, int] | None = None

    def load(self, known: Preprocessing | None) -> Source:
        """The images.

        Raises:
            CalibrationError: they cannot be read, or nothing says how they are prepared.
        """
        options: dict[str, Any] = {"mean": self.mean, "std": self.std, "size": self.size}
        return load_source(self.place, known, samples=self.samples, **options)


@dataclass(frozen=True)
class LatencyRequest:
    """The ms that a network shall take for one image, eager, on so many CPU threads."""

    ms: float
    threads: int | None = None

    def measured(self, reading: Conversion, options: Options) -> Options:
        """The options with what was measured of the network.

        Raises:
            BackendError: nothing gets faster here.
            CalibrationError: a target is named already.
        """
        if options.target is not None or options.max_loss is not None:
            raise CalibrationError("--target-latency stands for --target and --max-loss: name one of them")
        settings = Settings(threads=self.threads)
        table = measure_latency(reading.model, reading.recipe, reading.example, settings, progress=options.progress)
        return replace(options, target=self.ms / table.dense_ms, latency=table)


def convert_calibrated(
    request: Request,
    images: ImageRequest,
    options: Options,
    output: Path | None,
    overwrite: bool,
    step: Step,
    wish: LatencyRequest | None = None,
) -> dict[str, Any]:
    """Converts by calibration images, and writes a checkpoint if there is an output.

    Raises:
        OctifyError: whatever is wrong; nothing is written then.
    """
    start = time.perf_counter()
    if output is not None:
        check_target(output, overwrite)
    _warn_of_random(request)
    source, reading = _read(request, images, step)
    options = replace(options, progress=step)
    if wish is not None:
        options = wish.measured(reading, options)
        reading = reading.again(options.latency.recipe) if options.latency is not None else reading
    if reading.whole:
        calibration = Calibration(reading.flows, source.batches, options)
        converted: nn.Module = calibration.run(lambda flows: finish(flows, make_plan(flows)))
        parts: Parts = [("", reading.flows.again(calibration.recipe))]
        report = calibration.report
    else:
        converted, parts, report = calibrate_by_parts(
            reading.model, reading.parts, source.batches, options, reading.example
        )
    chosen = Conversion(reading.model, parts[0][1].recipe, reading.example, parts, reading.whole)
    name_source(converted, request.model)
    step("checking")
    # Fitted kernels follow the images, not the fold's identities: checked is the conversion that they went into.
    checks = quick_checks(chosen, chosen.apply(chosen.plan()))
    facts = describe(chosen, plan_of(converted), converted, request)
    if output is not None:
        save(converted, output, overwrite)
    facts["calibration"] = report.to_dict()
    facts["recipe_text"] = chosen.recipe.to_yaml()
    seconds = round(time.perf_counter() - start, 2)
    return {**facts, "checks": [asdict(c) for c in checks], "seconds": seconds, "output": output and str(output)}


def compare_checkpoint(
    file: str, source: str | None, weights: Path | None, images: ImageRequest, labels: bool, step: Step
) -> Verdict:
    """A checkpoint beside its source network, on images.

    `source` names the network of a checkpoint that was made from a user's own; without `weights` the library's trained
    ones are taken. `labels` says that the images' labels are the network's classes.

    Raises:
        OctifyError: whatever keeps them from being compared.
    """
    if not is_checkpoint(file):
        raise CalibrationError(f"{file} is no checkpoint: images compare a converted network with its source")
    header, _ = read_checkpoint(file)
    step("building the source")
    name = source or source_in(header, Path(file))
    trained = weights is None and resolve(name).library in ("torchvision", "timm")
    model = build_model(name, pretrained=trained, weights=weights)
    loaded = load(file, model)
    found = images.load(preprocessing(model))
    if labels and found.labels is None:
        raise CalibrationError(
            f"{images.place}: has no labels; expected one subfolder per class, or images with labels"
        )
    step("comparing")
    if header.plan.how == "parts":
        paths = [path for path, module in named_modules(loaded) if isinstance(module, OctaveModule)]
        return compare_parts(model, loaded, paths, found.batches, len(header.origin.inputs))
    return compare(model, loaded, found.batches, found.labels if labels else None)


def list_sensitivities(request: Request, images: ImageRequest, step: Step) -> list[dict[str, Any]]:
    """What each bundle of layers would lose at several alphas: the outputs' error as a share of their variance.

    Raises:
        OctifyError: whatever keeps that from being measured.
    """
    source, reading = _read(request, images, step)
    given: dict[str, Sequence[Any]] = {"": source.batches}
    if not reading.whole:
        paths = [path for path, _ in reading.parts]
        given = dict(record_parts(reading.model, paths, source.batches, len(reading.example)))
    return [
        row
        for path, flows in reading.parts
        if path in given
        for row in _sensitivities(path, flows, given[path], images, step)
    ]


def _sensitivities(
    path: str, flows: Flows, batches: Sequence[Any], images: ImageRequest, step: Step
) -> Iterator[dict[str, Any]]:
    data = read_images(flows.trace, batches, images.samples)
    felt = channel_loss(flows, data.trace, data.some(RANKING_IMAGES))
    levers = find_levers(flows, felt)
    for lever, curve in zip(levers, measure_curves(flows, data, levers, step, SHARES), strict=True):
        yield {
            "layers": [f"{path}.{name}" if path else name for name in lever.writers],
            "channels": sum(map(len, lever.steps)),
            "loss": {f"{share:g}": curve.at(share * len(lever.steps)) for share in SHARES},
        }


def _warn_of_random(request: Request) -> None:
    if request.weights_are_random:
        text = (
            f"the weights of {request.model} are random, there is nothing to keep: add --pretrained or --weights FILE"
        )
        warnings.warn(text, CalibrationWarning, stacklevel=2)


def _read(request: Request, images: ImageRequest, step: Step) -> tuple[Source, Conversion]:
    """The images, and the source traced at their size."""
    step(f"reading {images.place}")
    spec = resolve(request.model)
    own = spec.library in ("file", "module")  # a user's factory may load weights, which it cannot on meta
    source = images.load(preprocessing(request.build() if own else spec))
    example = example_of_batches(source.batches)
    step(f"building and tracing {request.model}")
    return source, (replace(request, input_size=tuple(example[0].shape[1:])) if example else request).read()
