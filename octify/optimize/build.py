"""A network → its graph of primitive operations, passes over it, and the form that one backend runs best."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import fx, nn

import octify.optimize.passes as passes
from octify.convert import Example, convert, example_of
from octify.errors import BackendError
from octify.graph import meta_copy, record_values
from octify.module import OctaveModule
from octify.optimize.eager import lower_eager
from octify.optimize.expand import expand_convs
from octify.optimize.native import lower_native, why_not
from octify.optimize.norms import fold_norms
from octify.recipe import Recipe

BACKENDS = ("eager", "compile", "onnxruntime", "openvino")


@dataclass(frozen=True)
class Pass:
    """One graph pass, what it does to the graph, and whether it reads the nodes' shapes."""

    name: str
    run: Callable[[fx.GraphModule], int]
    shapes: bool = False


PASSES = (
    Pass("batch norm into convolutions", fold_norms),
    Pass("octave convolutions into their paths", expand_convs),
    Pass("dropout and identities", passes.drop_idle),
    Pass("one pooling for all readers", passes.share_pools),
    Pass("residual sums into joins", passes.gather_sums, shapes=True),
    Pass("activations into joins", passes.gather_acts),
)


class Optimized(fx.GraphModule):
    """An inference form; `octify_passes` says how often each pass applied."""

    octify_passes: dict[str, int]


def optimize(model: nn.Module, backend: str = "eager", example_inputs: Example = None) -> nn.Module:
    """An inference form of a converted or dense network: the same outputs to 1e-5, in eval mode, no gradients.

    `backend` is what will run it: "eager", "compile" (`torch.compile` is applied, its first call compiles),
    "onnxruntime" or "openvino" (the graph that `octify.export` writes for them). `example_inputs` as in `convert`;
    other sizes work, the example's is what the form is measured at. The given model stays as it is.

    Raises:
        BackendError: there is no such backend.
    """
    if backend not in BACKENDS:
        raise BackendError(f'backend is "{backend}": expected one of {", ".join(BACKENDS)}')
    example = example_of(model, example_inputs)
    module = flatten(model, example)
    if backend == "eager":
        return _for_eager(module, example)
    if backend == "compile":
        return _for_compile(module, example)
    return module


def flatten(model: nn.Module, example: tuple[Any, ...]) -> Optimized:
    """The graph of primitive operations after the passes that every backend gets; `example` on the meta device."""
    source = model
    if not isinstance(model, OctaveModule):
        source = convert(model, recipe=Recipe.uniform(0.0), example_inputs=example)
    copied = copy.deepcopy(source).eval().requires_grad_(False)
    module = Optimized(copied, cast(fx.Graph, copied.graph), class_name=type(source).__name__)
    counts: dict[str, int] = {}
    for step in PASSES:
        if step.shapes:
            module.graph.lint()
            record_values(meta_copy(module).eval(), module.graph, example)
        counts[step.name] = step.run(module)
    module.octify_passes = counts
    return _finished(module)


def _for_eager(module: Optimized, example: tuple[Any, ...]) -> Optimized:
    device = next((parameter.device for parameter in module.parameters()), torch.device("cpu"))
    if device.type == "cpu":
        inputs = [torch.zeros(value.shape, dtype=value.dtype) for value in example]
        _run_here(module, example)
        module.octify_passes |= lower_eager(module, inputs)
    return _finished(module)


def _run_here(module: Optimized, example: tuple[Any, ...]) -> None:
    """Octify's own kernels, where this machine can build them."""
    if not why_not():
        record_values(meta_copy(module).eval(), module.graph, example)
        module.octify_passes["programs of octify's own kernels"] = lower_native(module)


class Frozen(nn.Module):
    """A compiled form whose weights inductor takes for constants: it lays them out for oneDNN then, and fuses more.

    Dynamo looks for that setting in the global configuration, whenever it compiles.
    """

    def __init__(self, form: nn.Module) -> None:
        super().__init__()
        self.form = form
        self.compiled: Any = torch.compile(form)
        self.config: Any = importlib.import_module("torch._inductor.config")

    def forward(self, *inputs: Any) -> Any:
        """As the form."""
        with torch.inference_mode(False), torch.no_grad(), self.config.patch(freezing=True):
            return self.compiled(*inputs)


def _for_compile(module: Optimized, example: tuple[Any, ...]) -> nn.Module:
    """Channels last on the CPU; on a GPU as one CUDA graph, where inductor can make one."""
    device = next((parameter.device for parameter in module.parameters()), torch.device("cpu"))
    module = module.to(memory_format=torch.channels_last)
    if device.type == "cpu":
        _run_here(module, example)
        return Frozen(_finished(module))
    return cast(nn.Module, torch.compile(module, mode="reduce-overhead"))


def _finished(module: Optimized) -> Optimized:
    module.graph.lint()
    module.delete_all_unused_submodules()
    module.recompile()
    return module
