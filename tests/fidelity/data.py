"""Ten-class pictures made of what scikit-learn carries: its digits over its two photographs.

A digit is drawn at a random scale (a small one needs fine detail, a large one coarse), place, slant, colour and
contrast over a random crop of a photograph; strokes of other digits lie about as clutter. Three sets share no digit,
and the test photographs' part is one that no other set sees.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Literal

import numpy as np
import torch
from sklearn.datasets import load_digits, load_sample_images
from torch import Tensor
from torch.nn.functional import affine_grid, grid_sample, interpolate

Part = Literal["train", "calibration", "test"]
PARTS: tuple[Part, ...] = ("train", "calibration", "test")

SIZE = 64
CLASSES = 10
MEAN, STD = 0.42, 0.26
# The sources' digits are dealt by position, the photographs' columns by this border: right of it is for the test.
BORDER = 432
DIGITS = {"train": slice(0, 1200), "calibration": slice(1200, 1400), "test": slice(1400, 1797)}


@dataclass(frozen=True)
class Pictures:
    """images: uint8 (N, 3, SIZE, SIZE); labels: int64 (N,)."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def first(self, count: int) -> Pictures:
        return Pictures(self.images[:count], self.labels[:count])

    def batches(self, size: int = 64) -> list[Tensor]:
        """Normalized float batches (size, 3, SIZE, SIZE), without labels: what a calibration is given."""
        return [normalize(part) for part in self.images.split(size)]


def normalize(images: Tensor) -> Tensor:
    """uint8 images as the nets take them."""
    return (images.float() / 255 - MEAN) / STD


def make_pictures(part: Part, count: int, seed: int = 0) -> Pictures:
    """Draw pictures of one set; picture i depends on (part, seed, i) only, so a longer set begins with a shorter."""
    images = torch.empty(count, 3, SIZE, SIZE, dtype=torch.uint8)
    labels = torch.empty(count, dtype=torch.int64)
    for i in range(count):
        rng = np.random.default_rng((seed, PARTS.index(part), i))
        images[i], labels[i] = _draw(part, rng)
    return Pictures(images, labels)


def photo_columns(part: Part) -> slice:
    """The columns of both photographs that a set's backgrounds are cut from."""
    return slice(BORDER, None) if part == "test" else slice(0, BORDER)


@cache
def _photos(part: Part) -> tuple[Tensor, ...]:
    photos = load_sample_images().images
    return tuple(torch.tensor(p[:, photo_columns(part)]).permute(2, 0, 1).float() / 255 for p in photos)


@cache
def _digits(part: Part) -> tuple[Tensor, np.ndarray]:
    digits = load_digits()
    images = torch.tensor(digits.images[DIGITS[part]], dtype=torch.float32) / 16
    return images[:, None], digits.target[DIGITS[part]]


def _draw(part: Part, rng: np.random.Generator) -> tuple[Tensor, int]:
    image = _background(part, rng)
    strokes, labels = _digits(part)
    for _ in range(int(rng.integers(0, 3))):
        clutter = strokes[int(rng.integers(len(strokes)))].clone()
        # Half a digit is clutter, a whole one would be a second label.
        clutter[:, int(rng.integers(2, 4)) :] = 0
        image = _paint(image, clutter, _side(rng, 10, 18), 1.0, rng)
    index = int(rng.integers(len(strokes)))
    image = _paint(image, strokes[index], _side(rng, 20, 56), 0.7, rng)
    noise = torch.from_numpy(rng.normal(0, 0.02, image.shape).astype(np.float32))
    return ((image + noise).clamp(0, 1) * 255).round().to(torch.uint8), int(labels[index])


def _background(part: Part, rng: np.random.Generator) -> Tensor:
    photos = _photos(part)
    photo = photos[int(rng.integers(len(photos)))]
    side = int(rng.integers(48, 193))
    top = int(rng.integers(photo.shape[1] - side + 1))
    left = int(rng.integers(photo.shape[2] - side + 1))
    crop = photo[None, :, top : top + side, left : left + side]
    if rng.random() < 0.5:
        crop = crop.flip(-1)
    return interpolate(crop, (SIZE, SIZE), mode="bilinear", antialias=True, align_corners=False)[0]


def _side(rng: np.random.Generator, low: float, high: float) -> float:
    """A digit's side in pixels, evenly over the octaves."""
    return float(np.exp(rng.uniform(np.log(low), np.log(high))))


def _paint(image: Tensor, strokes: Tensor, side: float, reach: float, rng: np.random.Generator) -> Tensor:
    """Blend an 8x8 stroke mask, `side` pixels wide, into the image; its centre may lie up to `reach` of the way to
    where it would touch the border."""
    scale = SIZE / side
    room = max(0.0, 1 - side / SIZE) * reach
    x, y = rng.uniform(-room, room, 2)
    slant, angle = rng.uniform(-0.2, 0.2), rng.uniform(-0.25, 0.25)
    cos, sin = np.cos(angle) * scale, np.sin(angle) * scale
    matrix = np.array([[cos, -sin + slant * scale], [sin, cos]])
    shift = -matrix @ np.array([x, y])
    theta = torch.tensor(np.concatenate([matrix, shift[:, None]], 1), dtype=torch.float32)[None]
    grid = affine_grid(theta, [1, 1, SIZE, SIZE], align_corners=False)
    mask = grid_sample(strokes[None], grid, mode="bilinear", align_corners=False)[0]
    mask = mask * float(rng.uniform(0.8, 1.0))
    return image * (1 - mask) + mask * _colour(image, mask, rng)


def _colour(image: Tensor, mask: Tensor, rng: np.random.Generator) -> Tensor:
    """A colour (3, 1, 1) that differs from what it is painted on by some contrast."""
    ground = (image * mask).sum((1, 2)) / mask.sum().clamp(min=1e-6)
    sign = 1.0 if float(ground.mean()) < rng.uniform(0.3, 0.7) else -1.0
    step = torch.from_numpy(rng.uniform(0.35, 0.9, 3).astype(np.float32)) * sign
    return (ground + step).clamp(0, 1)[:, None, None]
