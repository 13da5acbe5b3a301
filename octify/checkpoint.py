"""Converted networks as files: one .safetensors with the weights, the plan and what else it takes to build them again.

Nothing in a file is ever run: no pickle, and a network is built by name only if torchvision or timm has it.
"""

from __future__ import annotations

import copy
import hashlib
import importlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from octify.conversion import Conversion
from octify.convert import plan_of, refuse_no_module
from octify.errors import CheckpointError, ModelError, OctifyError
from octify.origin import Origin, dtype_name, dtype_of, origin_of, possible_sources, set_origin
from octify.plan import Plan
from octify.recipe import Recipe
from octify.tensors import load_tensors, named_tensors, pack, rests_on_meta, shapes_of, unpack
from octify.version import __version__
from octify.zoo import build_model

FORMAT = 1
_save_file: Any = importlib.import_module("safetensors.torch").save_file


@dataclass(frozen=True)
class Header:
    """What a checkpoint says beside the weights.

    `dtype` is the source's, `training` the mode it was saved in; `strides` and `aliases` restore tensors whose memory
    is not in order or shared with another's.
    """

    origin: Origin
    recipe: Recipe
    plan: Plan
    dtype: str
    training: bool
    strides: Mapping[str, tuple[int, ...]]
    aliases: Mapping[str, str]
    made_by: str

    def to_text(self) -> str:
        """As JSON, the same text for the same header."""
        origin = self.origin
        data = {
            "source": origin.source,
            "class": origin.kind,
            "source_parameters": origin.parameters,
            "inputs": [{"shape": shape, "dtype": dtype} for shape, dtype in origin.inputs],
            "recipe": self.recipe.to_dict(),
            "plan": self.plan.to_dict(),
            "dtype": self.dtype,
            "training": self.training,
            "strides": self.strides,
            "aliases": self.aliases,
            "made_by": self.made_by,
        }
        return json.dumps(data, sort_keys=True, separators=(",", ":"))

    @classmethod
    def from_text(cls, text: str) -> Header:
        """The inverse of `to_text`.

        Raises:
            KeyError, TypeError, ValueError, OctifyError: the text is no header's.
        """
        data: Any = json.loads(text)
        inputs = tuple((tuple(entry["shape"]), str(entry["dtype"])) for entry in data["inputs"])
        return cls(
            Origin(data["class"], data["source_parameters"], inputs, data["source"]),
            Recipe.from_dict(data["recipe"], "the checkpoint's recipe"),
            Plan.from_dict(data["plan"]),
            data["dtype"],
            data["training"],
            {name: tuple(stride) for name, stride in data["strides"].items()},
            data["aliases"],
            data["made_by"],
        )


def save(model: nn.Module, path: str | os.PathLike[str], overwrite: bool = False) -> None:
    """Writes a converted network into one .safetensors file; what stands there before is kept unless all goes well.

    Raises:
        CheckpointError: the model is not octify's or has no weights, the file is there already, or cannot be written.
    """
    target = Path(path)
    check_target(target, overwrite)
    found = named_tensors(model)
    ghosts = [name for name, tensor in found.items() if tensor.is_meta]
    if ghosts:
        raise CheckpointError(f"{type(model).__name__} is on the meta device: {ghosts[0]} has no values to save")
    tensors, strides, aliases = pack(found)
    text = _header_of(model, strides, aliases).to_text()
    # One entry: the file's own order of several differs from run to run.
    entry = json.dumps({"format": FORMAT, "digest": _digest(text, tensors), "header": text})
    _write(tensors, {"octify": entry}, target)


def check_target(path: Path, overwrite: bool) -> None:
    """Refuses a file that is there already, and a place where none can be.

    Raises:
        CheckpointError: says which.
    """
    if path.is_dir():
        raise CheckpointError(f"{path} is a directory: expected a file's name, such as {path / 'model.safetensors'}")
    if path.exists() and not overwrite:
        raise CheckpointError(f"{path} is there already: write elsewhere, or allow overwriting it (--overwrite)")
    if not path.absolute().parent.is_dir():
        raise CheckpointError(f"{path}: there is no directory {path.absolute().parent}")
    if not os.access(path.absolute().parent, os.W_OK):
        raise CheckpointError(f"{path}: the directory {path.absolute().parent} cannot be written to")


def load(path: str | os.PathLike[str], model: nn.Module | None = None) -> nn.Module:
    """Builds a converted network from a checkpoint, on the CPU, with the outputs that it had when it was saved.

    `model` is the source network, with any weights; networks of torchvision and timm are built by name without it.

    Raises:
        CheckpointError: no checkpoint of octify's, a damaged, altered or newer one, or one of another model.
        ModelError: `model` is no network.
    """
    if model is not None:
        refuse_no_module(model)
    header, tensors = read_checkpoint(path)
    if model is None and header.plan.how == "symbolic":
        # All weights are in the file: the source needs no memory and no random numbers, unless a device got into it.
        converted = _filled(build_source(header, Path(path), "meta"), header, tensors, path)
        if not rests_on_meta(converted):
            return converted
    source = build_source(header, Path(path)) if model is None else model
    return _filled(source, header, tensors, path)


def _filled(source: nn.Module, header: Header, tensors: dict[str, Tensor], path: object) -> nn.Module:
    """The source converted by a checkpoint's plan, with the checkpoint's weights."""
    try:
        converted = rebuild(source, header)
        load_tensors(converted, unpack(tensors, header.strides, header.aliases))
    except OctifyError as error:
        name = header.origin.source or header.origin.kind
        raise CheckpointError(f"{path} was made from {name}, which {type(source).__name__} is not: {error}") from error
    return converted.train(header.training)


