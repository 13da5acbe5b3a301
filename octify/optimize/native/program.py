"""A part of a network that octify's own kernels run in one call."""

from __future__ import annotations

import itertools
import threading
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from octify.errors import BackendError
from octify.optimize.native.library import ALIGN, Library, load_library, why_not
from octify.optimize.native.sizes import Halved, Like
from octify.optimize.native.steps import Kind, Shape, Sizes, Step
from octify.optimize.native.structures import CMap, CStep, structure

KEPT = 16  # input sizes that a thread stays ready for


@dataclass(frozen=True)
class Bound:
    """A program laid out for inputs of one size: the maps' places, and the memory of those that stay inside."""

    maps: Any
    room: Tensor
    outputs: tuple[Shape, ...]
    parts: tuple[tuple[int, int, int], ...]  # of inputs and outputs: value, whose part it is, first channel


# A compiled graph knows a program by its number.
_handles = itertools.count()
_programs: weakref.WeakValueDictionary[int, Program] = weakref.WeakValueDictionary()


class Program(nn.Module):
    """Steps over numbered values; the inputs are the values 0, 1, … ; float32 tensors (N, C, H, W), channels last.

    Runs without gradients. Threads may share it: each keeps memory of its own.

    Raises:
        BackendError: in a process that cannot load the kernels.
    """

    def __init__(self, steps: Sequence[Step], inputs: int, outputs: Sequence[int]) -> None:
        super().__init__()
        self.steps, self.inputs, self.outputs = list(steps), inputs, tuple(outputs)
        self._ready()

    def _ready(self) -> None:
        self._own = threading.local()
        self._structures: tuple[Any, list[Tensor], Tensor] | None = None
        self.handle = next(_handles)
        _programs[self.handle] = self

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in ("_own", "_structures", "handle")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        cast(Any, super()).__setstate__(state)
        self._ready()

    def forward(self, *inputs: Tensor) -> Any:
        """One tensor where there is one output, else a tuple."""
        results = _operator(list(inputs), self.handle) if torch.compiler.is_compiling() else self.run(inputs)
        return results[0] if len(self.outputs) == 1 else tuple(results)

    def run(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """The outputs."""
        loaded = load_library()
        if loaded is None:
            raise BackendError(f"this form needs octify's kernels: {why_not()}")
        given = [x.contiguous(memory_format=torch.channels_last) for x in inputs]
        bound = self._bound(loaded, tuple(tuple(x.shape) for x in given))  # pyright: ignore[reportArgumentType]
        steps, _, zeros = self._structures or self._structure(loaded)
        maps = bound.maps
        for value, x in enumerate(given):
            maps[value].data = x.data_ptr()
        results: list[Tensor] = []
        for value, (n, c, h, w) in zip(self.outputs, bound.outputs, strict=True):
            result = torch.empty((n, h, w, c)).permute(0, 3, 1, 2)
            maps[value].data = result.data_ptr()
            results.append(result)
        for value, whole, first in bound.parts:
            maps[value].data = maps[whole].data + 4 * first
        loaded.run(steps, len(steps), maps, zeros.data_ptr(), torch.get_num_threads())
        return results

    def pretend(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """Tensors of the outputs' shapes and layouts, for a compiler."""
        sizes = self.sizes([cast(Shape, tuple(x.shape)) for x in inputs])
        shapes = [sizes[value] for value in self.outputs]
        return [inputs[0].new_empty((n, h, w, c)).permute(0, 3, 1, 2) for n, c, h, w in shapes]

    def release(self) -> None:
        """Gives back the memory that is kept between calls."""
        self._own = threading.local()

    def _structure(self, loaded: Library) -> tuple[Any, list[Tensor], Tensor]:
        made = [structure(step, loaded.wide) for step in self.steps]
        rows = (CStep * len(made))(*(each.row for each in made))
        kept = [tensor for each in made for tensor in each.kept]
        widest = max(step.widest for step in self.steps)
        kept.append(_in_one_room(loaded, rows, [each.weights for each in made]))
        self._structures = rows, kept, torch.zeros(widest + ALIGN)
        return self._structures

    def _bound(self, loaded: Library, shapes: tuple[Shape, ...]) -> Bound:
        known = cast("dict[tuple[Shape, ...], Bound]", self._own.__dict__)
        if shapes not in known:
            if len(known) >= KEPT:
                known.clear()
            known[shapes] = self._bind(loaded, shapes)
        return known[shapes]

    def sizes(self, shapes: Sequence[Shape]) -> Sizes:
        """The shape of every value for inputs of these shapes."""
        sizes: Sizes = dict(enumerate(shapes))
        for step in self.steps:
            sizes.setdefault(step.out, step.size(sizes))
            if step.pooled is not None:
                sizes[step.pooled] = Halved(Like(step.out))(sizes)
        return sizes

    def _bind(self, loaded: Library, shapes: tuple[Shape, ...]) -> Bound:
        sizes, wholes = self.sizes(shapes), self._wholes()
        starts, total = self._places(sizes)
        room = loaded.room(total)
        base = room.data_ptr()
        maps = (CMap * (max(sizes) + 1))()
        parts: list[tuple[int, int, int]] = []
        for value, (n, c, h, w) in sizes.items():
            whole, first = wholes.get(value, (value, 0))
            start = base + 4 * (starts[whole] + first) if whole in starts else None
            maps[value] = CMap(start, n, h, w, c, sizes[whole][1])
            if start is None and whole != value:
                parts.append((value, whole, first))
        return Bound(maps, room, tuple(sizes[value] for value in self.outputs), tuple(parts))

    def _wholes(self) -> dict[int, tuple[int, int]]:
        """The values that are parts of others: of which, and its channel at which they begin."""
        found: dict[int, tuple[int, int]] = {}
        for step in self.steps:
            if step.kind == Kind.VIEW:
                whole, first = found.get(step.convs[0].value, (step.convs[0].value, 0))
                found[step.out] = whole, first + step.order[0]
        return found

    def _places(self, sizes: Sizes) -> tuple[dict[int, int], int]:
        """Where each inner value begins, so that values that never live together share memory; and how much in all."""
        wholes = {value: whole for value, (whole, _) in self._wholes().items()}
        last: dict[int, int] = {}
        for index, step in enumerate(self.steps):
            last |= dict.fromkeys((wholes.get(value, value) for value in (*step.reads, *step.writes)), index)
        outer = {*range(self.inputs), *self.outputs, *wholes}
        shared = {*wholes, *wholes.values()}  # what has parts may be read through them
        room = _Room()
        starts: dict[int, int] = {}
        for index, step in enumerate(self.steps):
            for value in step.writes:
                if value in outer or value in starts:
                    continue
                heirs = (v for v in _may_overwrite(step, value) if v in starts and v not in shared)
                heir = next((v for v in heirs if last[v] == index), None)
                if heir is not None and sizes[heir] == sizes[value]:
                    starts[value] = starts[heir]
                    room.hand_over(starts[heir])
                    continue
                n, c, h, w = sizes[value]
                starts[value] = room.take(n * c * h * w)
            for value in {wholes.get(value, value) for value in (*step.reads, *step.writes)}:
                if value in starts and last[value] == index:
                    room.give_back(starts[value])
        return starts, room.end


def _in_one_room(loaded: Library, rows: Any, weights: Sequence[Tensor | None]) -> Tensor:
    """Weights one behind the other in the order in which they are read; tells each step where its own begin."""
    sizes = [0 if each is None else -(-each.numel() // ALIGN) * ALIGN for each in weights]
    room = loaded.room(sum(sizes))
    start = 0
    for row, each, size in zip(rows, weights, sizes, strict=True):
        if each is not None:
            row.weights = room[start:].data_ptr()
            room[start : start + each.numel()].copy_(each.flatten())
        start += size
    return room


def _may_overwrite(step: Step, value: int) -> list[int]:
    """What a step reads at the very place where it writes, and nowhere else."""
    if value != step.out:
        return []
    if step.kind == Kind.BESIDE:
        (only,) = step.convs
        beside = only.beside
        return [only.value] if beside is not None and len(beside.parts) == 1 and only.value != beside.gate else []
    if step.kind != Kind.SUM:
        return []
    elsewhere = {step.up, *(value for conv in step.convs for value in conv.reads)}
    return [plain for plain in step.plains if plain not in elsewhere]


class _Room:
    """Memory given out in pieces, in floats: the smallest free piece that fits, else at the end."""

    def __init__(self) -> None:
        self.end = 0
        self._used: dict[int, int] = {}
        self._owners: dict[int, int] = {}
        self._free: list[tuple[int, int]] = []  # start, size

    def take(self, size: int) -> int:
        size = -(-size // ALIGN) * ALIGN
        fitting = [piece for piece in self._free if piece[1] >= size]
        if fitting:
            start, length = min(fitting, key=lambda piece: piece[1])
            self._free.remove((start, length))
            if length > size:
                self._free.append((start + size, length - size))
        else:
            start, self.end = self.end, self.end + size
        self._used[start], self._owners[start] = size, 1
        return start

    def hand_over(self, start: int) -> None:
        """A second value lives where the first one does until that is given back."""
        self._owners[start] += 1

    def give_back(self, start: int) -> None:
        self._owners[start] -= 1
        if self._owners[start]:
            return
        size = self._used.pop(start)
        before = next((piece for piece in self._free if piece[0] + piece[1] == start), None)
        if before:
            self._free.remove(before)
            start, size = before[0], before[1] + size
        after = next((piece for piece in self._free if piece[0] == start + size), None)
        if after:
            self._free.remove(after)
            size += after[1]
        self._free.append((start, size))


def release_all() -> None:
    """Gives back what any program keeps between calls; the next call takes it again."""
    for program in list(_programs.values()):
        program.release()


_operators: Any = cast(Any, torch.library).Library("octify", "FRAGMENT")
_operators.define("run(Tensor[] inputs, int program) -> Tensor[]")


def _run(inputs: list[Tensor], program: int) -> list[Tensor]:
    return _programs[program].run(inputs)


def _pretend(inputs: list[Tensor], program: int) -> list[Tensor]:
    return _programs[program].pretend(inputs)


_operators.impl("run", _run, "CPU")
cast(Any, torch.library).register_fake("octify::run", _pretend, lib=_operators)
_operator: Any = cast(Any, torch.ops).octify.run.default
