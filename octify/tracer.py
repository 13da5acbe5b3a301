"""torch.fx's tracer with octify's leaves: what a model computes at any size."""

from __future__ import annotations

import builtins
import operator
import sys
from collections.abc import Callable, Generator, Iterable
from contextlib import ExitStack, contextmanager
from functools import wraps
from keyword import iskeyword
from typing import Any, cast
from unittest.mock import patch

import torch
from timm.layers._fx import get_notrace_functions, get_notrace_modules
from torch import fx, nn
from torch.nn.modules.conv import _ConvNd  # pyright: ignore[reportPrivateUsage]
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import CheckpointFunction

from octify.ops import enter_, leave_
from octify.reparametrized import plain_type
from octify.rules.base import rule_of_type

SIZED_FACTORIES = ("arange", "as_tensor", "empty", "eye", "full", "linspace", "ones", "tensor", "zeros")
RANDOM_FACTORIES = ("normal", "rand", "randint", "randn", "randperm")
SCOPES = ("no_grad", "enable_grad", "autocast")


def holds_convolution(module: nn.Module) -> bool:
    """Whether there is a convolution anywhere inside a module, the module itself not counted."""
    return any(isinstance(child, _ConvNd) for child in module.modules() if child is not module)


class SymbolicTracer(fx.Tracer):
    """torch.fx's tracer with octify's leaves: modules with a rule, PyTorch's own, and timm's without convolutions."""

    proxy_buffer_attributes = True

    def __init__(self, skeleton: nn.Module | None = None, example: tuple[Any, ...] = ()) -> None:
        functions = cast(Iterable[Callable[..., Any]], get_notrace_functions())
        super().__init__(autowrap_functions=tuple(functions), param_shapes_constant=True)
        self.skeleton = skeleton
        self.example = example
        self.scopes: dict[int, fx.Node] = {}  # those that the model is in
        self.watching = True  # not while octify itself computes

    def iter(self, obj: fx.Proxy) -> Any:
        """A list that the model is given is as long as the example's."""
        places = [node for node in self.graph.nodes if node.op == "placeholder"]
        given = self.example[places.index(obj.node)] if obj.node in places[: len(self.example)] else None
        if isinstance(given, (list, tuple)):
            items: Any = obj
            return iter([items[index] for index in range(len(cast("list[Any]", given)))])
        return cast(Any, super()).iter(obj)

    def trace(self, root: Any, concrete_args: dict[str, Any] | None = None) -> fx.Graph:
        """Also what torch.fx does not see: tensors that are made, and the scopes that a forward enters."""
        with self._watched():
            return super().trace(root, concrete_args)

    def create_arg(self, a: Any) -> Any:
        """A dictionary of a kind of its own (an OrderedDict, a model's output) stays one."""
        if not isinstance(a, dict) or type(cast(object, a)) is dict:
            return super().create_arg(a)
        kind: Any = type(cast(object, a))
        items = cast("dict[Any, Any]", super().create_arg(dict(cast("dict[Any, Any]", a))))
        if all(isinstance(key, str) and key.isidentifier() and not iskeyword(key) for key in items):
            return self.create_node("call_function", kind, (), items)
        return self.create_node("call_function", kind, (items,), {})

    @contextmanager
    def _watched(self) -> Generator[None]:
        """Patches, while a model's forward runs, what takes no proxies or leaves no trace."""
        with ExitStack() as stack:
            for names, always in ((SIZED_FACTORIES, False), (RANDOM_FACTORIES, True)):
                for name in names:
                    stack.enter_context(patch.object(torch, name, self._making(getattr(torch, name), always)))
            for name in SCOPES:
                enter, leave = self._entering(name)
                stack.enter_context(patch.multiple(getattr(torch, name), __enter__=enter, __exit__=leave))
            stack.enter_context(patch.object(CheckpointFunction, "apply", _apply_plainly))
            stack.enter_context(patch.object(builtins, "isinstance", _takes_proxies))
            yield

    def _making(self, make: Callable[..., Any], always: bool) -> Callable[..., Any]:
        """A function that makes tensors, as a node where its sizes are symbols or its numbers are random."""

        @wraps(make)
        def made(*args: Any, **kwargs: Any) -> Any:
            symbols = any(isinstance(leaf, fx.Proxy) for leaf in pytree.tree_leaves((args, kwargs)))
            if self.watching and (always or symbols):
                return self.create_proxy("call_function", make, args, kwargs)
            return make(*args, **kwargs)

        return made

    def _entering(self, name: str) -> tuple[Callable[..., Any], Callable[..., None]]:
        """The stand-ins for a scope's `__enter__` and `__exit__`: nodes, where the model enters it."""
        enter, leave = getattr(torch, name).__enter__, getattr(torch, name).__exit__

        def entered(context: Any) -> Any:
            if not self.watching or not getattr(context, "_enabled", True):
                return enter(context)
            given = (context.device, context.fast_dtype) if name == "autocast" else ()
            self.scopes[id(context)] = self.create_node("call_function", enter_, (name, *given), {})
            return context

        def left(context: Any, *error: Any) -> None:
            if id(context) not in self.scopes:
                return leave(context, *error)
            self.create_node("call_function", leave_, (self.scopes.pop(id(context)),), {})
            return None

        return entered, left

    def create_proxy(
        self, kind: str, target: Any, args: Any, kwargs: Any, name: str | None = None, type_expr: Any = None,
        proxy_factory_fn: Callable[[fx.Node], fx.Proxy] | None = None,
    ) -> fx.Proxy:  # fmt: skip
        """Adds a node; the model's own tensors are asked for by their sizes as numbers."""
        make = proxy_factory_fn and self._own_proxy(target)
        return super().create_proxy(kind, target, args, kwargs, name, type_expr, make)

    def _own_proxy(self, path: str) -> Callable[[fx.Node], fx.Proxy]:
        owner, _, name = path.rpartition(".")
        home: Any = self.root.get_submodule(owner)
        held = home._parameters[name] if name in home._parameters else home._buffers[name]  # not to be traced again
        return lambda node: OwnProxy(node, self, held)

    def proxy(self, node: fx.Node) -> fx.Proxy:
        """Wraps a node."""
        return WritableProxy(node, self)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """A leaf is kept as one call."""
        if rule_of_type(plain_type(m)) is not None:
            return True
        if type(m) in get_notrace_modules():
            return not holds_convolution(m)
        return super().is_leaf_module(m, module_qualified_name) and not holds_convolution(m)


