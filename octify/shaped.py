"""Tracers whose proxies carry the example's values: sizes are numbers, or symbols with the branches asserted."""

from __future__ import annotations

import math
import operator
from collections.abc import Generator, Iterable
from contextlib import contextmanager, suppress
from typing import Any, cast
from unittest.mock import patch

import torch
from torch import Tensor, fx, nn

from octify.errors import TraceError
from octify.graph import get_attribute, map_nodes, to_meta
from octify.ops import same_branch_
from octify.tracer import SymbolicTracer, WritableProxy


class ShapedProxy(WritableProxy):
    """A proxy that carries a meta value, so that sizes are real numbers."""

    @property
    def value(self) -> Any:
        """The meta value."""
        return self.node.meta["value"]

    @property
    def is_tensor(self) -> bool:
        """Whether the value is one."""
        return isinstance(self.value, Tensor)

    @property
    def is_cuda(self) -> bool:
        """Where the model is."""
        return any(tensor.is_cuda for tensor in cast(FixedTracer, self.tracer).root.parameters())

    @property
    def shape(self) -> Any:
        """The real shape; with a free batch its first entry is a proxy."""
        return cast(FixedTracer, self.tracer).shape_of(self)

    @property
    def ndim(self) -> int:
        """The number of axes."""
        return self.value.ndim

    @property
    def dtype(self) -> torch.dtype:
        """The type of the elements."""
        return self.value.dtype

    @property
    def device(self) -> Any:
        """Where the model is, or a proxy of that."""
        return cast(FixedTracer, self.tracer).device_of(self)

    @property
    def type(self) -> Any:
        """Of a device its kind, which is no symbol; of a tensor the method."""
        return self.value.type if isinstance(self.value, torch.device) else super().__getattr__("type")

    @property
    def requires_grad(self) -> bool:
        """No: forwards ask so as to save memory or time in training, not for other values."""
        return False

    def dim(self) -> int:
        """The number of axes."""
        return self.value.ndim

    def size(self, dim: int | None = None) -> Any:
        """The real size of one axis or of all."""
        return self.shape if dim is None else self.shape[dim]

    def numel(self) -> int:
        """The number of elements."""
        return self.value.numel()

    def is_floating_point(self) -> bool:
        """Whether the elements are floating-point numbers."""
        return self.value.is_floating_point()

    def __len__(self) -> int:
        return len(self.value)

    def __iter__(self) -> Any:
        return iter([cast(Any, self)[index] for index in range(len(self.value))])

    def __bool__(self) -> bool:
        if isinstance(self.value, Tensor):
            raise TraceError("the model's control flow depends on a tensor's values")
        cast(FixedTracer, self.tracer).guard(self)
        return bool(self.value)

    def __index__(self) -> int:
        return cast(FixedTracer, self.tracer).number(self)

    def __int__(self) -> int:
        return int(cast(FixedTracer, self.tracer).number(self))

    def __round__(self, digits: int | None = None) -> Any:
        return self.tracer.create_proxy("call_function", round, (self,) if digits is None else (self, digits), {})

    def __float__(self) -> float:
        return float(cast(FixedTracer, self.tracer).number(self))

    def __ceil__(self) -> Any:
        return self.tracer.create_proxy("call_function", math.ceil, (self,), {})

    def __floor__(self) -> Any:
        return self.tracer.create_proxy("call_function", math.floor, (self,), {})


