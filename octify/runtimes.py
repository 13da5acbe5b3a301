"""The runtimes that octify exports for, on the CPU: a file in, a function of tensors out."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from octify.errors import BackendError

Run = Callable[..., list[Tensor]]
RUNTIMES = {"onnx": "onnxruntime", "pt2": "compile", "openvino": "openvino"}
from_numpy: Callable[[Any], Tensor] = cast(Any, torch).from_numpy


def need(module: str) -> Any:
    """A module of the export extra.

    Raises:
        BackendError: it is not installed; the message has the command.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise BackendError(f"{module} is not installed: pip install octify[export]") from error


def open_exported(path: str | os.PathLike[str], format: str, threads: int | None = None) -> Run:
    """A file in its own runtime, on the CPU, as a function of tensors that gives a list of tensors.

    Raises:
        BackendError: the runtime is not installed, or refuses the file.
    """
    try:
        return OPENERS[format](str(path), threads)
    except BackendError:
        raise
    except Exception as error:
        raise BackendError(f"{RUNTIMES[format]} does not run {path}: {str(error).strip()[:400]}") from error


def _open_pt2(path: str, threads: int | None) -> Run:
    module = torch.export.load(path).module()

    def run(*inputs: Tensor) -> list[Tensor]:
        with torch.inference_mode():
            return cast("list[Tensor]", pytree.tree_leaves(module(*inputs)))

    return run


def _open_onnx(path: str, threads: int | None) -> Run:
    return run_onnx(onnx_session(path, threads))


def onnx_session(path: str, threads: int | None, **more: Any) -> Any:
    """A session of ONNX Runtime on the CPU; `more` are attributes of its SessionOptions."""
    runtime = need("onnxruntime")
    options = runtime.SessionOptions()
    options.log_severity_level = 3
    if threads:
        options.intra_op_num_threads = options.inter_op_num_threads = threads
    for name, value in more.items():
        setattr(options, name, value)
    return runtime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def run_onnx(session: Any) -> Run:
    """A session as a function of tensors."""

    names = [entry.name for entry in session.get_inputs()]

    def run(*inputs: Tensor) -> list[Tensor]:
        given = {name: value.numpy() for name, value in zip(names, inputs, strict=True)}
        return [from_numpy(value) for value in session.run(None, given)]

    return run


def _open_openvino(path: str, threads: int | None) -> Run:
    return run_openvino(openvino_request(path, threads))


def openvino_request(path: str, threads: int | None, **more: Any) -> Any:
    """A model of OpenVINO, ready to run on the CPU; `more` are its properties."""
    openvino = need("openvino")
    core = openvino.Core()
    # By default a CPU with bfloat16 computes in it.
    options = {"INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY", **more}
    options |= {"INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": 1} if threads else {}
    return core.compile_model(core.read_model(path), "CPU", options).create_infer_request()


def run_openvino(request: Any) -> Run:
    """A request as a function of tensors."""

    def run(*inputs: Tensor) -> list[Tensor]:
        found = request.infer([value.numpy() for value in inputs])
        return [from_numpy(value.copy()) for value in found.values()]

    return run


OPENERS: dict[str, Callable[[str, int | None], Run]] = {
    "onnx": _open_onnx,
    "pt2": _open_pt2,
    "openvino": _open_openvino,
}