class WritableProxy(fx.Proxy):
    """A proxy whose items can be assigned."""

    @property
    def is_tensor(self) -> bool:
        """Whether it stands for a tensor; a symbol may."""
        return True

    def __getattr__(self, name: str) -> Any:
        """Nothing of what others ask by underscores (is it an array?): a proxy would be taken for the answer."""
        if name.startswith("__"):
            raise AttributeError(name)
        return super().__getattr__(name)

    def __setitem__(self, index: Any, value: Any) -> None:
        tracer = cast(SymbolicTracer, self.tracer)
        given = tuple(tracer.create_arg(argument) for argument in (self, index, value))
        tracer.create_node("call_function", operator.setitem, given, {}).meta["value"] = None


class OwnProxy(WritableProxy):
    """A parameter or a buffer of the model, whose sizes no input changes."""

    def __init__(self, node: fx.Node, tracer: SymbolicTracer, held: torch.Tensor) -> None:
        super().__init__(node, tracer)
        self.held = held

    @property
    def shape(self) -> torch.Size:
        """The shape."""
        return self.held.shape

    @property
    def ndim(self) -> int:
        """The number of axes."""
        return self.held.ndim

    def dim(self) -> int:
        """The number of axes."""
        return self.held.dim()

    def size(self, dim: int | None = None) -> Any:
        """The size of one axis or of all."""
        return self.held.shape if dim is None else self.held.shape[dim]

    def numel(self) -> int:
        """The number of elements."""
        return self.held.numel()

    nelement = numel

    def __len__(self) -> int:
        return len(self.held)


def _apply_plainly(run: Callable[..., Any], _: bool, *args: Any) -> Any:
    """A checkpoint of activations without its scope of no_grad, which is not the model's."""
    return run(*args)


_isinstance = isinstance


def _takes_proxies(found: object, kinds: Any) -> bool:
    """As `isinstance`, but a proxy is a tensor to whoever asks from outside of torch and octify.

    A proxy's own `__class__` must not say so: C code believes it, too, and reads a tensor's memory.
    """
    if _isinstance(found, kinds):
        return True
    if not issubclass(type(found), WritableProxy) or not issubclass(torch.Tensor, kinds):
        return False
    asks = sys._getframe(1)  # pyright: ignore[reportPrivateUsage]
    place = str(asks.f_globals.get("__name__", "")).partition(".")[0]
    inside = place in ("torch", "octify") and asks.f_code.co_name != "is_tensor"
    return not inside and cast(WritableProxy, found).is_tensor