class FixedTracer(SymbolicTracer):
    """The second choice: proxies carry meta tensors, so shapes are numbers and the example's size is baked in."""

    free_batch = False

    def shape_of(self, proxy: ShapedProxy) -> Any:
        """The shape that the model sees."""
        return tuple(proxy.value.shape)

    def device_of(self, proxy: ShapedProxy) -> Any:
        """Where the model is (its values are on meta, constants that it makes are not)."""
        return next((tensor.device for tensor in self.root.parameters()), torch.device("cpu"))

    def guard(self, proxy: ShapedProxy) -> None:
        """Called when a branch is taken by a number computed from sizes."""

    def number(self, proxy: ShapedProxy) -> Any:
        """Called where the model needs a number itself (`range(height)`).

        Raises:
            TraceError: it would be the example's for all inputs.
        """
        raise TraceError(f"the model needs {proxy.node} as a number")

    def proxy(self, node: fx.Node) -> ShapedProxy:
        """Wraps a node."""
        return ShapedProxy(node, self)

    def create_proxy(self, kind: str, target: Any, args: Any, kwargs: Any, *rest: Any, **more: Any) -> Any:
        """Adds a node and computes its meta value; what is no tensor is given back as it is."""
        proxy = super().create_proxy(kind, target, args, kwargs, *rest, **more)
        value = self._value(kind, target, proxy.node)
        proxy.node.meta["value"] = value
        if self._of_batch(proxy.node) and not _holds_tensor(value):
            proxy.node.meta["batch"] = True
            return proxy
        if kind in ("placeholder", "output", "get_attr") or _holds_tensor(value):
            return proxy
        self.graph.erase_node(proxy.node)
        return value

    def _of_batch(self, node: fx.Node) -> bool:
        """Whether a number is computed from the symbolic batch."""
        return self.free_batch and any("batch" in source.meta for source in node.all_input_nodes)

    def _known(self, node: fx.Node) -> Any:
        """A node's meta value; fx makes nodes of its own for buffers that stand as arguments."""
        if "value" not in node.meta:
            node.meta["value"] = self._value(node.op, node.target, node)
        return node.meta["value"]

    def _value(self, kind: str, target: Any, node: fx.Node) -> Any:
        if kind == "placeholder":
            index = sum(other.op == "placeholder" for other in self.graph.nodes) - 1
            return self.example[index] if index < len(self.example) else next(iter(node.args), None)
        if kind == "output":
            return None
        if kind == "get_attr":
            with self._computing():
                return to_meta(get_attribute(self.root, target))
        args = map_nodes(node.args, self._known)
        kwargs = map_nodes(node.kwargs, self._known)
        with self._computing():
            if kind == "call_module":
                return cast(nn.Module, self.skeleton).get_submodule(target)(*args, **kwargs)  # pyright: ignore
            if kind == "call_method":
                return getattr(args[0], target)(*args[1:], **kwargs)  # pyright: ignore
            return to_meta(target(*args, **kwargs))

    @contextmanager
    def _computing(self) -> Generator[None]:
        """While a meta value is computed, the tracer's patches of nn.Module are undone and nothing is watched."""
        self.watching = False
        try:
            with patch.multiple(nn.Module, __call__=_plain_call, __getattr__=_plain_getattr), torch.no_grad():
                yield
        finally:
            self.watching = True


class FreeBatchTracer(FixedTracer):
    """As FixedTracer, but the batch stays a symbol."""

    free_batch = True

    def shape_of(self, proxy: ShapedProxy) -> Any:
        """The shape with a proxy for the batch."""
        if proxy.node.op == "get_attr":  # the model's own
            return super().shape_of(proxy)
        with suppress(KeyError):
            return (proxy.node.meta["batch_proxy"], *proxy.value.shape[1:])
        node = self.create_node("call_method", "size", (proxy.node, 0), {})
        node.meta.update(value=proxy.value.shape[0], batch=True)
        batch = self.proxy(node)
        proxy.node.meta["batch_proxy"] = batch
        return (batch, *proxy.value.shape[1:])


class GuardedTracer(FreeBatchTracer):
    """Sizes stay symbols, and the branches that the model takes by them are asserted in the graph."""

    def shape_of(self, proxy: ShapedProxy) -> Any:
        """The shape as proxies of numbers."""
        if proxy.node.op == "get_attr":
            return super().shape_of(proxy)
        if "sizes" not in proxy.node.meta:
            proxy.node.meta["sizes"] = tuple(self._size(proxy, axis) for axis in range(proxy.value.dim()))
        return proxy.node.meta["sizes"]

    def _size(self, proxy: ShapedProxy, axis: int) -> ShapedProxy:
        node = self.create_node("call_method", "size", (proxy.node, axis), {})
        node.meta.update(value=proxy.value.shape[axis], batch=True)
        return self.proxy(node)

    def number(self, proxy: ShapedProxy) -> Any:
        """The number itself, with a node that raises where it would not be the example's."""
        if not isinstance(proxy.value, int | float):
            return super().number(proxy)
        same = self.create_node("call_function", operator.eq, (proxy.node, proxy.value), {})
        same.meta.update(value=True, batch=True)
        self.guard(self.proxy(same))
        return proxy.value

    def device_of(self, proxy: ShapedProxy) -> Any:
        """A symbol: what the model makes there (grids, masks) has sizes that are symbols, so it is no constant."""
        node = self.create_node("call_function", getattr, (proxy.node, "device"), {})
        node.meta.update(value=proxy.value.device, batch=True)
        return self.proxy(node)

    def guard(self, proxy: ShapedProxy) -> None:
        """Adds a node that raises where the branch would not be the example's."""
        self.create_node("call_function", same_branch_, (proxy.node, bool(proxy.value)), {})


def _holds_tensor(value: object) -> bool:
    if isinstance(value, (tuple, list)):
        return any(_holds_tensor(item) for item in cast(Iterable[object], value))
    return isinstance(value, Tensor)


_plain_call, _plain_getattr = nn.Module.__call__, nn.Module.__getattr__
