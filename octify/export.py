"""A converted network as a file that runs without octify: ONNX, PyTorch's pt2, or OpenVINO."""

from __future__ import annotations

import copy
import json
import os
import tempfile
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
from octify.graph import random_like
from octify.origin import origin_of
from octify.plan import Plan
from octify.program import AXES, hushed, trace_program
from octify.recipe import Recipe
from octify.runtimes import RUNTIMES, Run, need, open_exported
from octify.version import __version__

FORMATS = ("onnx", "pt2", "openvino")
TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}


@dataclass(frozen=True)
class Exported:
    """What was written: the file, which axes are open ("batch", "size"), and the greatest relative error.

    Open sizes are multiples of `multiple`.
    """

    path: Path
    format: str
    dynamic: tuple[str, ...]
    error: float
    multiple: int = 1


def export(
    model: nn.Module | str | os.PathLike[str],
    path: str | os.PathLike[str],
    format: str | None = None,
    example_inputs: Example = None,
    overwrite: bool = False,
    multiple: int = 1,
) -> Exported:
    """Writes the optimised inference form of a network (or of a checkpoint) for another runtime, and checks it there.

    `format` is "onnx", "pt2" or "openvino" (a .xml with a .bin beside it), by default what the path's ending says.
    Batch and image size stay open where the network's trace left them open. `example_inputs` as in `octify.convert`.
    With `multiple` a .onnx or .pt2 takes sizes that are multiples of it only: at 32 or so every upsampling doubles,
    which ONNX Runtime does in its own layout of maps.

    Raises:
        BackendError: no such format, its runtime is not installed or cannot take the network, or the file computes
            something else there: more than 1e-4 of the greatest output at the example's size or at another, odd one.
        CheckpointError: the checkpoint cannot be read, or the file cannot be written.
    """
    target = Path(path)
    chosen = format or {".onnx": "onnx", ".pt2": "pt2", ".xml": "openvino"}.get(target.suffix, "")
    if chosen not in FORMATS:
        raise BackendError(f'format is "{chosen}": expected one of {", ".join(FORMATS)}')
    if chosen == "openvino" and target.suffix != ".xml":
        raise BackendError(f"{target}: OpenVINO's files end in .xml")
    if chosen == "openvino" and multiple != 1:
        # It would add maps of different sizes without a word.
        raise BackendError("OpenVINO does not notice other sizes: write it for any size and call reshape on the model")
    check_target(target, overwrite)
    for module in {"onnx": ("onnx", "onnxscript", "onnxruntime"), "openvino": ("onnx", "onnxscript", "openvino")}.get(
        chosen, ()
    ):
        need(module)
    source = model if isinstance(model, nn.Module) else load(model)
    example = example_of(source, example_inputs)
    seeded = torch.Generator().manual_seed(0)
    reals = [random_like(value, seeded) for value in example]
    if multiple < 1 or any(size % multiple for value in reals for size in image_size(value)):
        raise BackendError(f"the example is {_shapes(reals)}: expected a height and width divisible by {multiple}")
    other = _other_size(source, reals, multiple)
    program, dynamic = trace_program(source, reals, AXES if other else AXES[:1], multiple)
    with _scratch(target) as folder:
        draft = folder / target.name
        sizes = {"multiple": str(multiple)} if multiple > 1 else {}
        WRITERS[chosen](program, draft, metadata_of(source) | sizes)
        run = open_exported(draft, chosen)
        checked = (reals, other) if other and "size" in dynamic else (reals,)
        error = max(_check(source, given, run, chosen) for given in checked)
        _publish(draft, target)
    return Exported(target, chosen, dynamic, error, multiple)


def metadata_of(model: nn.Module) -> dict[str, str]:
    """What a file says of itself: octify's version, the source, the recipe and the plan."""
    origin, recipe, plan = origin_of(model), getattr(model, "octify_recipe", None), getattr(model, "octify_plan", None)
    found = {"octify": __version__, "source": (origin.source or origin.kind) if origin else type(model).__name__}
    if isinstance(recipe, Recipe):
        found["recipe"] = recipe.to_yaml()
    if isinstance(plan, Plan):
        found["plan"] = json.dumps(plan.to_dict(), separators=(",", ":"))
    return found


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
    with hushed():
        torch.export.save(program, path, extra_files=cast(Any, {"octify.json": json.dumps(metadata)}))


def onnx_program(program: Any) -> Any:
    """An ONNX program.

    Raises:
        BackendError: ONNX has no such operation.
    """
    need("onnxscript")
    try:
        with hushed():
            made: Any = cast(Any, torch.onnx).export(program, dynamo=True, verbose=False)
    except Exception as error:
        lines = [line for line in str(error).splitlines() if line.strip()]
        raise BackendError(f"ONNX cannot express this network: {' '.join(lines[-2:])[:400]}") from error
    return made


def _write_onnx(program: Any, path: Path, metadata: dict[str, str]) -> None:
    made = onnx_program(program)
    for key, value in metadata.items():
        made.model.metadata_props[f"octify.{key}"] = value
    with hushed():
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


def _check(source: nn.Module, inputs: Sequence[Tensor], run: Run, format: str) -> float:
    """Compares the file in its runtime with the network; returns the error relative to the greatest output.

    Raises:
        BackendError: they differ.
    """
    reference = copy.deepcopy(source).cpu().eval()
    with torch.inference_mode():
        wanted: list[Tensor] = pytree.tree_leaves(reference(*inputs))
    try:
        found = run(*inputs)
    except Exception as error:
        raise BackendError(f"{RUNTIMES[format]} fails at {_shapes(inputs)}: {str(error).strip()[:400]}") from error
    error = max(_difference(a, b) for a, b in zip(found, wanted, strict=True))
    limit = TOLERANCE.get(wanted[0].dtype, 1e-4)
    if not error <= limit:
        raise BackendError(
            f"the {format} file computes something else at {_shapes(inputs)}: off by {error:.1e} of the greatest "
            f"output, allowed {limit:.0e}. Nothing was written; please report this."
        )
    return error


def image_size(value: Tensor) -> tuple[int, ...]:
    """The axes of an input whose size stays open, where sizes do: the last two, or all that it has."""
    return tuple(value.shape[max(2, value.dim() - 2) :])


def _other_size(source: nn.Module, inputs: Sequence[Tensor], multiple: int) -> list[Tensor] | None:
    """The inputs at another size that the network takes: an odd one, 16 to 17 less where they are larger than 48, or a
    multiple; None if it takes no other.
    """
    for step in (0, 32) if multiple == 1 else (multiple,):
        given = [_resized(value, step) for value in inputs]
        try:
            with torch.inference_mode():
                copy.deepcopy(source).cpu().eval()(*given)
        except Exception:  # whatever a network that was made for some sizes runs into
            continue
        return given
    return None


def _resized(value: Tensor, step: int) -> Tensor:
    for axis, size in enumerate(image_size(value), max(2, value.dim() - 2)):
        other = size + step if step else (size - 16 if size > 48 else size) // 2 * 2 + 1
        value = value.index_select(axis, torch.arange(other) % size)
    return value


def _difference(found: Tensor, wanted: Tensor) -> float:
    if found.shape != wanted.shape:
        return float("inf")
    scale = wanted.double().abs().max().item() or 1.0
    return (found.double() - wanted.double()).abs().max().item() / scale


def _shapes(inputs: Sequence[Tensor]) -> str:
    return ", ".join("x".join(map(str, value.shape)) for value in inputs)
