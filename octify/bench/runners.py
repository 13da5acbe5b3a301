"""A network on a backend, as a function without arguments that computes it once."""

from __future__ import annotations

import copy
import os
import tempfile
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from octify.bench.clock import Call
from octify.errors import BackendError
from octify.export import WRITERS
from octify.optimize import BACKENDS, optimize
from octify.optimize.eager import lay_channels_last
from octify.program import trace_program
from octify.runtimes import need, open_exported
from octify.weights import brief

FILES = {"onnxruntime": ("onnx", "model.onnx"), "openvino": ("openvino", "model.xml")}
NEEDS = {"onnxruntime": ("onnx", "onnxscript", "onnxruntime"), "openvino": ("onnx", "onnxscript", "openvino")}


@dataclass(frozen=True)
class Settings:
    """How to run: on `threads` CPU threads (torch's own number if None), `dtype` and `device` as torch writes them.

    `optimized` puts both networks through `octify.optimize`; without it they run as they are. `channels_last` None
    takes it for eager and compiled networks on the CPU and for half precision on a GPU.
    """

    backend: str = "eager"
    threads: int | None = None
    device: str = "cpu"
    dtype: str = "float32"
    channels_last: bool | None = None
    train: bool = False
    optimized: bool = True

    def checked(self) -> Settings:
        """The settings themselves.

        Raises:
            BackendError: they ask for what there is not.
        """
        if self.backend not in BACKENDS:
            raise BackendError(f'backend is "{self.backend}": expected one of {", ".join(BACKENDS)}')
        for module in NEEDS.get(self.backend, ()):
            need(module)
        if not isinstance(getattr(torch, self.dtype, None), torch.dtype):
            raise BackendError(f'dtype is "{self.dtype}": expected float32, bfloat16 or float16')
        if self.backend in FILES and (self.train or self.device != "cpu" or self.dtype != "float32"):
            raise BackendError(f"{self.backend} is measured in float32 on the CPU, in inference")
        if torch.device(self.device).type == "cuda" and not torch.cuda.is_available():
            raise BackendError(f"device is {self.device}: torch sees no CUDA device here")
        return self

    @property
    def lays_channels_last(self) -> bool:
        """Whether maps are laid out channels last."""
        if self.channels_last is not None:
            return self.channels_last
        return self.backend in ("eager", "compile") and (self.device == "cpu" or self.dtype != "float32")


@contextmanager
def threads(count: int | None) -> Generator[None]:
    """PyTorch with so many threads."""
    before = torch.get_num_threads()
    if count:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def runner(model: nn.Module, inputs: Sequence[Tensor], settings: Settings) -> Call:
    """The network ready to run on these inputs; the given one stays as it is.

    Raises:
        BackendError: the backend is not there or cannot run it.
    """
    if settings.backend in FILES:
        return _file_runner(model, inputs, settings)
    placed = _placed(model, settings)
    given = [_input(value, settings) for value in inputs]
    if settings.train:
        return _train_step(placed, given, settings)
    if settings.optimized:
        form: Any = optimize(placed.eval(), settings.backend, tuple(given))
    else:
        form = placed.eval()
        form = _compiled(form, settings) if settings.backend == "compile" else form

    def run() -> Any:
        with torch.inference_mode():
            return form(*given)

    return _captured(run) if settings.device != "cpu" and settings.backend == "eager" else run


def _placed(model: nn.Module, settings: Settings) -> nn.Module:
    placed = copy.deepcopy(model).to(settings.device, getattr(torch, settings.dtype))
    return lay_channels_last(placed) if settings.lays_channels_last else placed


def _input(value: Tensor, settings: Settings) -> Tensor:
    moved = value.to(settings.device)
    moved = moved.to(getattr(torch, settings.dtype)) if moved.is_floating_point() else moved
    last = settings.lays_channels_last and moved.dim() == 4
    return moved.contiguous(memory_format=torch.channels_last) if last else moved


def _compiled(form: Any, settings: Settings) -> Any:
    graphs = {"mode": "reduce-overhead"} if settings.device != "cpu" else {}
    return cast(Any, torch).compile(form, **graphs)


def _captured(run: Call) -> Call:
    """The same as a CUDA graph, or as it is where it cannot be captured."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    try:
        with torch.cuda.stream(stream):
            for _ in range(3):
                run()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
    except RuntimeError:
        torch.cuda.synchronize()
        return run
    return graph.replay


def _train_step(model: nn.Module, inputs: Sequence[Tensor], settings: Settings) -> Call:
    """Forward, backward and a step of SGD; the loss is the mean of all outputs' squares."""
    model.train().requires_grad_(True)
    optimizer: Any = torch.optim.SGD(model.parameters(), lr=1e-6, momentum=0.9)
    form: Any = _compiled(model, settings) if settings.backend == "compile" else model

    def step() -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        outputs = [leaf for leaf in pytree.tree_leaves(form(*inputs)) if isinstance(leaf, Tensor)]
        loss = torch.stack([output.float().square().mean() for output in outputs]).sum()
        cast(Any, loss).backward()
        optimizer.step()
        return loss

    try:
        step()
    except Exception as error:  # a model's forward may raise anything
        name = type(model).__name__
        raise BackendError(f"{name} does not train on images alone: {brief(error)}") from error
    return step


def _file_runner(model: nn.Module, inputs: Sequence[Tensor], settings: Settings) -> Call:
    """The exported file at this fixed size, in its runtime."""
    with exported(model, inputs, settings.backend) as (path, given):
        run = open_exported(path, FILES[settings.backend][0], settings.threads)
    return lambda: run(*given)


@contextmanager
def exported(model: nn.Module, inputs: Sequence[Tensor], backend: str) -> Generator[tuple[str, list[Tensor]]]:
    """A network as a file for a runtime, at this fixed size, and the inputs as the file takes them."""
    kind, name = FILES[backend]
    given = [value.to(torch.float32).contiguous() for value in inputs]
    program, _ = trace_program(model, given, ())
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, name)
        WRITERS[kind](program, path, {})
        yield os.fspath(path), given


def with_backend(settings: Settings, backend: str) -> Settings:
    """The same settings for another backend."""
    return replace(settings, backend=backend).checked()
