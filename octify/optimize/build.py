"""A network → its graph of primitive operations, passes over it, and the form that one backend runs best."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

import octify.optimize.passes as passes
from octify.convert import Example, convert, example_of
from octify.errors import BackendError, ModelError
from octify.graph import map_leaves, meta_copy, named_modules, record_values, set_module
from octify.module import DERIVED, OctaveModule, graph_from_data, graph_to_data
from octify.optimize.eager import lay_channels_last, lower_eager
from octify.optimize.expand import expand_convs, expand_pools
from octify.optimize.native import lower_native, why_not
from octify.optimize.norms import fold_norms
from octify.optimize.rows import take_rows
from octify.optimize.scales import fold_scales, settle_constants
from octify.optimize.tune import faster
from octify.parts import first_calls
from octify.recipe import Recipe
from octify.weights import brief

BACKENDS = ("eager", "compile", "onnxruntime", "openvino")


@dataclass(frozen=True)
class Pass:
    """One graph pass, what it does to the graph, and whether it reads the nodes' shapes."""

    name: str
    run: Callable[[fx.GraphModule], int]
    shapes: bool = False


ROWS = Pass("maps of one axis as rows", take_rows, shapes=True)  # for octify's own kernels
PASSES = (
    Pass("computed weights", passes.settle_weights),
    Pass("types that change nothing", passes.take_base_types),
    Pass("modules with hooks kept", passes.keep_hooked),
    Pass("views as reshapes", passes.reshape_views),
    Pass("same padding before its convolution", passes.pad_before),
    ROWS,
    Pass("batch norm into convolutions", fold_norms),
    Pass("octave convolutions into their paths", expand_convs),
    Pass("poolings of both bands into one each", expand_pools, shapes=True),
    Pass("dropout and identities", passes.drop_idle),
    Pass("constants", settle_constants),
    Pass("factors into convolutions", fold_scales),
    Pass("one pooling for all readers", passes.share_pools),
    Pass("residual sums into joins", passes.gather_sums, shapes=True),
    Pass("activations into joins", passes.gather_acts),
)


class Optimized(fx.GraphModule):
    """An inference form; `octify_passes` says how often each pass applied."""

    octify_passes: dict[str, int]

    def __reduce__(self) -> tuple[Any, ...]:
        """fx would trace the form again, into functions that are nodes in it."""
        state = {name: value for name, value in vars(self).items() if name not in DERIVED}
        return _restored, (state, graph_to_data(self.graph), type(self).__name__)


def _restored(state: dict[str, Any], graph: list[Any], class_name: str) -> Optimized:
    root = nn.Module()
    root.__dict__.update(state)
    form = Optimized(root, graph_from_data(graph), class_name=class_name)
    form.__dict__.update(state)
    return form


def optimize(model: nn.Module, backend: str = "eager", example_inputs: Example = None) -> nn.Module:
    """An inference form of a converted or dense network: the same outputs to 1e-5, in eval mode, no gradients.

    `backend` is what will run it: "eager", "compile" (`torch.compile` is applied, its first call compiles),
    "onnxruntime" or "openvino" (the graph that `octify.export` writes for them). `example_inputs` as in `convert`;
    other sizes work, the example's is what the form is measured at. The given model stays as it is.

    Raises:
        BackendError: there is no such backend.
        ModelError: the network does not run on the example.
    """
    if backend not in BACKENDS:
        raise BackendError(f'backend is "{str(backend)[:40]}": expected one of {", ".join(BACKENDS)}')
    example = example_of(model, example_inputs)
    source = _as_graph(model, example)
    if not isinstance(source, OctaveModule):
        return _by_parts(source, backend, example)
    try:
        return _form(source, backend, example)
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        refuse_example(source, example)
        raise error


def refuse_example(model: nn.Module, example: tuple[Any, ...]) -> None:
    """Says so where a network does not run on its example inputs.

    Raises:
        ModelError: with the reason.
    """
    try:
        with torch.no_grad():
            meta_copy(model).eval()(*example)
    except Exception as error:  # a model's forward may raise anything
        shapes = ", ".join("x".join(map(str, value.shape)) for value in example)
        raise ModelError(f"{type(model).__name__} does not run on {shapes}: {brief(error)}") from error


def _as_graph(model: nn.Module, example: tuple[Any, ...]) -> nn.Module:
    """A converted network as it is; a dense one as a graph, or with graphs in the places of its parts."""
    if any(isinstance(module, OctaveModule) for module in model.modules()):
        return model
    return convert(model, recipe=Recipe.uniform(0.0), example_inputs=example)


def _form(source: OctaveModule, backend: str, example: tuple[Any, ...]) -> nn.Module:
    device = next((parameter.device for parameter in source.parameters()), torch.device("cpu"))
    if device.type == "cpu" and backend in ("eager", "compile"):
        return _on_cpu(flatten(source, example, rows=True), example, backend)
    module = flatten(source, example)
    return _compiled(module) if backend == "compile" else module


