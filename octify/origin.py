"""Where a converted network came from: what a checkpoint needs to build the source again."""

from __future__ import annotations

import importlib
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from octify.errors import ModelError
from octify.zoo import build_model, list_models


@dataclass(frozen=True)
class Origin:
    """The source of a conversion: its class, its size, the example inputs, and its name where it is known.

    `inputs` holds the shape and type of each, as ((1, 3, 224, 224), "float32"). `source` is a full name such as
    `torchvision:resnet50`.
    """

    kind: str
    parameters: int
    inputs: tuple[tuple[tuple[int, ...], str], ...]
    source: str | None = None

    @classmethod
    def of(cls, model: nn.Module, inputs: tuple[Any, ...]) -> Origin:
        """The origin of a source model, its name left open."""
        count = sum(parameter.numel() for parameter in model.parameters())
        shapes = tuple((tuple(value.shape), dtype_name(value.dtype)) for value in inputs if isinstance(value, Tensor))
        return cls(f"{type(model).__module__}.{type(model).__qualname__}", count, shapes)

    def named(self, source: str) -> Origin:
        """The same with the source's full name."""
        return replace(self, source=source)

    def example(self) -> tuple[Tensor, ...]:
        """The example inputs on the meta device."""
        return tuple(torch.empty(shape, dtype=dtype_of(name), device="meta") for shape, name in self.inputs)


def origin_of(model: nn.Module) -> Origin | None:
    """The origin that a converted model carries."""
    found = getattr(model, "octify_origin", None)
    return found if isinstance(found, Origin) else None


def set_origin(model: nn.Module, origin: Origin) -> None:
    """Gives a converted model its origin."""
    object.__setattr__(model, "octify_origin", origin)


def possible_sources(model: nn.Module, origin: Origin) -> list[str]:
    """Names under which the libraries build networks of the source's class and size; their forward may still differ."""
    config: Any = getattr(model, "pretrained_cfg", None) or {}
    names = [f"timm:{config['architecture']}"] if config.get("architecture") else []
    home = origin.kind.rpartition(".")[0]
    if home.startswith("torchvision.models."):
        library: Any = importlib.import_module("torchvision.models")
        names += [f"torchvision:{n}" for n in library.list_models() if library.get_model_builder(n).__module__ == home]
    known = set(list_models())
    return [name for name in names if name in known and _size_of(name) == origin.parameters]


def _size_of(name: str) -> int | None:
    try:
        model = build_model(name, device="meta")
    except ModelError:
        return None
    return sum(parameter.numel() for parameter in model.parameters())


def dtype_name(dtype: torch.dtype) -> str:
    """`float32` and the like."""
    return str(dtype).removeprefix("torch.")


def dtype_of(name: str) -> torch.dtype:
    """The inverse of `dtype_name`.

    Raises:
        ModelError: torch has no such type.
    """
    found = getattr(torch, name, None)
    if not isinstance(found, torch.dtype):
        raise ModelError(f'"{name}" is no type of tensor elements')
    return found
