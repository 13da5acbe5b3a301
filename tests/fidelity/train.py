"""Train the benchmark's nets, once: weights and figures stay in a cache outside the repository.

`python -m tests.fidelity.train --net residual --seed 0` trains one, without options all of seed 0; what is cached is
not trained again.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from typing import TypedDict, cast

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, cross_entropy, pad

from tests.fidelity.data import SIZE, Part, Pictures, make_pictures, normalize
from tests.fidelity.nets import NETS, make_net

COUNTS: dict[Part, int] = {"train": 8000, "calibration": 512, "test": 2000}
# Part of every cached file's name: count it up with any change of the pictures, the nets or the training.
VERSION = 3
PASSES = 48_000
BATCH = 32
# The first steps see the pictures at half the size: a quarter of the cost, and the digits' scales overlap.
EARLY = 0.67
RATE = 3e-3
# Without batch norm a net bears a lower rate only, and starts slowly; its passes are cheap.
SLOW, SLOW_PASSES, SLOW_RATE = ("plain",), 128_000, 1e-3


class Figures(TypedDict):
    """What is known of a trained net; accuracy is top-1 on the test set."""

    net: str
    seed: int
    accuracy: float
    seconds: float


def cache_dir() -> Path:
    """$OCTIFY_CACHE/fidelity, or ~/.cache/octify/fidelity."""
    root = os.environ.get("OCTIFY_CACHE")
    folder = Path(root) if root else Path.home() / ".cache" / "octify"
    folder = folder / "fidelity"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def load_pictures(part: Part, seed: int = 0) -> Pictures:
    """One of the benchmark's sets. All seeds share the training and the test set; calibration sets differ."""
    file = cache_dir() / f"v{VERSION}-{part}-{COUNTS[part]}-{seed}.safetensors"
    if not file.exists():
        pictures = make_pictures(part, COUNTS[part], seed)
        _save(file, {"images": pictures.images, "labels": pictures.labels})
    tensors = load_file(file)
    return Pictures(tensors["images"], tensors["labels"])


def load_net(name: str, seed: int = 0) -> tuple[nn.Module, Figures]:
    """A trained net in eval mode on the CPU, trained now unless it is cached, and its figures."""
    stem = cache_dir() / f"v{VERSION}-{name}-{seed}"
    weights, figures = stem.with_suffix(".safetensors"), stem.with_suffix(".json")
    net = make_net(name, seed)
    if not figures.exists():
        start = time.perf_counter()
        rate, passes = (SLOW_RATE, SLOW_PASSES) if name in SLOW else (RATE, PASSES)
        train_net(net, load_pictures("train"), seed, rate, passes)
        seconds = time.perf_counter() - start
        accuracy = measure_accuracy(net, load_pictures("test"))
        _save(weights, net.cpu().state_dict())
        figures.write_text(json.dumps(Figures(net=name, seed=seed, accuracy=accuracy, seconds=seconds)))
    net.load_state_dict(load_file(weights))
    return net.eval(), cast(Figures, json.loads(figures.read_text()))


def train_net(net: nn.Module, pictures: Pictures, seed: int, rate: float, passes: int) -> None:
    """Train in place; `passes` counts pictures. The same seed gives the same weights on the same machine."""
    where = device()
    net.to(where, memory_format=torch.channels_last).train()  # pyright: ignore[reportCallIssue, reportUnknownMemberType]
    steps = passes // BATCH
    optimizer = torch.optim.AdamW(net.parameters(), rate, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, steps, pct_start=0.2)
    dice = torch.Generator().manual_seed(seed)
    order = torch.empty(0, dtype=torch.int64)
    losses: list[Tensor] = []
    for step in range(steps):
        if len(order) < BATCH:
            order = torch.randperm(len(pictures), generator=dice)
        chosen, order = order[:BATCH], order[BATCH:]
        images = _jitter(normalize(pictures.images[chosen]), dice).to(where)
        if step < EARLY * steps:
            images = avg_pool2d(images, 2)
        # On a processor without it, bfloat16 is emulated: ten times slower than float32.
        with torch.autocast(where.type, torch.bfloat16, enabled=where.type == "cuda"):
            logits = net(images)
        loss = cross_entropy(logits.float(), pictures.labels[chosen].to(where))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.detach())
        if len(losses) == steps // 10:
            print(f"  {step + 1}/{steps}  loss {float(torch.stack(losses).mean()):.3f}", flush=True)
            losses.clear()


@torch.inference_mode()
def measure_accuracy(net: nn.Module, pictures: Pictures) -> float:
    """Top-1 in eval mode; the net's own mode and device are left as they were."""
    where = next(net.parameters()).device
    training = net.training
    net.eval()
    pairs = zip(pictures.batches(100), pictures.labels.split(100), strict=True)
    right = sum(int((net(x.to(where)).argmax(1).cpu() == y).sum()) for x, y in pairs)
    net.train(training)
    return right / len(pictures)


def _jitter(images: Tensor, dice: torch.Generator) -> Tensor:
    """Shift a batch by up to 4 pixels."""
    top, left = torch.randint(0, 9, (2,), generator=dice).tolist()
    shifted = pad(images, (4, 4, 4, 4), mode="reflect")[..., top : top + SIZE, left : left + SIZE]
    return shifted.contiguous(memory_format=torch.channels_last)


def _save(file: Path, tensors: dict[str, Tensor]) -> None:
    """Write, then move: a reader never meets half a file."""
    part = file.with_suffix(f".{os.getpid()}")
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, part)
    part.replace(file)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--net", choices=[*NETS], action="append")
    parser.add_argument("--seed", type=int, action="append")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    for seed in options.seed or [0]:
        for name in options.net or NETS:
            figures = load_net(name, seed)[1]
            print(f"{name:14} seed {seed}  accuracy {figures['accuracy']:.4f}  {figures['seconds']:.0f} s", flush=True)


if __name__ == "__main__":
    main()
