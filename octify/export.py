"""A converted network as a file that runs without octify: ONNX, PyTorch's pt2, or OpenVINO."""

from __future__ import annotations

import copy
import json
import logging
import os
import tempfile
import warnings
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from octify.checkpoint import check_target, load
from octify.convert import Example, example_of
from octify.errors import BackendError, CheckpointError
from octify.optimize import flatten
from octify.origin import origin_of
from octify.plan import Plan
from octify.recipe import Recipe
from octify.runtimes import RUNTIMES, need, open_exported
from octify.version import __version__

FORMATS = ("onnx", "pt2", "openvino")
TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}


@dataclass(frozen=True)
class Exported:
    """What was written: the file, which axes any size may have ("batch", "size"), and the greatest relative error."""

    path: Path
    format: str
    dynamic: tuple[str, ...]
    error: float


def export(
    model: nn.Module | str | os.PathLike[str],
    path: str | os.PathLike[str],
    format: str | None = None,
    example_inputs: Example = None,
    overwrite: bool = False,
) -> Exported:
    """Writes the optimised inference form of a network (or of a checkpoint) for another runtime, and checks it there.

    `format` is "onnx", "pt2" or "openvino" (a .xml with a .bin beside it), by default what the path's ending says.
    Batch and image size stay open where the network's trace left them open. `example_inputs` as in `octify.convert`.

    Raises:
        BackendError: no such format, its runtime is not installed or cannot take the network, or the file computes
            something else there: more than 1e-4 of the greatest output at the example's size or at an odd one.
        CheckpointError: the checkpoint cannot be read, or the file cannot be written.
    """
    target = Path(path)
    chosen = format or {".onnx": "onnx", ".pt2": "pt2", ".xml": "openvino"}.get(target.suffix, "")
    if chosen not in FORMATS:
        raise BackendError(f'format is "{chosen}": expected one of {", ".join(FORMATS)}')
    if chosen == "openvino" and target.suffix != ".xml":
        raise BackendError(f"{target}: OpenVINO's files end in .xml")
    check_target(target, overwrite)
    for module in {"onnx": ("onnx", "onnxscript", "onnxruntime"), "openvino": ("onnx", "onnxscript", "openvino")}.get(
        chosen, ()
    ):
        need(module)
    source = model if isinstance(model, nn.Module) else load(model)
    example = examples(source, example_inputs)
    seeded = torch.Generator().manual_seed(0)
    reals = [torch.randn(value.shape, generator=seeded).to(value.dtype) for value in example]
    program, dynamic = trace_program(source, reals)
    with _scratch(target) as folder:
        draft = folder / target.name
        WRITERS[chosen](program, draft, metadata_of(source))
        error = _check(source, reals, draft, chosen, dynamic)
        _publish(draft, target)
    return Exported(target, chosen, dynamic, error)


def examples(model: nn.Module, given: Example = None) -> tuple[Tensor, ...]:
    """The example inputs on meta: those given, else those it was converted at, else its default ones."""
    origin = origin_of(model)
    return origin.example() if given is None and origin is not None else example_of(model, given)


def metadata_of(model: nn.Module) -> dict[str, str]:
    """What a file says of itself: octify's version, the source, the recipe and the plan."""
    origin, recipe, plan = origin_of(model), getattr(model, "octify_recipe", None), getattr(model, "octify_plan", None)
    found = {"octify": __version__, "source": (origin.source or origin.kind) if origin else type(model).__name__}
    if isinstance(recipe, Recipe):
        found["recipe"] = recipe.to_yaml()
    if isinstance(plan, Plan):
        found["plan"] = json.dumps(plan.to_dict(), separators=(",", ":"))
    return found


def trace_program(model: nn.Module, inputs: Sequence[Tensor], fixed: bool = False) -> tuple[Any, tuple[str, ...]]:
    """`torch.export`'s program of the optimised form, and which axes it leaves open: as many as it can,
    or none if `fixed`.

    Raises:
        BackendError: it cannot be traced with any.
    """
    ready = copy.deepcopy(model).cpu().eval()
    form = flatten(ready, tuple(value.to("meta") for value in inputs))
    how = getattr(getattr(model, "octify_plan", None), "how", "symbolic")
    tries = (
        ((),)
        if fixed
        else {"symbolic": (("batch", "size"), ("batch",), ()), "free batch": (("batch",), ())}.get(how, ((),))
    )
    reasons: list[str] = []
    for axes in tries:
        try:
            return _program(form, inputs, axes), axes
        except Exception as error:
            reasons.append(f"{' and '.join(axes) or 'fixed'}: {type(error).__name__}: {str(error).strip()[:200]}")
    raise BackendError(f"torch.export cannot trace {type(model).__name__}:\n  " + "\n  ".join(reasons))