def _by_parts(source: nn.Module, backend: str, example: tuple[Any, ...]) -> nn.Module:
    """A copy with a form of each part for what the example first gives it; one that it does not reach stays as it is.

    Raises:
        ModelError: the backend takes whole graphs only.
    """
    if backend in ("onnxruntime", "openvino"):
        raise ModelError(f"{type(source).__name__} was converted part by part: {backend} takes one graph as a whole")
    form = copy.deepcopy(source).eval().requires_grad_(False)
    parts = {path: part for path, part in named_modules(form) if isinstance(part, OctaveModule)}
    calls = first_calls(form, example)
    for path, part in parts.items():
        if path in calls and all(value.numel() for value in pytree.tree_leaves(calls[path].example)):
            set_module(form, path, _form(part, backend, calls[path].example))
    return form


def flatten(model: nn.Module, example: tuple[Any, ...], rows: bool = False) -> Optimized:
    """The graph of primitive operations after the passes that every backend gets; `example` on the meta device.

    With `rows` maps of one axis become maps of one row.

    Raises:
        ModelError: the network is converted part by part.
    """
    source = _as_graph(model, example)
    if not isinstance(source, OctaveModule):
        raise ModelError(f"{type(model).__name__} is converted part by part: there is no graph of the whole")
    copied = copy.deepcopy(source).eval().requires_grad_(False)
    module = Optimized(copied, copied.graph, class_name=type(source).__name__)
    counts: dict[str, int] = {}
    for step in PASSES:
        if step is ROWS and not rows:
            continue
        if step.shapes:
            module.graph.lint()
            record_values(meta_copy(module).eval(), module.graph, example)
        counts[step.name] = step.run(module)
    module.octify_passes = counts
    return _finished(module)


def _on_cpu(module: Optimized, example: tuple[Any, ...], backend: str) -> nn.Module:
    """With octify's own kernels, unless oneDNN's measure faster at the example's size."""
    inputs = [map_leaves(value, lambda tensor: torch.zeros(tensor.shape, dtype=tensor.dtype)) for value in example]
    own, theirs = _with_programs(module, example), _copied(module)
    for form in (own, theirs):
        if form is not None:
            form.octify_passes |= lower_eager(form, inputs)
            _finished(form)
    wins = own is not None and not faster(theirs, own, inputs)
    if backend == "eager":
        return own if own is not None and wins else theirs
    if not wins:
        return Frozen(_finished(cast(Optimized, lay_channels_last(module))))
    return Frozen(cast(Optimized, _with_programs(module, example)))


def _with_programs(module: Optimized, example: tuple[Any, ...]) -> Optimized | None:
    """A copy that runs on octify's own kernels; None where there are none, or nothing for them."""
    if why_not():
        return None
    form = _copied(module)
    _record_two_images(form, example)
    count = lower_native(form)
    form.octify_passes |= {"programs of octify's own kernels": count}
    return _finished(cast(Optimized, lay_channels_last(form))) if count else None


def _record_two_images(form: Optimized, example: tuple[Any, ...]) -> None:
    """Records values for a batch of two, which tells maps of the batch from those that are the same for all images.

    A form that was traced for a batch of its own keeps that.
    """
    ghost = meta_copy(form).eval()
    two = cast("tuple[Any, ...]", map_leaves(example, _twice))
    try:
        record_values(ghost, form.graph, two)
    except Exception:  # whatever a fixed shape runs into
        record_values(ghost, form.graph, example)


def _twice(image: Tensor) -> Tensor:
    return image.repeat(2, *(1,) * (image.dim() - 1)) if image.shape[:1] == (1,) else image


class Frozen(nn.Module):
    """A compiled form whose weights inductor takes for constants: it lays them out for oneDNN then, and fuses more.

    Dynamo looks for that setting in the global configuration, whenever it compiles; to set it takes longer than a small
    network's layer, so that sizes seen before go without.
    """

    def __init__(self, form: nn.Module) -> None:
        super().__init__()
        self.form = form
        self.compiled: Any = torch.compile(form)
        self.config: Any = importlib.import_module("torch._inductor.config")
        self.seen: set[tuple[Any, ...]] = set()

    def forward(self, *inputs: Any) -> Any:
        """As the form."""
        sizes = _sizes(inputs)
        with torch.inference_mode(False), torch.no_grad():
            if sizes in self.seen:
                return self.compiled(*inputs)
            with self.config.patch(freezing=True):
                result = self.compiled(*inputs)
        self.seen.add(sizes)
        return result


def _sizes(inputs: Any) -> tuple[Any, ...]:
    """What compiling depends on, of tensors and lists of tensors."""
    return tuple(
        _sizes(value) if isinstance(value, (list, tuple)) else getattr(value, "shape", value) for value in inputs
    )


def _compiled(module: Optimized) -> nn.Module:
    """On a GPU as one CUDA graph, where inductor can make one."""
    return cast(nn.Module, torch.compile(lay_channels_last(module), mode="reduce-overhead"))


def _copied(module: Optimized) -> Optimized:
    form = copy.deepcopy(module)
    form.octify_passes = dict(module.octify_passes)  # fx copies no attributes of its own accord
    return form


def _finished(module: Optimized) -> Optimized:
    module.graph.lint()
    module.delete_all_unused_submodules()
    module.recompile()
    return module
