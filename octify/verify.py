"""Named checks of a conversion, each with what was measured."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Generator, Iterable, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, fx, nn

from octify.bands import PATHS, choose_paths
from octify.check import Check, structure_checks
from octify.conversion import Conversion
from octify.convert import plan_of
from octify.flows import Flows
from octify.graph import random_like, sharing_copy
from octify.layers import Merge, OctConv, Split
from octify.operators import transfer_notes
from octify.oracles import (
    TOLERANCE,
    adapter_error,
    block_error,
    constant_error,
    constant_image,
    first_uneven,
    relative_error,
    same_bits,
    tensors_in,
)
from octify.plan import Plan, PlanOp
from octify.recipe import Recipe

SIDES = (64, 96, 128)  # small inputs to try first
HALVES = (torch.float16, torch.bfloat16)


def quick_checks(reading: Conversion, converted: nn.Module) -> list[Check]:
    """What a conversion's report holds: structure, the trace against the source, and constant images.

    The networks run at a small size where the source does; on the meta device only the structure is looked at.
    """
    checks = _structure(reading, converted)
    for flows, module in reading.pairs(converted):
        if any(tensor.is_meta for tensor in module.parameters()):
            continue
        source, octave = _runnable(flows.trace.model), _runnable(module)
        inputs = small_inputs(source, flows)
        if inputs is None:
            continue
        checks.append(trace_check(source, flows, inputs))
        checks += constant_checks(source, octave, inputs, plan_of(converted))
    return _worst(checks)


def all_checks(reading: Conversion, plan: Plan | None = None) -> list[Check]:
    """Every check that needs no data, on a copy whose norms and biases are moved away from their initial values.

    `plan` is a stored one, else the recipe's. The weights may be random: what is checked is the conversion, for any.
    """
    shaken = Conversion.read(shake(copy.deepcopy(reading.model)), reading.recipe, reading.example)
    decided = plan or shaken.plan()
    converted = shaken.apply(decided)
    folded = dict(shaken.pairs(shaken.apply(_with_folds(decided))))
    checks = _structure(shaken, converted)
    nothing = shaken.again(Recipe.uniform(0.0)) if shaken.whole else None
    for flows, module in shaken.pairs(converted):
        source = flows.trace.model
        inputs = small_inputs(source, flows)
        if inputs is None:
            continue
        checks.append(trace_check(source, flows, inputs))
        if nothing is not None:
            checks += alpha_zero_checks(shaken.model, nothing.apply(nothing.plan()), inputs)
        checks += constant_checks(source, module, inputs, plan_of(converted))
        checks += block_checks(source, folded[flows])
        checks += odd_size_checks(source, module, flows, inputs)
        checks += training_checks(source, module, inputs)
    return _worst(checks)


def _with_folds(plan: Plan) -> Plan:
    """The same plan with exact folds in the place of sharpened ones, which are exact on constant maps only."""
    ops = [replace(op, options={**op.options, "kernels": "fold"}) if _is_sharp(op) else op for op in plan.ops]
    return replace(plan, ops=tuple(ops))


def _is_sharp(op: PlanOp) -> bool:
    return op.options.get("kernels") == "sharp"


def _structure(reading: Conversion, converted: nn.Module) -> list[Check]:
    plan = plan_of(converted)
    return _worst(
        [check for flows, module in reading.pairs(converted) for check in structure_checks(module, flows, plan)]
    )


def _worst(checks: Iterable[Check]) -> list[Check]:
    """One check a name: of several parts' the first that failed, else the one with the largest value."""
    found: dict[str, Check] = {}
    for check in checks:
        before = found.setdefault(check.name, check)
        if before.passed and (not check.passed or _size(check) > _size(before)):
            found[check.name] = check
    return list(found.values())


def _size(check: Check) -> float:
    """A value as a number, below all others if it is text."""
    return -1.0 if isinstance(check.value, str) else check.value


def _runnable(model: nn.Module) -> nn.Module:
    """The model itself, or a float32 copy of one in half precision, whose rounding would hide everything."""
    half = any(tensor.dtype in HALVES for tensor in model.parameters())
    return copy.deepcopy(model).float() if half else model