def read_checkpoint(path: str | os.PathLike[str]) -> tuple[Header, dict[str, Tensor]]:
    """The header and the tensors as they lie in the file, checked against their digest.

    Raises:
        CheckpointError: no checkpoint of octify's, or a damaged, altered or newer one.
    """
    if not Path(path).is_file():
        raise CheckpointError(f"{path}: there is no such file")
    try:
        with cast(Any, safe_open)(path, "pt") as file:
            entry = _entry_of(file.metadata() or {}, path)
            tensors: dict[str, Tensor] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{path} is truncated, or no .safetensors file: {error}") from error
    if _digest(entry["header"], tensors) != entry["digest"]:
        raise CheckpointError(f"{path} was altered after it was saved: weights and plan are not the ones signed there")
    try:
        return Header.from_text(entry["header"]), tensors
    except (KeyError, TypeError, ValueError, AttributeError, OctifyError) as error:
        raise CheckpointError(f"{path} holds no plan that octify {__version__} understands: {error}") from error


def _entry_of(metadata: Mapping[str, str], path: object) -> dict[str, str]:
    """What octify wrote into the metadata: `digest` and `header`."""
    try:
        entry: dict[str, Any] = json.loads(metadata["octify"])
        version, known = int(entry["format"]), {"digest": str(entry["digest"]), "header": str(entry["header"])}
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path} is no checkpoint of octify's: its metadata hold no plan") from error
    if version != FORMAT:
        raise CheckpointError(
            f"{path} has format {version}, octify {__version__} reads format {FORMAT}: use a newer octify"
        )
    return known


def rebuild(source: nn.Module, header: Header) -> nn.Module:
    """Converts a source by a checkpoint's plan, with the source's weights.

    Raises:
        CheckpointError: the plan is not one for this network.
        OctifyError: the network cannot be traced.
    """
    given = next((p.dtype for p in source.parameters() if p.is_floating_point()), None)
    wanted = dtype_of(header.dtype)
    if given not in (None, wanted):
        source = _cast(source, wanted)
    reading = Conversion.read(source, header.recipe, header.origin.example()).as_planned(header.plan)
    names, planned = reading.names(), [op.name for op in header.plan.ops]
    if names != planned:
        first = next((pair for pair in zip(names, planned) if pair[0] != pair[1]), None)  # noqa: B905 - lengths differ
        detail = f"it computes {first[0]} where the plan has {first[1]}" if first else "their lengths differ"
        raise CheckpointError(f"{len(names)} operations against {len(planned)} in the plan; {detail}")
    converted = reading.apply(header.plan)
    set_origin(converted, header.origin)
    return converted


def _cast(source: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A copy of a model with another type of floating-point numbers."""
    return copy.deepcopy(source).to(dtype)


def build_source(header: Header, path: Path, device: str = "cpu", source: str | None = None) -> nn.Module:
    """The network that a checkpoint was made from, with random weights; `source` is the user's word for which it is.

    Raises:
        CheckpointError: no library has it under the name in the file, and nobody named another.
        ModelError: `source` cannot be built.
    """
    if source is not None:
        return build_model(source, device=device)
    name = source_in(header, path)
    try:
        return build_model(name, device=device)
    except ModelError as error:
        raise CheckpointError(f"{path} was made from {name}, which cannot be built: {error}") from error


def source_in(header: Header, path: Path) -> str:
    """The name of a library's network in a checkpoint's header; other names would have a file run code.

    Raises:
        CheckpointError: it was made from something else.
    """
    name = header.origin.source or header.origin.kind
    if name.startswith(("torchvision:", "timm:")):
        return name
    raise CheckpointError(
        f"{path} was made from {name}, which octify does not build by itself (a file must not run code): add "
        f'--source {header.origin.source or "FILE.py:FACTORY"}, or pass the network, octify.load("{path}", model=...)'
    )


def _header_of(model: nn.Module, strides: Mapping[str, tuple[int, ...]], aliases: Mapping[str, str]) -> Header:
    origin, recipe = origin_of(model), getattr(model, "octify_recipe", None)
    if origin is None or not isinstance(recipe, Recipe):
        raise CheckpointError(f"{type(model).__name__} was not converted by octify: save it with torch or safetensors")
    dtype = origin.inputs[0][1] if origin.inputs else "float32"
    found = next((dtype_name(p.dtype) for p in model.parameters() if p.is_floating_point()), dtype)
    header = Header(origin, recipe, plan_of(model), found, model.training, strides, aliases, f"octify {__version__}")
    if origin.source is None:
        source = _find_source(model, header)
        header = replace(header, origin=replace(origin, source=source))
    return header


def _find_source(model: nn.Module, header: Header) -> str | None:
    """The name under which a library builds the source, proven by converting that network again on meta."""
    for name in possible_sources(model, header.origin):
        try:
            device = "cpu" if header.plan.how == "parts" else "meta"  # finding parts takes a run
            again = rebuild(build_model(name, device=device), header).train(model.training)
        except OctifyError:
            continue
        if str(again) == str(model) and shapes_of(again) == shapes_of(model):
            return name
    return None


def _digest(text: str, tensors: Mapping[str, Tensor]) -> str:
    """A SHA-256 over the header and every tensor's name, type, shape and bytes."""
    digest = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(cast(Any, tensor.reshape(-1).view(torch.uint8).numpy()))
    return digest.hexdigest()


def _write(tensors: dict[str, Tensor], metadata: dict[str, str], target: Path) -> None:
    """Writes beside the target and renames, so that there is never half a file."""
    beside = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        _save_file(tensors, beside, metadata)
        os.replace(beside, target)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{target} cannot be written: {error}") from error
    finally:
        beside.unlink(missing_ok=True)