def _program(form: nn.Module, inputs: Sequence[Tensor], axes: tuple[str, ...]) -> Any:
    # A batch of one would be taken for a constant.
    given = tuple(
        value.repeat(2, *(1,) * (value.dim() - 1)) if axes and value.shape[0] == 1 else value for value in inputs
    )
    dim: Any = cast(Any, torch.export).Dim.DYNAMIC
    shapes = tuple(
        ({0: dim} if "batch" in axes else {})
        | (dict.fromkeys(range(max(2, value.dim() - 2), value.dim()), dim) if "size" in axes else {})
        for value in given
    )
    with _quiet(), torch.no_grad():
        return torch.export.export(form, given, dynamic_shapes=shapes if axes else None)


@contextmanager
def _quiet() -> Generator[None]:
    """Without the exporters' own remarks."""
    level = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


@contextmanager
def _scratch(target: Path) -> Generator[Path]:
    """A folder beside the target, on the same disk, that is gone afterwards.

    Raises:
        CheckpointError: the disk is full or cannot be written.
    """
    try:
        with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.absolute().parent) as folder:
            yield Path(folder)
    except OSError as error:
        raise CheckpointError(f"{target} cannot be written: {error}") from error


def _publish(draft: Path, target: Path) -> None:
    """Moves the files to their places, the one with the target's name last."""
    for file in sorted(draft.parent.iterdir(), key=lambda file: file.name == draft.name):
        os.replace(file, target.with_name(file.name))


def _write_pt2(program: Any, path: Path, metadata: dict[str, str]) -> None:
    with _quiet():
        torch.export.save(program, path, extra_files=cast(Any, {"octify.json": json.dumps(metadata)}))


def onnx_program(program: Any) -> Any:
    """An ONNX program.

    Raises:
        BackendError: ONNX has no such operation.
    """
    need("onnxscript")
    try:
        with _quiet():
            made: Any = cast(Any, torch.onnx).export(program, dynamo=True, verbose=False)
    except Exception as error:
        lines = [line for line in str(error).splitlines() if line.strip()]
        raise BackendError(f"ONNX cannot express this network: {' '.join(lines[-2:])[:400]}") from error
    return made


def _write_onnx(program: Any, path: Path, metadata: dict[str, str]) -> None:
    made = onnx_program(program)
    for key, value in metadata.items():
        made.model.metadata_props[f"octify.{key}"] = value
    with _quiet():
        made.save(str(path))


def _write_openvino(program: Any, path: Path, metadata: dict[str, str]) -> None:
    openvino = need("openvino")
    middle = path.with_suffix(".onnx")
    _write_onnx(program, middle, {})
    try:
        found = openvino.convert_model(str(middle))
    except Exception as error:
        raise BackendError(f"OpenVINO cannot express this network: {str(error).strip()[:400]}") from error
    for key, value in metadata.items():
        found.set_rt_info(value, ["octify", key])
    openvino.save_model(found, str(path), compress_to_fp16=False)
    del found
    middle.unlink()


WRITERS: dict[str, Callable[[Any, Path, dict[str, str]], None]] = {
    "onnx": _write_onnx,
    "pt2": _write_pt2,
    "openvino": _write_openvino,
}


def _check(source: nn.Module, inputs: Sequence[Tensor], path: Path, format: str, dynamic: tuple[str, ...]) -> float:
    """Compares the file with the network at the example's size and, if sizes are open, at an odd one.

    Raises:
        BackendError: they differ.
    """
    run = open_exported(path, format)
    reference = copy.deepcopy(source).cpu().eval()
    worst = 0.0
    for given in [list(inputs), *([[_odd(value) for value in inputs]] if "size" in dynamic else [])]:
        with torch.inference_mode():
            wanted: list[Tensor] = pytree.tree_leaves(reference(*given))
        try:
            found = run(*given)
        except Exception as error:
            raise BackendError(f"{RUNTIMES[format]} fails at {_shapes(given)}: {str(error).strip()[:400]}") from error
        error = max(_difference(a, b) for a, b in zip(found, wanted, strict=True))
        limit = TOLERANCE.get(wanted[0].dtype, 1e-4)
        if not error <= limit:
            raise BackendError(
                f"the {format} file computes something else at {_shapes(given)}: off by {error:.1e} of the greatest "
                f"output, allowed {limit:.0e}. Nothing was written; please report this."
            )
        worst = max(worst, error)
    return worst


def _odd(value: Tensor) -> Tensor:
    """The same image at an odd size, 16 to 17 less where it is larger than 48."""
    sizes = [(size - 16 if size > 48 else size) // 2 * 2 + 1 for size in value.shape[max(2, value.dim() - 2) :]]
    return nn.functional.interpolate(value, sizes) if value.dim() == 4 else value[..., : sizes[-1]]


def _difference(found: Tensor, wanted: Tensor) -> float:
    if found.shape != wanted.shape:
        return float("inf")
    scale = wanted.double().abs().max().item() or 1.0
    return (found.double() - wanted.double()).abs().max().item() / scale


def _shapes(inputs: Sequence[Tensor]) -> str:
    return ", ".join("x".join(map(str, value.shape)) for value in inputs)
