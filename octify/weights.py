"""State dicts from files, never by way of pickled objects."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from octify.errors import ModelError


def load_weights(model: nn.Module, path: Path) -> None:
    """Loads a state dict from a .safetensors or .pt file into a network; every name and shape must fit.

    Raises:
        ModelError: the file cannot be read, holds anything but tensors, or does not fit.
    """
    state = _read_state(path)
    own = cast("dict[str, Tensor]", model.state_dict())
    faults = [f"lacks {name}" for name in own if name not in state]
    faults += [f"has {name}, which the network lacks" for name in state if name not in own]
    faults += [
        f"has {name} of shape {tuple(state[name].shape)}, expected {tuple(value.shape)}"
        for name, value in own.items()
        if name in state and state[name].shape != value.shape
    ]
    if faults:
        rest = f"\n  and {len(faults) - 3} more" if len(faults) > 3 else ""
        listed = "".join(f"\n  it {fault}" for fault in faults[:3])
        raise ModelError(f"{path} does not fit {type(model).__name__}:{listed}{rest}")
    model.load_state_dict(state, assign=any(value.is_meta for value in own.values()))


def _read_state(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise ModelError(f"{path}: there is no such file of weights")
    try:
        if path.suffix == ".safetensors":
            load_file = cast(
                "Callable[[Path], dict[str, Tensor]]", importlib.import_module("safetensors.torch").load_file
            )
            return load_file(path)
        found: Any = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged files raise whatever their reader stumbles on
        raise ModelError(f"{path}: cannot be read as a state dict: {brief(error)}") from error
    state = _inner_state(found)
    if not state or not all(isinstance(value, Tensor) for value in state.values()):
        raise ModelError(f"{path}: holds no state dict: expected names and tensors, as model.state_dict() gives")
    return {str(name).removeprefix("module."): value for name, value in state.items()}


def _inner_state(found: Any) -> dict[Any, Any]:
    """The state dict inside what training scripts save around it."""
    if not isinstance(found, dict):
        return {}
    saved = cast("dict[Any, Any]", found)
    inner = [_inner_state(saved[key]) for key in ("state_dict", "model") if key in saved]
    return next((state for state in inner if state), saved)


def brief(error: Exception) -> str:
    """An error's kind and first line."""
    return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}".removesuffix(": ")
