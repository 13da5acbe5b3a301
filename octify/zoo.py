"""Finds and builds the network that a user names."""

from __future__ import annotations

import contextlib
import difflib
import fnmatch
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Generator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from octify.errors import ModelError
from octify.inputs import (
    DEFAULT,
    Preprocessing,
    Shape,
    preprocessing_of,
    preprocessing_of_config,
    preprocessing_of_weights,
    shapes_of,
    shapes_of_weights,
)
from octify.weights import brief, load_weights

Library = Literal["torchvision", "timm", "file", "module"]


@dataclass(frozen=True)
class Spec:
    """Where a network comes from; `str` gives the name in full, such as `torchvision:resnet50`."""

    library: Library
    place: str  # the file or module of a factory
    name: str  # the network or factory

    def __str__(self) -> str:
        return f"{self.place or self.library}:{self.name}"


def resolve(text: str) -> Spec:
    """Reads a network's name: `resnet50` (torchvision first), `timm:resnet50`, `file.py:factory`, `module:factory`.

    Raises:
        ModelError: neither library has a network of that name, or it is no name of this kind.
    """
    place, colon, name = text.rpartition(":")
    if not colon:
        return _bare(text)
    if place == "torchvision" or place == "timm":
        return _named(place, name)
    if not place or not name.isidentifier():
        raise ModelError(f'"{text}" names no network: expected file.py:factory or package.module:factory')
    return Spec("file" if place.endswith(".py") else "module", place, name)


def build_model(
    spec: str | Spec,
    *,
    pretrained: bool = False,
    weights: str | Path | None = None,
    seed: int = 0,
    device: str | torch.device | None = None,
) -> nn.Module:
    """Builds a network in training mode, as its library does; on the meta device without memory for weights.

    `weights` is a file of a state dict, .safetensors or .pt. Nothing is downloaded unless `pretrained`. The seed leaves
    torch's own random state as it was.

    Raises:
        ModelError: there is no such network, it cannot be built, or its weights cannot be had or do not fit.
    """
    spec = resolve(spec) if isinstance(spec, str) else spec
    if pretrained and spec.library in ("file", "module"):
        raise ModelError(f"{spec} has no pretrained weights of its own: use a weights file")
    place = torch.device(device or "cpu")
    with _seeded(seed), _OnMeta() if place.type == "meta" else contextlib.nullcontext():
        model = _build(spec, pretrained)  # on the CPU otherwise: the same weights on every device
    model = model.to(place)
    if weights is not None:
        load_weights(model, Path(weights))
    return model


def input_shape(model: str | Spec | nn.Module) -> tuple[Shape, ...]:
    """The shape of each input without the batch: the network's own, else 3x224x224."""
    if isinstance(model, nn.Module):
        return shapes_of(model) or (DEFAULT,)
    spec = resolve(model) if isinstance(model, str) else model
    if spec.library == "timm":
        config = _timm_config(spec.name)
        return (tuple(config["input_size"]),) if config.get("input_size") else (DEFAULT,)
    known = shapes_of_weights(_weights(spec.name)) if spec.library == "torchvision" else None
    return known or shapes_of(build_model(spec, device="meta")) or (DEFAULT,)


def preprocessing(model: str | Spec | nn.Module) -> Preprocessing | None:
    """How images are prepared for a network, if its library says."""
    if isinstance(model, nn.Module):
        return preprocessing_of(model)
    spec = resolve(model) if isinstance(model, str) else model
    if spec.library == "timm":
        config = _timm_config(spec.name)
        return preprocessing_of_config(config) if config.get("mean") and config.get("input_size") else None
    known = preprocessing_of_weights(_weights(spec.name)) if spec.library == "torchvision" else None
    return known or preprocessing_of(build_model(spec, device="meta"))


def list_models(pattern: str = "") -> list[str]:
    """The libraries' networks, torchvision's first; `pattern` is a glob, or a part of the name."""
    names = [f"{library}:{name}" for library in ("torchvision", "timm") for name in _names(library)]
    glob = pattern if any(sign in pattern for sign in "*?[") else f"*{pattern}*"
    return [name for name in names if fnmatch.fnmatchcase(name, glob) or fnmatch.fnmatchcase(name.split(":")[1], glob)]


def _bare(name: str) -> Spec:
    if name.endswith((".py", ".pt", ".pth", ".safetensors")) or "/" in name:
        raise ModelError(f'"{name}" names no network: expected {name if name.endswith(".py") else "file.py"}:factory')
    for library in ("torchvision", "timm"):
        if _has(library, name):
            return Spec(library, "", name)
    raise ModelError(f'"{name}" is no network of torchvision or timm.{_closest(name, ("torchvision", "timm"))}')


def _named(library: Literal["torchvision", "timm"], name: str) -> Spec:
    if _has(library, name):
        return Spec(library, "", name)
    raise ModelError(f'"{name}" is no network of {library}.{_closest(name, (library,))}')