def small_inputs(source: nn.Module, flows: Flows) -> list[Tensor] | None:
    """Random inputs of the smallest size that the source runs at, or None where it runs at none."""
    shapes = [tuple(value.shape) for value in flows.trace.inputs if isinstance(value, Tensor)]
    sides = SIDES if flows.trace.how == "symbolic" and all(len(shape) > 2 for shape in shapes) else ()
    for side in (*sides, None):
        small = shapes if side is None else [_shrink(shape, side) for shape in shapes]
        if side is not None and any(
            a > b for s, t in zip(small, shapes, strict=True) for a, b in zip(s, t, strict=True)
        ):
            continue
        inputs = random_inputs(small, flows, source)
        if runs(source, inputs):
            return inputs
    return None


def _shrink(shape: tuple[int, ...], side: int) -> tuple[int, ...]:
    halved = min(2, len(shape) - 2)
    return (*shape[: len(shape) - halved], *(side,) * halved)


def random_inputs(shapes: Sequence[Sequence[int]], flows: Flows, source: nn.Module) -> list[Tensor]:
    """Noise of the given shapes, the same on every call."""
    generator = torch.Generator().manual_seed(0)
    place = next(source.parameters(), torch.empty(0))
    types = [value.dtype for value in flows.trace.inputs if isinstance(value, Tensor)]
    types = [place.dtype if dtype.is_floating_point else dtype for dtype in types]
    like = [torch.empty(tuple(shape), dtype=dtype, device="meta") for shape, dtype in zip(shapes, types, strict=True)]
    return [random_like(value, generator).to(place.device) for value in like]


@torch.no_grad()
def runs(model: nn.Module, inputs: Sequence[Tensor], *, training: bool = False) -> bool:
    """Whether a model takes inputs of these shapes; its statistics stay as they are."""
    try:
        (copy.deepcopy(model) if training else sharing_copy(model)).train(training)(*inputs)
    except (RuntimeError, ValueError, AssertionError, IndexError, TypeError):
        return False
    return True


@torch.no_grad()
def trace_check(source: nn.Module, flows: Flows, inputs: Sequence[Tensor]) -> Check:
    """The trace computes what the source computes, bit for bit."""
    traced = fx.Interpreter(sharing_copy(source).eval(), graph=flows.trace.eval_graph).run(*inputs)
    expected = sharing_copy(source).eval()(*inputs)
    return Check("the trace equals the source", same_bits(expected, traced), relative_error(expected, traced))


def constant_checks(source: nn.Module, converted: nn.Module, inputs: Sequence[Tensor], plan: Plan) -> list[Check]:
    """Oracle 2, unless the plan has layers that do not take over their source's weights.

    It does not apply where the source (with pixel shuffle, say) makes something else of an even map at every position.
    """
    if transfer_notes(op.form for op in plan.ops):
        return []
    found = constant_check(source, converted, inputs)
    uneven = "" if found.passed else first_uneven(source, *(constant_image(x.shape, x.dtype) for x in inputs))
    return [replace(found, passed=True, value=f"does not apply: {uneven} depends on position") if uneven else found]


def constant_check(source: nn.Module, converted: nn.Module, inputs: Sequence[Tensor]) -> Check:
    """Oracle 2; where float32 rounding alone might exceed the bound, float64 decides."""
    error = constant_error(source, converted, inputs)
    if error > TOLERANCE and inputs[0].dtype == torch.float32:
        exact = [value.double() for value in inputs]
        error = constant_error(copy.deepcopy(source).double(), copy.deepcopy(converted).double(), exact)
    return Check("equal on constant images", error <= TOLERANCE, error)


@torch.no_grad()
def alpha_zero_checks(source: nn.Module, converted: nn.Module, inputs: Sequence[Tensor]) -> list[Check]:
    """Oracle 1: with nothing low, the same bits (in eval mode, and in train mode where it runs) and the same keys."""
    equal, error = True, 0.0
    for training in (False, True):
        if training and not runs(source, _batch(inputs), training=True):
            continue
        outputs = [_run_seeded(model, inputs, training) for model in (source, converted)]
        equal = equal and same_bits(*outputs)
        error = max(error, relative_error(*outputs))
    different = set(source.state_dict()) ^ set(converted.state_dict())
    return [Check("alpha 0: same output", equal, error), Check("alpha 0: same keys", not different, len(different))]


