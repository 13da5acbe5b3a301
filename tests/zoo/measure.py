"""Everything that the census asks of one network."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from octify.convert import example_of
from octify.graph import meta_copy
from octify.recipe import Recipe
from octify.trace import SIZED
from octify.zoo import build_model, input_shape
from tests.zoo import detect
from tests.zoo.compare import brief, tensors, try_run
from tests.zoo.constant import spread_gains
from tests.zoo.count import ALPHA, Counted, count, macs
from tests.zoo.describe import adapters, listed, octave_targets, opaque, stems, why_dense
from tests.zoo.draw import drawn_quickly
from tests.zoo.proofs import Proofs, step
from tests.zoo.row import LARGE, TOO_LARGE, Row

SMALL = (64, 96, 128, 160, 192)
FRAMES = 8  # of a clip, for the oracles


def measure(name: str, family: str = "", limit: float = float("inf"), tell: Callable[[Row], None] | None = None) -> Row:
    """Fills a row; whatever fails says so in it. Networks of more than `limit` parameters stay on meta.

    `tell` is given the row as it is before the oracles, which take most of the time.
    """
    library, short = name.split(":")
    row = Row(library, short, family)
    start = time.process_time()
    torch.manual_seed(0)
    try:
        with patch.object(torch, "batch_norm", _batch_norm):
            ghost = build_model(name, device="meta").eval()
            kind = _Detector if detect.is_detector(ghost) else _Census
            kind(row, name, ghost, limit).run(tell)
    except Exception as error:
        row.say("census", brief(error))
    row.seconds = f"{time.process_time() - start:.1f}"
    return row


def _batch_norm(x: Tensor, *rest: Any) -> Tensor:
    """On meta tensors a shape is all that is asked, and torch's own way there takes a third of the census.

    Where gradients are asked for, too, they must get through.
    """
    learns = torch.is_grad_enabled() and any(isinstance(y, Tensor) and y.requires_grad for y in (x, *rest))
    return torch.empty_like(x) if x.is_meta and not learns else _real_batch_norm(x, *rest)


_real_batch_norm = torch.batch_norm


class _Census:
    """One network's way through the census."""

    share: float | None = None  # the convolutions' share, where not all of the network counts for it

    def __init__(self, row: Row, name: str, ghost: nn.Module, limit: float) -> None:
        self.row = row
        self.name = name
        self.limit = limit
        self.ghost = ghost
        self.parameters = sum(parameter.numel() for parameter in ghost.parameters())

    def run(self, tell: Callable[[Row], None] | None) -> None:
        """Meta tensors first: whether it is a CNN, and what it costs; then real ones."""
        row = self.row
        row.parameters = str(self.parameters)
        self.ghost.requires_grad_(False)
        self.counted = self._count()
        row.convolution_share = f"{self.counted.share if self.share is None else self.share:.3f}"
        row.spatial_convolutions = str(self.counted.spatial)
        if not row.is_cnn:
            return
        real = self.parameters <= self.limit
        if not real:
            row.say("oracles", f"{TOO_LARGE}, {self.parameters / 1e6:.0f} M parameters are more than a worker holds")
        proofs = Proofs(row, self._build if real else lambda: self.ghost, self._ready)
        with step(row, "convert"):
            dtype = next(p.dtype for p in proofs.source.parameters())
            self.converted, self.decided = proofs.convert(Recipe.uniform(ALPHA), self._example(dtype))
            row.traced = self.decided.how
            row.converted = "yes" if self.decided.converted else "no"
            if not self.decided.converted:
                row.say("convert", f"nothing to convert: {listed(self.decided.reasons())}")
        if not row.converted:
            return
        self._describe()
        self._sizes(proofs)
        row.runs_default = row.runs_default or "no"
        if real:
            if tell is not None:
                tell(row)
            del self.converted  # the proofs let it go
            with step(row, "oracles"):
                self._prove(proofs)

    def _build(self) -> nn.Module:
        """The network with weights that show every branch, the same each time."""
        torch.manual_seed(0)
        with drawn_quickly() if self.parameters > LARGE else nullcontext():
            return spread_gains(build_model(self.name))

    def _ready(self, model: nn.Module) -> nn.Module:
        """A model for the images of the oracles."""
        return model

    def _count(self) -> Counted:
        self.shapes = input_shape(self.name)
        example = example_of(self.ghost, None)
        return count(self.ghost, lambda: self.ghost(*example))

    def _example(self, dtype: torch.dtype) -> tuple[Tensor, ...]:
        return tuple(torch.empty(2, *shape, device="meta", dtype=dtype) for shape in self.shapes)

    def _describe(self) -> None:
        row, decided = self.row, self.decided
        row.parameters_octave = str(sum(parameter.numel() for parameter in self.converted.parameters()))
        row.splits, row.merges = map(str, adapters(self.converted))
        row.opaque = opaque(decided)
        eligible, octave = self.counted.eligible(stems(decided)), octave_targets(decided)
        total = sum(call.macs for call in eligible)
        share = sum(call.macs for call in eligible if call.path in octave) / total if total else 1.0
        row.octave_share = f"{share:.3f}" if total else "-"
        row.ideal_ratio = f"{1 - sum(c.macs * (1 - c.ratio) for c in eligible) / self.counted.weighted:.3f}"
        if share < 0.9:
            row.say("share", why_dense(decided, [call for call in eligible if call.path not in octave]))

    # Sizes on meta tensors.

    def _sizes(self, proofs: Proofs) -> None:
        self.octave = meta_copy(self.converted).eval().requires_grad_(False)
        with step(self.row, "run at default size"):
            # What was traced for a batch of two runs with that only.
            shape = 2 if self.row.traced == "fixed" else 1
            inputs = [torch.empty(shape, *size, device="meta") for size in self.shapes]
            after = macs(lambda: self.octave(*inputs)) / shape
            self.row.runs_default = "yes"
            self.row.mac_ratio = f"{after / self.counted.weighted:.3f}"
        self._other_size(self.octave)

    def _other_size(self, ghost: nn.Module) -> None:
        """Another size on meta tensors: an odd one, or one of whole strides where the source takes no odd ones."""
        source = self.ghost.eval()
        self.row.runs_other = "-"
        for grow in ((45, 13), (32, 64)):
            inputs = [
                torch.empty(1, *shape[:-2], shape[-2] + grow[0], shape[-1] + grow[1], device="meta")
                for shape in self.shapes
            ]
            with torch.no_grad():
                if (wanted := try_run(source, inputs)) is None:
                    continue
                self.row.runs_other = "no"
                try:
                    given = ghost(*inputs)
                    fits = [t.shape for t in tensors(given)] == [t.shape for t in tensors(wanted)]
                    self.row.runs_other = "yes" if fits else "no"
                except Exception as error:
                    fixed = "" if self.row.traced == "symbolic" else f"{self.row.traced} trace: "
                    self.row.say("another size", fixed + brief(error))
                return

    # Real tensors.

    def _prove(self, proofs: Proofs) -> None:
        image = self._small_image()
        if image is None:
            self.row.say("oracles", "the source runs on none of the sizes")
            return
        proofs.run(image, lambda model: model(*image))

    def _small_image(self) -> tuple[Tensor, ...] | None:
        """Random images of the smallest size at which the source runs, one alone if that is its default of some hundred
        pixels; the traced size where that is fixed.
        """
        if self.row.traced not in (*SIZED, "parts"):
            return tuple(torch.rand(2, *shape) for shape in self.shapes)
        nets = (self.ghost, self.octave) if self.row.traced == "guarded" else (self.ghost,)
        for size, batch in (*((size, 2) for size in SMALL), (0, 1), (0, 2)):
            for frames in (FRAMES, 0) if len(self.shapes[0]) > 3 else (0,):
                image = tuple(torch.rand(batch, *_cut(shape, frames, size)) for shape in self.shapes)
                ghosts = [value.to("meta") for value in image]
                if all(try_run(net.train(mode), ghosts) is not None for net in nets for mode in (True, False)):
                    return image
        return None