def _closest(name: str, libraries: tuple[str, ...]) -> str:
    names = sorted({own for library in libraries for own in _names(library)})
    near = difflib.get_close_matches(name.lower(), names, n=3)
    return f"\n  closest   {', '.join(near)}" if near else "\n  octify models lists them"


def _has(library: str, name: str) -> bool:
    return (name.partition(".")[0] if library == "timm" else name) in _names(library)


@lru_cache
def _names(library: str) -> tuple[str, ...]:
    return tuple(importlib.import_module("torchvision.models" if library == "torchvision" else "timm").list_models())


def _weights(name: str) -> list[Any]:
    return list(importlib.import_module("torchvision.models").get_model_weights(name))


def _timm_config(name: str) -> dict[str, Any]:
    config = importlib.import_module("timm.models").get_pretrained_cfg(name)
    return {} if config is None else config.to_dict()


def _build(spec: Spec, pretrained: bool) -> nn.Module:
    if spec.library in ("file", "module"):
        return _call_factory(spec)
    make = _torchvision if spec.library == "torchvision" else _timm
    if not pretrained:
        return make(spec.name, False)
    try:
        return make(spec.name, True)
    except Exception as error:  # every layer of a download has errors of its own
        raise ModelError(
            f"{spec}: its pretrained weights cannot be had ({brief(error)}).\n"
            "  Without a network, pass a file of weights."
        ) from error


def _torchvision(name: str, pretrained: bool) -> nn.Module:
    library: Any = importlib.import_module("torchvision.models")
    takes = inspect.signature(library.get_model_builder(name)).parameters
    options: dict[str, Any] = {"weights": None}
    if "weights_backbone" in takes:
        options["weights_backbone"] = None
    if "quantize" in takes:
        options["quantize"] = False
    if pretrained:
        best = library.get_model_weights(name).DEFAULT
        options["weights"] = best.meta.get("unquantized", best)
    elif any(part in name for part in ("googlenet", "inception")):
        options["init_weights"] = True  # as without it, but without the warning
    return library.get_model(name, **options)


def _timm(name: str, pretrained: bool) -> nn.Module:
    return importlib.import_module("timm").create_model(name, pretrained=pretrained)


def _call_factory(spec: Spec) -> nn.Module:
    folder = Path(spec.place).resolve().parent if spec.library == "file" else Path.cwd()
    with _importable(folder):
        factory: Any = getattr(_load(spec), spec.name, None)
        if not callable(factory):
            raise ModelError(f"{spec}: {spec.place} has nothing to call named {spec.name}")
        try:
            model = factory()
        except Exception as error:  # the user's own code
            raise ModelError(f"{spec} failed: {brief(error)}") from error
    if not isinstance(model, nn.Module):
        raise ModelError(f"{spec} gave {type(model).__name__}: expected an nn.Module")
    return model


def _load(spec: Spec) -> ModuleType:
    if spec.library == "file" and not Path(spec.place).is_file():
        raise ModelError(f"{spec}: there is no file {spec.place}")
    try:
        if spec.library == "module":
            return importlib.import_module(spec.place)
        return _load_file(Path(spec.place).resolve())
    except Exception as error:  # the user's own code
        raise ModelError(f"{spec}: {spec.place} cannot be imported: {brief(error)}") from error


def _load_file(path: Path) -> ModuleType:
    name = f"octify_model_{path.stem}"
    found = importlib.util.spec_from_file_location(name, path)
    if found is None or found.loader is None:
        raise ImportError(f"{path} is no Python file")
    module = importlib.util.module_from_spec(found)
    sys.modules[name] = module  # so that its classes can be pickled and copied
    found.loader.exec_module(module)
    return module


# What fills tensors with random numbers; on meta, PyTorch goes through its own definitions of these in Python.
DRAWS = ("normal_", "uniform_", "erfinv_", "kaiming_normal_", "kaiming_uniform_")


class _OnMeta(TorchFunctionMode):
    """Makes what weights are made of without memory, and lets numbers be computed (RegNet derives its widths so)."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        options = kwargs or {}
        if getattr(func, "__name__", "") in DRAWS:
            drawn: Tensor = args[0] if args else options["tensor"]
            if drawn.is_meta:
                return drawn
        if func in (torch.empty, torch.zeros, torch.ones) and options.get("device") is None:
            options = {**options, "device": "meta"}
        return func(*args, **options)


@contextlib.contextmanager
def _seeded(seed: int) -> Generator[None, None, None]:
    generator = torch.default_generator
    before = generator.get_state()
    generator.manual_seed(seed)
    try:
        yield
    finally:
        generator.set_state(before)


@contextlib.contextmanager
def _importable(folder: Path) -> Generator[None, None, None]:
    """Lets a user's file import its neighbours, as when it is run."""
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))
