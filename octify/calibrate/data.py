"""Calibration images as chunks of a model's inputs."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor

from octify.calibrate.walk import Chunk, split_chunks, walk_dense
from octify.errors import CalibrationError
from octify.graph import sharing_copy
from octify.trace import Trace

Batches = Tensor | Iterable[Any]
FEWEST = 4
CHUNK = 32  # images
HELD_BACK = 10  # every tenth image judges statistics and distillation, and is not fitted to


@dataclass(frozen=True)
class Images:
    """The dense network in eval mode, the chunks to fit to and those held back."""

    trace: Trace
    fit: list[Chunk]
    held: list[Chunk]
    pass_seconds: float  # of the dense network over all images, about

    @property
    def count(self) -> int:
        """How many images there are."""
        return sum(len(chunk[0]) for chunk in (*self.fit, *self.held))

    def some(self, count: int) -> list[Chunk]:
        """The first `count` images to fit to."""
        return _first(self.fit, count)

    def apart(self, fit: int, judges: int) -> tuple[list[Chunk], list[Chunk]]:
        """At most so many images to fit to and to judge by, no image in both; at least a third of all are to judge."""
        fit = min(fit, 2 * self.count // 3, sum(len(chunk[0]) for chunk in self.fit))
        rest: list[Chunk] = []
        seen = 0
        for chunk in self.fit:
            if seen + len(chunk[0]) > fit:
                rest.append(tuple(value[max(0, fit - seen) :] for value in chunk))
            seen += len(chunk[0])
        return self.some(fit), _first([*self.held, *rest], judges)


def _first(chunks: Sequence[Chunk], count: int) -> list[Chunk]:
    found: list[Chunk] = []
    for chunk in chunks:
        if count > 0:
            found.append(tuple(value[:count] for value in chunk))
        count -= len(chunk[0])
    return found


def read_images(trace: Trace, batches: Sequence[Any], samples: int | None) -> Images:
    """Batches (tensors, or tuples whose first entries are the model's inputs) as chunks, on the model's device.

    Raises:
        CalibrationError: too few images, of another size than the model takes, or not finite.
    """
    wanted = [value for value in trace.inputs if isinstance(value, Tensor)]
    parts = collect_inputs(batches, len(wanted))
    device = next((tensor.device for tensor in trace.model.parameters()), torch.device("cpu"))
    inputs = [torch.cat(column)[:samples] for column in zip(*parts, strict=True)] if parts else []
    count = len(inputs[0]) if inputs else 0
    if count < FEWEST:
        raise CalibrationError(f"{count} calibration images: expected at least {FEWEST}, better some dozens")
    inputs = [_checked(value, like).to(device) for value, like in zip(inputs, wanted, strict=True)]
    still = replace(trace, model=sharing_copy(trace.model).eval())
    seconds = _try(still, tuple(value[:FEWEST] for value in inputs)) * count / FEWEST
    held = torch.arange(count) % HELD_BACK == HELD_BACK - 1
    if not held.any():
        held[-1] = True
    rows = [[value[~held] for value in inputs], [value[held] for value in inputs]]
    return Images(still, split_chunks(rows[0], CHUNK), split_chunks(rows[1], CHUNK), seconds)


def take_batches(batches: Batches, samples: int | None) -> list[Any]:
    """So many batches that there are `samples` images, if there are; an iterator is read once."""
    found: list[Any] = []
    count = 0
    for batch in (batches,) if isinstance(batches, Tensor) else batches:
        found.append(batch)
        first: Any = batch if isinstance(batch, Tensor) else next(iter(batch), None)
        count += len(first) if isinstance(first, Tensor) and first.dim() else 1
        if samples is not None and count >= samples:
            break
    return found


def example_of_batches(batches: Sequence[Any], inputs: int = 1) -> tuple[Tensor, ...] | None:
    """The first batch's inputs, so many, on the meta device with a batch of one."""
    first: Any = batches[0] if batches else None
    given: list[Any] = [first] if isinstance(first, Tensor) else list(first or ())[: max(1, inputs)]
    if not given or not all(isinstance(value, Tensor) and value.dim() >= 2 for value in given):
        return None
    return tuple(torch.empty((1, *value.shape[1:]), dtype=value.dtype, device="meta") for value in given)


def collect_inputs(batches: Sequence[Any], wanted: int) -> list[tuple[Tensor, ...]]:
    """The model's inputs in each batch, without what comes behind them (labels).

    Raises:
        CalibrationError: a batch is something else, or batches differ in their images' size.
    """
    found: list[tuple[Tensor, ...]] = []
    for batch in batches:
        given: Sequence[Any] = (batch,) if isinstance(batch, Tensor) else batch
        inputs = tuple(given[:wanted]) if isinstance(given, (tuple, list)) else ()
        if len(inputs) < wanted or not all(isinstance(value, Tensor) for value in inputs):
            raise CalibrationError(
                f"a calibration batch is {type(batch).__name__}: expected a tensor, or a tuple that begins with the "
                f"model's {wanted} input(s)"
            )
        found.append(cast("tuple[Tensor, ...]", inputs))
    for column in zip(*found, strict=True):
        sizes = list(dict.fromkeys("x".join(map(str, value.shape[1:])) for value in column))
        if len(sizes) > 1:
            raise CalibrationError(f"calibration images are {sizes[0]} and {sizes[1]}: expected one size")
    return found


def _checked(value: Tensor, like: Tensor) -> Tensor:
    if value.dim() != like.dim() or value.shape[1] != like.shape[1]:
        shapes = ["x".join(map(str, tensor.shape[1:])) for tensor in (value, like)]
        raise CalibrationError(f"calibration images are {shapes[0]}: expected {shapes[1]}, as the model's example")
    if value.is_floating_point() != like.is_floating_point():
        raise CalibrationError(f"calibration images are {value.dtype}: expected {like.dtype}, prepared as in training")
    if value.is_floating_point() and not bool(value.isfinite().all()):
        raise CalibrationError("calibration images hold values that are not finite (NaN or infinite)")
    return value.to(like.dtype)


def _try(trace: Trace, inputs: tuple[Tensor, ...]) -> float:
    """Runs the dense network once, and says how many seconds that takes."""
    start = time.perf_counter()
    try:
        outputs = walk_dense(trace, [inputs]).run()
    except RuntimeError as error:
        shape = "x".join(map(str, inputs[0].shape[1:]))
        raise CalibrationError(
            f"the model does not run on calibration images of {shape}: {str(error).splitlines()[0]}"
        ) from error
    if not float_tensors(outputs):
        raise CalibrationError("the dense model gives no tensor with a row an image: there is nothing to compare")
    if not all(bool(tensor.isfinite().all()) for tensor in float_tensors(outputs)):
        raise CalibrationError("the dense model gives values that are not finite (NaN or infinite) on these images")
    return time.perf_counter() - start


def float_tensors(tree: Any) -> list[Tensor]:
    """The floating-point tensors of a model's output, whatever it is wrapped in, but for single numbers (losses)."""
    if isinstance(tree, Tensor):
        return [tree] if tree.is_floating_point() and tree.dim() else []
    if isinstance(tree, dict):
        return [found for value in cast("dict[Any, Any]", tree).values() for found in float_tensors(value)]
    if isinstance(tree, (tuple, list)):
        return [found for value in cast("list[Any]", tree) for found in float_tensors(value)]
    return []


def output_loss(dense: Any, octave: Any) -> float:
    """The squared error of a model's outputs, as a share of their variance over images; the mean over tensors."""
    pairs = zip(_joined(dense), _joined(octave), strict=True)
    shares = [float((y - x).square().sum() / _spread(x).clamp_min(1e-12)) for x, y in pairs]
    return sum(shares) / max(len(shares), 1)


def spreads_of(outputs: Any) -> list[float]:
    """What squared errors of each output tensor are measured by: an image's part of its spread over images."""
    return [max(float(_spread(x)) / len(x), 1e-12) for x in _joined(outputs)]


def _spread(x: Tensor) -> Tensor:
    """The squared deviation from the mean over images; of a single image, its squares."""
    return (x - x.mean(0) if len(x) > 1 else x).square().sum()


def _joined(chunks: Sequence[Any]) -> list[Tensor]:
    return [torch.cat(list(parts)).double() for parts in zip(*map(float_tensors, chunks), strict=True)]
