"""What a network costs for one image, counted while it runs on the meta device: no memory for weights or maps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import FlopCounterMode

from octify.graph import meta_copy, to_meta
from octify.module import OctaveModule
from octify.trace import Trace

# Convolutions and linear layers. Attention's products of two maps (bmm and its kin) have no weights and are left out.
COUNTED = (torch.ops.aten.convolution, torch.ops.aten.mm, torch.ops.aten.addmm)
MIB = 2**20


@dataclass(frozen=True)
class Cost:
    """What one image costs in eval mode.

    `gmacs`: multiply-adds of convolutions and linear layers in 1e9. `activation_mib`: all maps that operations write,
    in MiB of the model's dtype; a view or an in-place operation writes none. `parameters`: shared ones once.
    """

    parameters: int
    gmacs: float
    activation_mib: float


def source_cost(trace: Trace) -> Cost:
    """The cost of the network that was traced, at the example's size."""
    return graph_cost(trace.model, trace.eval_graph, trace.inputs)


def model_cost(model: OctaveModule, inputs: tuple[Any, ...]) -> Cost:
    """The cost of a converted network for inputs of these shapes (tensors on any device)."""
    graph = model.mode_graphs[False] if model.mode_graphs else model.graph
    return graph_cost(model, graph, inputs)


def graph_cost(root: nn.Module, graph: fx.Graph, inputs: tuple[Any, ...]) -> Cost:
    """The cost of a graph over the modules of `root`; a batch is divided by its size."""
    ghosts = tuple(value.to("meta") if isinstance(value, Tensor) else value for value in inputs)
    images = next((value.shape[0] for value in ghosts if isinstance(value, Tensor) and value.dim()), 1)
    meter = _Meter(meta_copy(root).eval().requires_grad_(False), graph=graph)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        meter.run(*ghosts)
    counts: dict[Any, int] = counter.get_flop_counts()["Global"]
    macs = sum(flops for kind, flops in counts.items() if kind in COUNTED) / 2
    parameters = sum(parameter.numel() for parameter in root.parameters())
    return Cost(parameters, macs / images / 1e9, meter.written / images / MIB)


class _Meter(fx.Interpreter):
    """Runs a graph and sums the bytes of the tensors that its nodes write."""

    written = 0

    def run_node(self, n: fx.Node) -> Any:
        value = to_meta(super().run_node(n))
        if n.op in ("call_module", "call_function", "call_method"):
            # Views and in-place operations give a storage that they read.
            known = {_storage(tensor) for tensor in _tensors(self.fetch_args_kwargs_from_env(n))}
            fresh = {_storage(tensor): tensor for tensor in _tensors(value) if _storage(tensor) not in known}
            self.written += sum(tensor.numel() * tensor.element_size() for tensor in fresh.values())
        return value


def _tensors(tree: Any) -> list[Tensor]:
    leaves: list[Any] = pytree.tree_leaves(tree)
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]


def _storage(tensor: Tensor) -> int:
    """A storage's identity; on meta there is no address."""
    return tensor.untyped_storage()._cdata  # pyright: ignore[reportPrivateUsage]
