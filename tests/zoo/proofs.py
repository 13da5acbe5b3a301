"""What is proven of a converted network on real tensors: the oracles, save and load, and a train step.

A network of a billion parameters goes through in the memory of three copies: weights that a conversion leaves as they
are stay the source's, and what is done is let go.
"""

from __future__ import annotations

import gc
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

import octify.parts
import octify.rewrite
from octify import load, save
from octify.conversion import Conversion
from octify.convert import apply_plan
from octify.errors import TraceError
from octify.flows import Flows
from octify.graph import meta_copy
from octify.oracles import first_uneven
from octify.origin import origin_of, set_origin
from octify.plan import Plan, make_plan
from octify.recipe import Recipe
from octify.trace import trace_model
from tests.zoo.compare import (
    NUDGE,
    Forward,
    brief,
    equal,
    flat_error,
    flattened,
    home,
    map_tensors,
    part_inputs,
    recoloured,
    run,
    sensitivity,
    with_gradient,
)
from tests.zoo.row import LARGE, Row

CLOSE = 1e-4
PLAIN = 1e-2  # an error that is more than rounding's, which makes maps uneven as well, but not at every colour
MANY = 3 * 192 * 192  # numbers in an image, above which a train step takes long
COLOURS = 4  # tried where rounding is in the way


@contextmanager
def step(row: Row, name: str) -> Iterator[None]:
    """What fails inside is said in the row."""
    try:
        yield
    except Exception as error:
        row.say(name, brief(error))


@contextmanager
def shared_weights() -> Iterator[None]:
    """Conversions take over the source's tensors that they leave as they are, instead of copies of them."""
    with (
        patch.object(octify.rewrite, "clone_tensor", _itself),
        patch.object(octify.parts, "clone_tensor", _itself),
    ):
        yield


def _itself(tensor: Tensor) -> Tensor:
    return tensor


@dataclass
class _Part:
    """A part of a network ("" is the whole) that differs on a constant image, and how it was traced."""

    path: str
    how: str
    example: Any
    image: bool
    flat: Any
    error: float