def _cut(shape: tuple[int, ...], frames: int, size: int) -> tuple[int, ...]:
    """An image's shape with another size, and fewer frames; 0 keeps either."""
    times = (min(frames, shape[1]),) if frames else shape[1:-2]
    return (shape[0], *times, *((size, size) if size else shape[-2:]))


class _Detector(_Census):
    """Lists of images, parts instead of a whole, and a real run where others have meta tensors."""

    def _count(self) -> Counted:
        model = detect.shrink(build_model(self.name)).eval()
        image = detect.images(detect.SIZE, 1)
        ghost = meta_copy(model.backbone)
        # Its heads are Linear layers on a thousand boxes: what counts is the network that sees the image.
        self.share = count(ghost, lambda: ghost(image[0][None].to("meta"))).share
        self.calls: detect.Calls = {}
        handles = detect.record_calls(model, self.calls)
        found = count(model, lambda: model(image))
        for handle in handles:
            handle.remove()
        return found

    def _example(self, dtype: torch.dtype) -> tuple[Tensor, ...]:
        return (torch.empty(1, 3, detect.SIZE, detect.SIZE, device="meta", dtype=dtype),)

    def _build(self) -> nn.Module:
        return detect.shrink(super()._build())

    def _ready(self, model: nn.Module) -> nn.Module:
        return detect.shrink(model, self.side)

    def _sizes(self, proofs: Proofs) -> None:
        with step(self.row, "run at default size"), torch.no_grad():
            self.converted.eval()(detect.images(detect.SIZE, 1))
            self.row.runs_default = "yes"
            before, after = detect.parts_macs(proofs.source, self.converted, self.calls)
            self.row.mac_ratio = f"{1 - (before - after) / self.counted.weighted:.3f}"
        with step(self.row, "another size"), torch.no_grad():
            self.converted.transform.fixed_size = (301, 277)
            self.converted.eval()([torch.rand(3, 301, 277)])
            self.row.runs_other = "yes"

    def _prove(self, proofs: Proofs) -> None:
        images = detect.small_images(proofs.source)
        self.side = images[0].shape[-1]
        self._ready(proofs.converted)
        proofs.run((images,), lambda model: model(images, detect.targets(images)))