def _run_seeded(model: nn.Module, inputs: Sequence[Tensor], training: bool) -> Any:
    """The output of a copy, with the same random numbers on every call."""
    with seeded():
        return copy.deepcopy(model).train(training)(*(_batch(inputs) if training else inputs))


def _batch(inputs: Sequence[Tensor]) -> list[Tensor]:
    """Two images: batch norm trains on no fewer where maps are 1x1."""
    return [torch.cat((value, value.flip(-1))) for value in inputs]


def block_checks(source: nn.Module, converted: nn.Module) -> list[Check]:
    """Oracle 3 for every octave convolution beside the one in whose place it stands, and for every adapter."""
    errors: list[float] = []
    modules = cast("dict[str, nn.Module]", dict(cast(Any, converted.named_modules())))
    sources = cast("dict[str, nn.Module]", dict(cast(Any, source.named_modules())))
    for name, module in modules.items():
        if isinstance(module, OctConv) and name in sources and _is_exact(module):
            errors.append(block_error(sharing_copy(sources[name]).eval(), module))
        if isinstance(module, Split | Merge):
            errors.append(adapter_error(module))
    worst = max(errors, default=0.0)
    return [Check("equal on 2x2 blocks, layer by layer", worst <= TOLERANCE, worst)] if errors else []


def _is_exact(octave: OctConv) -> bool:
    """Whether oracle 3 holds: all paths are there, and the kernels are folded or need no folding."""
    pointwise = set(octave.kernel_size) == {1} and set(octave.stride) == {1}
    return (pointwise or octave.kernels == "fold") and octave.paths == choose_paths(
        octave.in_layout, octave.out_layout, octave.groups, PATHS
    )


def odd_size_checks(source: nn.Module, converted: nn.Module, flows: Flows, inputs: Sequence[Tensor]) -> list[Check]:
    """The converted network takes an odd, non-square size wherever the source does, with the same output shapes."""
    if any(value.dim() < 4 for value in inputs):
        return []
    shapes = [(*value.shape[:-2], value.shape[-2] + 3, value.shape[-1] + 9) for value in inputs]
    odd = random_inputs(shapes, flows, source)
    if not runs(source, odd):
        return []
    with torch.no_grad():
        wanted = [value.shape for value in tensors_in(sharing_copy(source).eval()(*odd))]
        try:
            given = [value.shape for value in tensors_in(sharing_copy(converted).eval()(*odd))]
        except RuntimeError as error:
            return [Check("runs at odd sizes", False, str(error).splitlines()[0])]
    return [Check("runs at odd sizes", wanted == given, "x".join(map(str, shapes[0])))]


def training_checks(source: nn.Module, converted: nn.Module, inputs: Sequence[Tensor]) -> list[Check]:
    """A backward pass reaches every parameter, wherever it reaches all of the source's."""
    if not runs(source, _batch(inputs), training=True) or unreached(source, inputs):
        return []
    left = unreached(converted, inputs)
    return [Check("gradients reach every parameter", not left, len(left))]


def unreached(model: nn.Module, inputs: Sequence[Tensor]) -> list[str]:
    """The parameters that get no finite gradient from the mean square of every output, in train mode."""
    trained = copy.deepcopy(model).train().requires_grad_(True)
    with seeded(), torch.enable_grad():
        outputs = [value for value in tensors_in(trained(*_batch(inputs))) if value.requires_grad]
        loss = torch.stack([value.float().square().mean() for value in outputs]).sum()
        cast(Any, loss).backward()
    return [n for n, p in trained.named_parameters() if p.grad is None or not torch.isfinite(p.grad).all()]


@contextlib.contextmanager
def seeded() -> Generator[None, None, None]:
    """The same random numbers every time, and the state before afterwards."""
    before = torch.get_rng_state()
    torch.default_generator.manual_seed(0)
    try:
        yield
    finally:
        torch.set_rng_state(before)


@torch.no_grad()
def shake(model: nn.Module) -> nn.Module:
    """Moves norms, biases and layer scales, in place: as libraries set them, two channels are often interchangeable."""
    generator = torch.Generator().manual_seed(0)
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.dim() != 1 or not tensor.is_floating_point():
            continue
        factor = torch.rand(tensor.shape, generator=generator) + 0.5
        shift = 0.0 if name.endswith("var") else 0.1 * torch.randn(tensor.shape, generator=generator)
        tensor.copy_(tensor.cpu() * factor + shift)
    return model
