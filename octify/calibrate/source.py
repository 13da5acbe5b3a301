"""Where calibration images come from: a folder, a tensor file, or a function of the user's."""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false
# (tensor and array methods that come without complete types)

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from octify.calibrate.data import take_batches
from octify.calibrate.verdict import labels_of
from octify.errors import CalibrationError
from octify.inputs import Preprocessing

SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm", ".gif"}
TENSORS = {".npy", ".pt", ".pth"}
BATCH = 32


@dataclass(frozen=True)
class Source:
    """Batches of prepared images, and their labels where they are known."""

    batches: list[Any]
    labels: Tensor | None


def load_source(
    text: str,
    known: Preprocessing | None,
    *,
    samples: int | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    size: tuple[int, int] | None = None,
) -> Source:
    """Reads calibration images from a folder, a .npy or .pt file, or `module:function`.

    `known` is the model's own preprocessing; `mean`, `std` and `size` (height, width) stand above it. Of a folder's
    images `samples` are taken evenly; its subfolders, if it has some, are classes in alphabetical order.

    Raises:
        CalibrationError: it cannot be read, or nothing says how images are prepared.
    """
    path = Path(text)
    if path.is_dir():
        return _folder(path, prepare_for(known, mean, std, size), samples)
    if path.suffix in TENSORS:
        return _tensors(path, known, mean, std, samples)
    if ":" in text:
        batches = take_batches(_call(text), samples)
        return Source([_inputs(batch) for batch in batches], labels_of(batches))
    raise CalibrationError(f"{text}: there is no such folder, .npy or .pt file; a function is written module:function")


def prepare_for(
    known: Preprocessing | None,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    size: tuple[int, int] | None,
) -> Preprocessing:
    """The preprocessing, from the model's own and what the user says.

    Raises:
        CalibrationError: neither says enough.
    """
    if known is None and (mean is None or std is None or size is None):
        missing = [name for name, value in (("--mean", mean), ("--std", std), ("--size", size)) if value is None]
        raise CalibrationError(
            f"the model's preprocessing is unknown: add {', '.join(missing)}; prepared images can be a .npy file"
        )
    base = known or Preprocessing((), (), (0, 0), 0, "bilinear")
    if size is not None:
        base = replace(base, size=size, resize=_resize(known, size))
    return replace(base, mean=tuple(mean or base.mean), std=tuple(std or base.std))


def _resize(known: Preprocessing | None, size: tuple[int, int]) -> int:
    """The shorter side before the crop: as much larger than the crop as the model's own, else the crop's."""
    ratio = known.resize / min(known.size) if known else 1.0
    return round(min(size) * ratio)


def _folder(path: Path, how: Preprocessing, samples: int | None) -> Source:
    classes = sorted(child for child in path.iterdir() if child.is_dir())
    found = [(file, index) for index, folder in enumerate(classes) for file in _images(folder)]
    flat = not found
    found = found or [(file, -1) for file in _images(path)]
    if not found:
        raise CalibrationError(f"{path}: holds no images ({', '.join(sorted(SUFFIXES))})")
    if samples is not None and samples < len(found):
        found = [found[int(place)] for place in np.linspace(0, len(found) - 1, samples)]
    images = torch.stack([_read_image(file, how) for file, _ in found])
    labels = None if flat else torch.tensor([label for _, label in found])
    return Source(list(images.split(BATCH)), labels)


def _images(folder: Path) -> list[Path]:
    return sorted(file for file in folder.rglob("*") if file.suffix.lower() in SUFFIXES and file.is_file())


def _read_image(file: Path, how: Preprocessing) -> Tensor:
    from PIL import Image
    from torchvision.transforms import functional as V
    from torchvision.transforms.functional import InterpolationMode

    try:
        with Image.open(file) as opened:
            image: Any = opened.convert("RGB")
    except Exception as error:  # damaged files raise whatever their reader stumbles on
        raise CalibrationError(f"{file}: cannot be read as an image: {error}") from error
    mode = InterpolationMode(how.interpolation) if how.interpolation in _MODES else InterpolationMode.BILINEAR
    resize = cast(Any, V.resize)
    image = cast(Any, V.center_crop)(resize(image, [how.resize], mode), list(how.size))
    return cast(Any, V.normalize)(cast(Any, V.to_tensor)(image), list(how.mean), list(how.std))


_MODES = {"nearest", "bilinear", "bicubic", "box", "hamming", "lanczos"}


def _tensors(
    path: Path,
    known: Preprocessing | None,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    samples: int | None,
) -> Source:
    stored = _read_tensor(path)
    images, labels = stored if isinstance(stored, tuple) else (stored, None)
    if images.dim() < 3 or not len(images):
        raise CalibrationError(f"{path}: holds {tuple(images.shape)}: expected images (N, C, H, W)")
    if samples is not None and samples < len(images):
        chosen = torch.from_numpy(np.linspace(0, len(images) - 1, samples).astype(np.int64))
        images, labels = images[chosen], None if labels is None else labels[chosen]
    if not images.is_floating_point():
        mean, std = mean or (known.mean if known else None), std or (known.std if known else None)
        if mean is None or std is None:
            raise CalibrationError(
                f"{path}: holds {images.dtype} and the model's preprocessing is unknown: add --mean, --std"
            )
        shape = (1, -1, *(1,) * (images.dim() - 2))
        images = (images.float() / 255 - torch.tensor(mean).view(shape)) / torch.tensor(std).view(shape)
    return Source(list(images.split(BATCH)), labels)


def _read_tensor(path: Path) -> Any:
    if not path.is_file():
        raise CalibrationError(f"{path}: there is no such file")
    try:
        if path.suffix == ".npy":
            return torch.from_numpy(np.load(path, allow_pickle=False))
        stored: Any = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged files raise whatever their reader stumbles on
        raise CalibrationError(f"{path}: cannot be read: {str(error).splitlines()[0]}") from error
    if isinstance(stored, dict):
        named = cast("dict[str, Any]", stored)
        stored = (named["images"], named["labels"]) if "labels" in named else named.get("images")
    parts: tuple[Any, ...] = tuple(stored) if isinstance(stored, (tuple, list)) else (stored,)  # pyright: ignore
    if not all(isinstance(part, Tensor) for part in parts) or len(parts) not in (1, 2):
        raise CalibrationError(f"{path}: expected a tensor of images, or a pair of images and labels")
    return parts if len(parts) == 2 else parts[0]


def _inputs(batch: Any) -> Any:
    """A batch without its labels, where it is a pair of images and labels."""
    return batch[0] if labels_of([batch]) is not None else batch


def _call(text: str) -> Iterable[Any]:
    place, _, name = text.rpartition(":")
    try:
        function: Any = getattr(_load(place), name, None)
        if not callable(function):
            raise CalibrationError(f"{text}: {place} has nothing to call named {name}")
        return cast("Iterable[Any]", function())
    except CalibrationError:
        raise
    except Exception as error:  # the user's own code
        raise CalibrationError(f"{text} failed: {type(error).__name__}: {error}") from error


def _load(place: str) -> ModuleType:
    if not place.endswith(".py"):
        sys.path.insert(0, str(Path.cwd()))
        try:
            return importlib.import_module(place)
        finally:
            sys.path.remove(str(Path.cwd()))
    found = importlib.util.spec_from_file_location(f"octify_source_{Path(place).stem}", Path(place).resolve())
    if found is None or found.loader is None:
        raise CalibrationError(f"{place} is no Python file")
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module