class Proofs:
    """The proofs of one network, in an order in which each needs less than the one before.

    `build` makes the source with its weights, `ready` prepares a network for the oracles' images.
    """

    def __init__(self, row: Row, build: Callable[[], nn.Module], ready: Callable[[nn.Module], nn.Module]) -> None:
        self.row, self.build, self.ready = row, build, ready
        self.source = build().eval()
        self.unequal: list[_Part] = []
        self.trained: set[str] | None = None  # the source's parameters that a train step reaches

    def convert(self, recipe: Recipe, example: tuple[Any, ...]) -> tuple[nn.Module, Plan]:
        """Converts as `octify.convert` does."""
        self.recipe = recipe
        self.reading = Conversion.read(self.source, recipe, example)
        self.converted, decided = self._again(recipe)
        self.origin = origin_of(self.converted)
        return self.converted, decided

    def _again(self, recipe: Recipe) -> tuple[nn.Module, Plan]:
        """A model is traced once, and converted for each recipe."""
        reading = self.reading.again(recipe)
        decided = reading.plan()
        with shared_weights():
            return reading.apply(decided), decided

    def run(self, image: tuple[Any, ...], forward: Forward) -> None:
        """Fills the row's columns; the nets are gone afterwards. `forward` is a train step's."""
        self._oracle1(image)
        self._oracle2(image)
        with step(self.row, "train step"):
            self.trained = self._reached(self.source, image, forward, on_meta=True)
        del self.source, self.reading
        self._let_go()
        self._save_load(image)
        self._train_step(image, forward)
        del self.converted
        self._let_go()
        self._oracle2_again()

    def _let_go(self) -> None:
        """Graphs are cycles, which only a collection lets go; a small network's can wait."""
        if int(self.row.parameters) > LARGE:
            gc.collect()

    def _reached(self, model: nn.Module, image: tuple[Any, ...], forward: Forward, *, on_meta: bool) -> set[str]:
        """Which parameters a train step reaches; meta tensors tell as well, where the model runs on them."""
        if on_meta and all(isinstance(value, Tensor) for value in image):
            with suppress(Exception):
                ghosts = [value.to("meta") for value in image]
                return with_gradient(meta_copy(model).train(), lambda ghost: ghost(*ghosts))
        return with_gradient(model.train(), forward)

    def _oracle1(self, image: tuple[Any, ...]) -> None:
        with step(self.row, "oracle 1"):
            same = self._again(Recipe.uniform(0.0))[0].eval()
            source = self.ready(self.source.eval())
            with torch.no_grad():
                bits = equal(run(source, image), run(self.ready(same), image))
            keys = list(same.state_dict()) == list(source.state_dict())
            self.row.oracle1 = "exact" if bits and keys else "no"
            if self.row.oracle1 == "no":
                self.row.say("oracle 1", "the output differs" if not bits else "the keys differ")
        self.row.oracle1 = self.row.oracle1 or "no"

    def _oracle2(self, image: tuple[Any, ...]) -> None:
        self.worst, unequal = 0.0, list[_Part]()
        with step(self.row, "oracle 2"):
            parts = self.reading.parts
            flats = part_inputs(self.source, [path for path, _ in parts], flattened(image))
            for path, flows in parts:
                nets = [net.eval().get_submodule(path) for net in (self.source, self.converted)]
                error = flat_error(*nets, flats[path])
                if error < CLOSE:
                    self.worst = max(self.worst, error)
                else:
                    trace = flows.trace
                    unequal.append(_Part(path, trace.how, trace.inputs, flows.image, flats[path], error))
            self.row.oracle2, self.unequal = f"{self.worst:.1e}", unequal
        self.row.oracle2 = self.row.oracle2 or "failed"

    def _save_load(self, image: tuple[Any, ...]) -> None:
        with step(self.row, "save and load"), tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "net.safetensors"
            set_origin(self.converted, self.origin.named(self.row.key))
            save(self.converted.eval(), path)
            again = self.ready(load(path).eval())
            with torch.no_grad():
                same = equal(run(self.converted, image), run(again, image))
            self.row.save_load = "equal" if same else "differs"
        self.row.save_load = self.row.save_load or "failed"

    def _train_step(self, image: tuple[Any, ...], forward: Forward) -> None:
        """With real numbers, but for large networks and images of a default size."""
        if self.trained is None:
            self.row.train_step = "no"
            return
        with step(self.row, "train step"):
            pixels = max((value[0].numel() for value in image if isinstance(value, Tensor)), default=0)
            large = int(self.row.parameters) > LARGE or pixels > MANY
            given = self._reached(self.converted, image, forward, on_meta=large)
            homes = {home(name) for name in self.trained}
            if not homes:
                raise AssertionError("a train step reaches no parameter of the source")
            missing = [
                name for name, _ in self.converted.named_parameters() if name not in given and home(name) in homes
            ]
            self.row.train_step = "no" if missing else "yes"
            if missing:
                self.row.say("train step", f"no gradient for {', '.join(missing[:4])} ({len(missing)} in all)")
        self.row.train_step = self.row.train_step or "no"

    def _oracle2_again(self) -> None:
        """Rounding, or a fault? The parts that differ once more in double precision, where rounding is 1e-16."""
        if not self.unequal:
            return
        self.row.oracle2 = ""
        with step(self.row, "oracle 2"):
            model = self.build()
            for part in self.unequal:
                source = model.get_submodule(part.path).double().eval()
                self.worst = max(self.worst, self._in_double(source, part))
            self.row.oracle2 = f"{self.worst:.1e}"
        self.row.oracle2 = self.row.oracle2 or "failed"

    def _in_double(self, source: nn.Module, part: _Part) -> float:
        """The error of one part; of several colours the best one: norms by few channels divide by next to nothing at
        some, while a fault shows at all.
        """
        try:
            trace = trace_model(source, map_tensors(part.example, Tensor.double), (part.how,))
        except TraceError:  # it makes single precision of its own
            where = first_uneven(source.float(), *part.flat)
            self.row.say("oracle 2", f"{where} depends on position, in single precision alone" if where else "a fault")
            return part.error
        flows = Flows(trace, self.recipe, f"{part.path}." if part.path else "", part.image)
        with shared_weights():
            octave = apply_plan(flows, make_plan(flows)).eval()
        error, best, where = float("inf"), part.flat, ""
        for seed in range(COLOURS):
            colour = map_tensors(part.flat, recoloured(seed))
            if (found := flat_error(source, octave, colour)) < error:
                error, best = found, colour
            where = "" if error < CLOSE else first_uneven(source, *best)
            if error < CLOSE or (where and error > PLAIN):
                break
        if error < CLOSE:
            self.row.say("oracle 2", f"rounding, {part.error:.1e} in single precision")
        elif (moved := sensitivity(source, best)) >= error / 4:
            self.row.say("oracle 2", f"the source itself moves by {moved:.1e} when a constant image does by {NUDGE:g}")
        elif where:
            self.row.say("oracle 2", f"{where} depends on position: its map of a constant image is uneven")
        else:
            self.row.say("oracle 2", "a fault")
        return error
